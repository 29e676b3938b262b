"Two API processes beside one PostgreSQL and one Redis, as replicas are; and what happens when one of these goes away."
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

from rakuten_nb.serving.tokens import hash_password
from rakuten_nb.store.database import add_user, change_user, open_store, predictions

if TYPE_CHECKING:
    from servers import Postgres, RedisServer

pytestmark = [pytest.mark.services, needs_postgres, needs_redis]

HANG = 10.0 # seconds in which every answer comes, whatever is away
FOLLOW = 15.0 # seconds in which every process follows
PROBLEM_JSON = "application/problem+json"

@dataclass
class Pair:
    "Two processes and what they share."
    both: tuple[ApiProcess, ApiProcess]
    bundle: Path
    postgres: "Postgres"
    redis: "RedisServer"
    users: int = 0

    def user(self, role: str = "user") -> str:
        "Somebody new, whose limit nobody has used."
        self.users += 1
        self.both[0].add_users(**{(name := f"somebody-{self.users}"): role})
        return name

    def newcomer(self, role: str = "user") -> dict[str, str]:
        "The header of somebody new."
        return self.both[self.users % 2].token(self.user(role))

    def ask(self, header: dict[str, str], times: int) -> list[httpx.Response]:
        "Predictions, asked of the one and the other in turn; none hangs."
        found = []
        for n in range(times):
            began = time.monotonic()
            found.append(self.both[n % 2].predict(header, f"Jeu {n}"))
            assert time.monotonic() - began < HANG
        return found

@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], bundle: Path, postgres_server: "Postgres",
         redis_server: "RedisServer") -> Iterator[Pair]:
    "Both, with a data folder each, one bundle, one empty database; started at once."
    home = tmp_path_factory.mktemp("pair")
    shared = {"RAKUTEN_DATABASE_URL": postgres_server.new_database(), "RAKUTEN_REDIS_URL": redis_server.url, "RAKUTEN_RATE_LIMIT_PREDICT": "5/minute"}
    place = Path(shutil.copytree(bundle, home / "bundle"))
    first, second = (ApiProcess(env, home / name, place, **shared) for name in ("first", "second"))
    try:
        for one in (first, second): one.start(wait=False)
        for one in (first, second): one.wait_until("/ready", {200})
        yield Pair((first, second), place, postgres_server, redis_server)
    finally:
        for one in (first, second): one.__exit__()

def statuses(answers: list[httpx.Response]) -> list[int]:
    "What they were; those that say no are problem documents."
    for answer in answers:
        if answer.status_code != 200: assert answer.headers["content-type"] == PROBLEM_JSON and answer.json()["status"] == answer.status_code
    return [answer.status_code for answer in answers]

def until(what: Callable[[], object], within: float) -> bool:
    "Whether something becomes true in time."
    deadline = time.monotonic() + within
    while not (true := what()) and time.monotonic() < deadline: time.sleep(0.2)
    return bool(true)

def warnings(api: ApiProcess, word: str) -> int:
    "How often the log warns of something."
    lines = [json.loads(line) for line in api.log().splitlines()]
    return sum(line["level"] in ("WARNING", "ERROR") and word in line["message"] for line in lines)

def written(pair: Pair, ids: list[str]) -> list[str]:
    "Those of the predictions that are in the store."
    store = open_store(pair.both[0].database_url)
    try:
        with store.reading() as c: return list(c.execute(sa.select(predictions.c.request_id).where(predictions.c.request_id.in_(ids))).scalars())
    finally: store.close()

# --- two that start

def test_two_that_start_at_once_on_an_empty_database_both_come_up(tmp_path: Path, env: dict[str, str], bundle: Path, postgres_server: "Postgres") -> None:
    for n in range(3):
        url = postgres_server.new_database()
        crowd = [ApiProcess(env, tmp_path / f"{n}-{k}", bundle, RAKUTEN_DATABASE_URL=url) for k in range(2)]
        try:
            for one in crowd: one.start(wait=False)
            for one in crowd: one.wait_until("/ready", {200})
        finally:
            for one in crowd: one.__exit__()

# --- what they share

