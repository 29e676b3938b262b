"Two API processes that share one PostgreSQL and one Redis; what happens when one of these servers is unavailable."
import json
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import sqlalchemy as sa
from api_process import PASSWORD, ApiProcess
from conftest import needs_postgres, needs_redis

from rakuten_nb.store.database import open_store, predictions
from rakuten_nb.store.users import add_user, change_user, hash_password

if TYPE_CHECKING:
    from servers import Postgres, RedisServer

pytestmark = [pytest.mark.services, needs_postgres, needs_redis]

MAX_SECONDS = 10.0 # for any response, whichever server is unavailable
FOLLOW_SECONDS = 15.0 # within which every process loads a requested model
PROBLEM_JSON = "application/problem+json"

@dataclass
class Pair:
    "Two API processes and the servers that they share."
    both: tuple[ApiProcess, ApiProcess]
    bundle: Path
    postgres: "Postgres"
    redis: "RedisServer"
    users: int = 0

    def add_user(self, role: str = "user") -> str:
        "Add a user, whose limits are unused; returns the name."
        self.users += 1
        name = f"user-{self.users}"
        self.both[0].add_users(**{name: role})
        return name

    def new_header(self, role: str = "user") -> dict[str, str]:
        "The authorization header of a new user."
        return self.both[self.users % 2].token(self.add_user(role))

    def predict(self, header: dict[str, str], times: int) -> list[httpx.Response]:
        "Responses to predictions, sent to the two processes in turn; each arrives in time."
        responses = []
        for n in range(times):
            began = time.monotonic()
            responses.append(self.both[n % 2].predict(header, f"Jeu {n}"))
            assert time.monotonic() - began < MAX_SECONDS
        return responses

@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], bundle: Path, postgres_server: "Postgres",
         redis_server: "RedisServer") -> Iterator[Pair]:
    "Two processes with a data folder each, one bundle and one empty database, started at the same time."
    home = tmp_path_factory.mktemp("pair")
    shared = {"RAKUTEN_DATABASE_URL": postgres_server.new_database(), "RAKUTEN_REDIS_URL": redis_server.url,
              "RAKUTEN_RATE_LIMIT_PREDICT": "5/minute"}
    folder = Path(shutil.copytree(bundle, home / "bundle"))
    first, second = (ApiProcess(env, home / name, folder, **shared) for name in ("first", "second"))
    try:
        for api in (first, second): api.start(wait=False)
        for api in (first, second): api.wait_until("/ready", {200})
        yield Pair((first, second), folder, postgres_server, redis_server)
    finally:
        for api in (first, second): api.__exit__()

def statuses(responses: list[httpx.Response]) -> list[int]:
    "The statuses of responses; all errors must be problem documents."
    for response in responses:
        if response.status_code == 200: continue
        assert response.headers["content-type"] == PROBLEM_JSON and response.json()["status"] == response.status_code
    return [response.status_code for response in responses]

def until(condition: Callable[[], object], within: float) -> bool:
    "Whether a condition becomes true in time."
    deadline = time.monotonic() + within
    while not (result := condition()) and time.monotonic() < deadline: time.sleep(0.2)
    return bool(result)

def warnings(api: ApiProcess, text: str) -> int:
    "The number of warnings and errors in the log that contain a text."
    lines = [json.loads(line) for line in api.log().splitlines()]
    return sum(line["level"] in ("WARNING", "ERROR") and text in line["message"] for line in lines)

def stored(pair: Pair, ids: list[str]) -> list[str]:
    "The ids of those predictions that are in the store."
    store = open_store(pair.both[0].database_url)
    query = sa.select(predictions.c.request_id).where(predictions.c.request_id.in_(ids))
    try:
        with store.reading() as c: return list(c.execute(query).scalars())
    finally: store.close()

# --- start

def test_two_processes_start_at_once_on_an_empty_database(tmp_path: Path, env: dict[str, str], bundle: Path,
                                                          postgres_server: "Postgres") -> None:
    for n in range(2):
        url = postgres_server.new_database()
        processes = [ApiProcess(env, tmp_path / f"{n}-{k}", bundle, RAKUTEN_DATABASE_URL=url) for k in range(2)]
        try:
            for api in processes: api.start(wait=False)
            for api in processes: api.wait_until("/ready", {200})
        finally:
            for api in processes: api.__exit__()

# --- shared state