def test_they_share_one_limit(pair: Pair) -> None:
    header = pair.newcomer()
    answers = pair.ask(header, 8)
    assert statuses(answers) == [200] * 5 + [429] * 3
    assert [a.headers["ratelimit-remaining"] for a in answers[:5]] == ["4", "3", "2", "1", "0"]
    assert all(1 <= int(a.headers["retry-after"]) <= 60 for a in answers[5:])
    assert statuses(pair.ask(pair.newcomer(), 2)) == [200, 200], "others are not held up"

def test_they_share_one_throttle_of_log_ins(pair: Pair) -> None:
    name = pair.user()
    def guess(n: int, password: str = "wrong") -> int:
        return pair.both[n % 2].client.post("/token", data={"username": name, "password": password}).status_code
    assert [guess(n) for n in range(7)] == [401] * 5 + [429] * 2
    assert [guess(n, PASSWORD) for n in range(2)] == [429] * 2
    assert pair.newcomer()

def test_they_share_users_and_tokens(pair: Pair) -> None:
    first, second = pair.both
    name = pair.user()
    header = first.token(name)
    assert statuses([first.predict(header, "Jeu"), second.predict(header, "Jeu")]) == [200, 200]
    store = first.store()
    change_user(store, name, disabled=True)
    refused = lambda: [one.client.get("/model", headers=header).status_code for one in pair.both] == [401, 401]
    assert until(refused, FOLLOW), "a disabled user is out everywhere"
    change_user(store, name, disabled=False, password_hash=hash_password("another password, as good", rounds=4))
    store.close()
    for one in pair.both:
        assert one.client.post("/token", data={"username": name, "password": PASSWORD}).status_code == 401
        assert one.client.post("/token", data={"username": name, "password": "another password, as good"}).status_code == 200

def reloaded(pair: Pair, asked_of: ApiProcess, admin: dict[str, str]) -> list[dict[str, Any]]:
    "What `GET /model` says at both once both have followed a request of one."
    asked = asked_of.client.post("/model/reload", headers=admin)
    assert asked.status_code == 202
    news: list[dict[str, Any]] = []
    def followed() -> bool:
        news[:] = [one.client.get("/model", headers=admin).json() for one in pair.both]
        return all(n["request"] == asked.json()["request"] and len(n["followed"]) == 2 for n in news)
    assert until(followed, FOLLOW), news
    return news

def test_they_follow_one_request_for_another_model(pair: Pair, sample_catalog: Path, rakuten: Any, tmp_path: Path) -> None:
    admin, (first, second) = pair.newcomer("admin"), pair.both
    before = {one.client.get("/status").json()["model_version"] for one in pair.both}
    made = rakuten("train", sample_catalog, "--bundle", tmp_path / "bundle", "--experts", "text_linear")
    assert made.returncode == 0, made.stderr
    old = pair.bundle.rename(pair.bundle.with_name("old"))
    shutil.copytree(tmp_path / "bundle", pair.bundle)
    news = reloaded(pair, first, admin)
    (now,) = {n["model_version"] for n in news}
    assert len(before) == 1 and now not in before
    for n in news:
        assert {f["model_version"] for f in n["followed"]} == {now} and not any(f["error"] for f in n["followed"]) and not n["error"]
        assert len({f["process"] for f in n["followed"]}) == 2 and n["experts"] == ["text_linear"]
    for one in pair.both: assert one.predict(admin, "Jeu").json()["model_version"] == now
    shutil.rmtree(pair.bundle)
    old.rename(pair.bundle)
    assert {n["model_version"] for n in reloaded(pair, second, admin)} == before, "and back, asked of the other"

# --- Redis goes away

def goes_and_comes_back(pair: Pair, away: Any) -> None:
    "Without Redis each process counts for itself; with it, both count together again."
    header, warned = pair.newcomer(), [warnings(one, "Redis is away") for one in pair.both]
    with away:
        assert statuses(pair.ask(header, 12)) == [200] * 10 + [429] * 2, "five of each"
        assert [warnings(one, "Redis is away") for one in pair.both] > warned
        for one in pair.both:
            assert one.client.get("/health").status_code == one.client.get("/ready").status_code == 200
            assert one.client.post("/token", data={"username": "nobody-at-all", "password": "wrong"}).status_code == 401
    def together() -> bool:
        return sorted(statuses(pair.ask(pair.newcomer(), 6))) == [200] * 5 + [429]
    assert until(together, 15), "they count together again"