def test_processes_share_the_rate_limit(pair: Pair) -> None:
    responses = pair.predict(pair.new_header(), 8)
    assert statuses(responses) == [200] * 5 + [429] * 3
    assert [r.headers["ratelimit-remaining"] for r in responses[:5]] == ["4", "3", "2", "1", "0"]
    assert all(1 <= int(r.headers["retry-after"]) <= 60 for r in responses[5:])
    assert statuses(pair.predict(pair.new_header(), 2)) == [200, 200], "another user has a limit of their own"

def test_processes_share_the_count_of_failed_logins(pair: Pair) -> None:
    name = pair.add_user()
    def log_in(n: int, password: str = "wrong") -> int:
        form = {"username": name, "password": password}
        return pair.both[n % 2].client.post("/token", data=form).status_code
    assert [log_in(n) for n in range(7)] == [401] * 5 + [429] * 2
    assert [log_in(n, PASSWORD) for n in range(2)] == [429] * 2
    assert pair.new_header()

def test_processes_share_users_and_tokens(pair: Pair) -> None:
    first, second = pair.both
    name = pair.add_user()
    header = first.token(name)
    assert statuses([first.predict(header, "Jeu"), second.predict(header, "Jeu")]) == [200, 200]
    store = first.store()
    change_user(store, name, disabled=True)
    refused = lambda: [api.client.get("/model", headers=header).status_code for api in pair.both] == [401, 401]
    assert until(refused, FOLLOW_SECONDS), "both processes refuse a disabled user"
    password = "another password, as good"
    change_user(store, name, disabled=False, password_hash=hash_password(password, rounds=4))
    store.close()
    for api in pair.both:
        for secret, status in ((PASSWORD, 401), (password, 200)):
            assert api.client.post("/token", data={"username": name, "password": secret}).status_code == status

def reloaded(pair: Pair, api: ApiProcess, admin: dict[str, str]) -> list[dict[str, Any]]:
    "Request a reload at one process; returns `GET /model` of both once both have handled it."
    response = api.client.post("/model/reload", headers=admin)
    assert response.status_code == 202
    models: list[dict[str, Any]] = []
    def handled() -> bool:
        models[:] = [one.client.get("/model", headers=admin).json() for one in pair.both]
        return all(m["request"] == response.json()["request"] and len(m["followed"]) == 2 for m in models)
    assert until(handled, FOLLOW_SECONDS), models
    return models

def test_processes_load_a_requested_model(pair: Pair, sample_catalog: Path, rakuten: Any, tmp_path: Path) -> None:
    admin, (first, second) = pair.new_header("admin"), pair.both
    before = {api.client.get("/status").json()["model_version"] for api in pair.both}
    run = rakuten("train", sample_catalog, "--bundle", tmp_path / "bundle", "--experts", "text_linear")
    assert run.returncode == 0, run.stderr
    old = pair.bundle.rename(pair.bundle.with_name("old"))
    shutil.copytree(tmp_path / "bundle", pair.bundle)
    models = reloaded(pair, first, admin)
    (version,) = {m["model_version"] for m in models}
    assert len(before) == 1 and version not in before
    for m in models:
        assert {f["model_version"] for f in m["followed"]} == {version} and not any(f["error"] for f in m["followed"])
        assert not m["error"] and len({f["process"] for f in m["followed"]}) == 2 and m["experts"] == ["text_linear"]
    for api in pair.both: assert api.predict(admin, "Jeu").json()["model_version"] == version
    shutil.rmtree(pair.bundle)
    old.rename(pair.bundle)
    assert {m["model_version"] for m in reloaded(pair, second, admin)} == before, "the second process loads it again"

# --- Redis is unavailable

def check_without_redis(pair: Pair, outage: Any) -> None:
    "Without Redis each process counts its own limits; afterwards both count together again."
    header = pair.new_header()
    count_warnings = lambda: [warnings(api, "Redis is unavailable") for api in pair.both]
    before = count_warnings()
    with outage:
        assert statuses(pair.predict(header, 12)) == [200] * 10 + [429] * 2, "five in each process"
        assert count_warnings() > before
        for api in pair.both:
            assert api.client.get("/health").status_code == api.client.get("/ready").status_code == 200
            wrong = {"username": "unknown-user", "password": "wrong"}
            assert api.client.post("/token", data=wrong).status_code == 401
    def counted_together() -> bool:
        return sorted(statuses(pair.predict(pair.new_header(), 6))) == [200] * 5 + [429]
    assert until(counted_together, 15), "both count together again"