def test_redis_is_stopped(pair: Pair) -> None:
    goes_and_comes_back(pair, pair.redis.stopped())

def test_redis_is_frozen(pair: Pair) -> None:
    goes_and_comes_back(pair, pair.redis.frozen())

# --- PostgreSQL goes away

def test_postgresql_is_stopped(pair: Pair) -> None:
    until_away(pair, pair.postgres.stopped())

def test_postgresql_is_frozen(pair: Pair) -> None:
    until_away(pair, pair.postgres.frozen())

def until_away(pair: Pair, away: Any) -> None:
    "Who is known is served for some seconds, then told to wait; nothing hangs or breaks, and what was predicted is written afterwards."
    known, name, ids = [pair.newcomer("admin") for _ in range(4)], pair.user(), []
    for header in known: assert statuses(pair.ask(header, 2)) == [200, 200], "each process knows them"
    with ThreadPoolExecutor(12) as crowd: # so that each has idle connections, which it will take for good ones
        for one in pair.both: assert {a.status_code for a in crowd.map(lambda _, one=one: one.client.get("/model", headers=known[0]), range(60))} == {200}
    def timely(method: str, one: ApiProcess, path: str, **options: Any) -> httpx.Response:
        began = time.monotonic()
        answer = one.client.request(method, path, **options)
        assert time.monotonic() - began < HANG, path
        return answer
    with away:
        found = []
        for n in range(24):
            answer = timely("POST", pair.both[n % 2], "/predict", headers=known[n // 2 % 4], data={"designation": f"Piscine {n}"})
            found.append(answer.status_code)
            if answer.status_code == 200: ids.append(answer.json()["request_id"])
            else: assert statuses([answer])[0] in (429, 503)
            if answer.status_code == 503: assert answer.headers["retry-after"]
            assert timely("GET", pair.both[n % 2], "/health").status_code == timely("GET", pair.both[n % 2], "/metrics").status_code == 200
            time.sleep(0.5)
        assert found[0] == 200 and found[-1] == 503, found
        for one in pair.both:
            for method, path, options in (("POST", "/token", {"data": {"username": name, "password": PASSWORD}}), ("GET", "/model", {"headers": known[0]}),
                                          ("POST", "/model/reload", {"headers": known[0]})):
                assert statuses([timely(method, one, path, **options)]) == [503], path
            assert one.client.get("/ready").status_code == 200
    def works() -> bool:
        answers = [one.client.post("/token", data={"username": name, "password": PASSWORD}) for one in pair.both]
        return [a.status_code for a in answers] == [200, 200]
    assert until(works, 15)
    assert statuses(pair.ask(pair.newcomer(), 2)) == [200, 200]
    assert ids and until(lambda: sorted(written(pair, ids)) == sorted(ids), 15), "what was predicted meanwhile is written, once"
    assert all("an error of ours" not in one.log() and "Traceback" not in one.terminal() and pair.postgres.password not in one.log() for one in pair.both)

def test_they_do_not_start_without_postgresql(tmp_path: Path, env: dict[str, str], bundle: Path, postgres_server: "Postgres") -> None:
    url = postgres_server.url("nowhere", "hush-hush-7")
    api = ApiProcess(env, tmp_path / "api", bundle, RAKUTEN_DATABASE_URL=url).start(wait=False)
    assert api.process and api.process.wait(60) != 0
    assert "hush-hush-7" not in api.terminal() and "Traceback" not in api.terminal() and "database postgresql" in api.terminal()

def test_a_user_added_beside_them_is_known_to_both(pair: Pair) -> None:
    store = open_store(pair.both[1].database_url)
    add_user(store, "added.beside", hash_password(PASSWORD, rounds=4))
    store.close()
    for one in pair.both: assert one.client.get("/model", headers=one.token("added.beside")).status_code == 200