def test_limits_hold_while_redis_is_stopped(pair: Pair) -> None:
    check_without_redis(pair, pair.redis.stopped())

def test_limits_hold_while_redis_is_frozen(pair: Pair) -> None:
    check_without_redis(pair, pair.redis.frozen())

# --- PostgreSQL is unavailable

def timely(method: str, api: ApiProcess, path: str, **options: Any) -> httpx.Response:
    "A response that arrives in time."
    began = time.monotonic()
    response = api.client.request(method, path, **options)
    assert time.monotonic() - began < MAX_SECONDS, path
    return response

def predict_during_outage(pair: Pair, headers: list[dict[str, str]]) -> list[str]:
    "Predict for 12 seconds; returns the request ids of the predictions. The first succeeds, the last is refused."
    ids, codes = [], []
    for n in range(24):
        api, form = pair.both[n % 2], {"designation": f"Piscine {n}"}
        response = timely("POST", api, "/predict", headers=headers[n // 2 % 4], data=form)
        codes.append(response.status_code)
        if response.status_code == 200: ids.append(response.json()["request_id"])
        else: assert statuses([response])[0] in (429, 503)
        if response.status_code == 503: assert response.headers["retry-after"]
        assert timely("GET", api, "/health").status_code == timely("GET", api, "/metrics").status_code == 200
        time.sleep(0.5)
    assert codes[0] == 200 and codes[-1] == 503, codes
    return ids

def check_without_postgres(pair: Pair, outage: Any) -> None:
    """Cached users are served for some seconds, then they get 503. No request hangs, and the predictions of the
    outage are stored afterwards."""
    headers, name = [pair.new_header("admin") for _ in range(4)], pair.add_user()
    for header in headers: assert statuses(pair.predict(header, 2)) == [200, 200], "each process caches the user"
    with ThreadPoolExecutor(12) as clients: # opens connections that the pool believes to be good during the outage
        for api in pair.both:
            codes = clients.map(lambda _, api=api: api.client.get("/model", headers=headers[0]).status_code, range(60))
            assert set(codes) == {200}
    form = {"username": name, "password": PASSWORD}
    with outage:
        ids = predict_during_outage(pair, headers)
        for api in pair.both:
            admin = {"headers": headers[0]}
            for method, path, options in (("POST", "/token", {"data": form}), ("GET", "/model", admin),
                                          ("POST", "/model/reload", admin)):
                assert statuses([timely(method, api, path, **options)]) == [503], path
            assert api.client.get("/ready").status_code == 200
    def recovered() -> bool:
        return [api.client.post("/token", data=form).status_code for api in pair.both] == [200, 200]
    assert until(recovered, 15)
    assert statuses(pair.predict(pair.new_header(), 2)) == [200, 200]
    assert ids and until(lambda: sorted(stored(pair, ids)) == sorted(ids), 15), "each prediction is stored once"
    for api in pair.both:
        assert "internal error" not in api.log() and "Traceback" not in api.terminal()
        assert pair.postgres.password not in api.log()

def test_requests_do_not_hang_while_postgresql_is_stopped(pair: Pair) -> None:
    check_without_postgres(pair, pair.postgres.stopped())

def test_requests_do_not_hang_while_postgresql_is_frozen(pair: Pair) -> None:
    check_without_postgres(pair, pair.postgres.frozen())

def test_the_api_does_not_start_without_postgresql(tmp_path: Path, env: dict[str, str], bundle: Path,
                                                   postgres_server: "Postgres") -> None:
    url = postgres_server.url("nowhere", "hush-hush-7")
    api = ApiProcess(env, tmp_path / "api", bundle, RAKUTEN_DATABASE_URL=url).start(wait=False)
    assert api.process and api.process.wait(60) != 0
    assert "hush-hush-7" not in api.terminal() and "Traceback" not in api.terminal()
    assert "database postgresql" in api.terminal()

def test_a_user_added_to_the_store_may_log_in_at_both(pair: Pair) -> None:
    store = open_store(pair.both[1].database_url)
    add_user(store, "added.beside", hash_password(PASSWORD, rounds=4))
    store.close()
    for api in pair.both: assert api.client.get("/model", headers=api.token("added.beside")).status_code == 200
