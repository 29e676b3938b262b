"The store says the same on SQLite and on PostgreSQL, also to many at once and when the database comes and goes."
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from api_process import free_port
from conftest import needs_postgres

from rakuten_nb.errors import InputError, RakutenError
from rakuten_nb.store.feedback import count_waiting
from rakuten_nb.store.jobs import job_numbers
from rakuten_nb.store.prediction_log import PredictionLog
from rakuten_nb.store.database import (
    ADDED,
    SCHEMA,
    Store,
    StoreUnavailable,
    add_predictions,
    add_user,
    ask_for_model,
    change_user,
    find_user,
    last_model_request,
    list_users,
    model_news,
    open_store,
    predictions,
    report_model,
)

if TYPE_CHECKING:
    from servers import Postgres

HASH = "$2b$04$" + "x" * 53
PARIS = timezone(timedelta(hours=1), "Paris in winter")

@dataclass
class Database:
    "An empty database of one of the two kinds."
    url: str
    another: Callable[[], str] # the URL of one more
    away: Callable[[], AbstractContextManager[None]] # nobody can write to it meanwhile

@contextmanager
def held(path: Path) -> Iterator[None]:
    "Somebody else writes to an SQLite file, and takes long."
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try: yield
    finally: connection.close()

@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=[pytest.mark.services, needs_postgres])])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    "The same tests for both."
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres_server")
        return Database(server.new_database(), server.new_database, server.stopped)
    numbers = iter(range(1000))
    another = lambda: f"sqlite:///{tmp_path}/{next(numbers)}/store.sqlite"
    return Database(f"sqlite:///{tmp_path}/store.sqlite", another, lambda: held(tmp_path / "store.sqlite"))

@pytest.fixture
def store(database: Database) -> Iterator[Store]:
    "An open store."
    opened = open_store(database.url)
    yield opened
    opened.close()

def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    "A prediction."
    at = datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC)
    return {"request_id": f"r{number}", "at": at, "user": "marie", "product_id": "4711", "prdtypecode": 2583, "confidence": 0.1 + 0.2,
            "needs_review": False, "top5": [[2583, 0.75], [10, 0.25]], "experts": {"text_linear": 1.0}, "model_version": "0123456789ab",
            "variant": "champion", "profile": [1.0, 2.5, 0.0, 1e-300, 12345678.9, 0.0, 1.0, 3.0]} | changes

def everything(store: Store) -> list[dict[str, Any]]:
    "All predictions, in the order in which they were written."
    with store.reading() as c: return [dict(r) for r in c.execute(sa.select(predictions).order_by(predictions.c.id)).mappings()]

def appear(store: Store, count: int, within: float = 20) -> list[str]:
    "The ids of the predictions, as soon as there are so many."
    deadline = time.monotonic() + within
    while len(found := everything(store)) < count and time.monotonic() < deadline: time.sleep(0.05)
    return [r["request_id"] for r in found]

# --- making it

MAKE = """
import sys
from rakuten_nb.store.database import add_user, list_users, open_store
for url in sys.argv[2:]:
    print("ready", flush=True)
    sys.stdin.readline() # until the others are too
    store = open_store(url)
    add_user(store, sys.argv[1], "x" * 60)
    assert sys.argv[1] in [u.name for u in list_users(store)]
    store.close()
"""

def test_processes_that_make_it_at_once_all_come_up(database: Database, env: dict[str, str]) -> None:
    urls, names = [database.another() for _ in range(6)], ["marie", "root", "rose"]
    command, pipes = [sys.executable, "-c", MAKE], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    crowd = [subprocess.Popen([*command, name, *urls], env=env, text=True, **pipes) for name in names] # type: ignore[call-overload]
    for _ in urls:
        if not all(process.stdout.readline() for process in crowd): break # one has failed, and says why below
        for process in crowd: process.stdin.write("\n")
        for process in crowd: process.stdin.flush()
    said = [process.communicate(timeout=120)[1] for process in crowd]
    assert [process.returncode for process in crowd] == [0] * 3, said
    for url in urls:
        store = open_store(url)
        assert [u.name for u in list_users(store)] == names
        with store.reading() as c: assert c.execute(sa.text("SELECT count(*), max(version) FROM store_version")).one() == (1, SCHEMA)
        store.close()

def test_threads_that_make_it_at_once_all_come_up(database: Database) -> None:
    for _ in range(5):
        url, start = database.another(), threading.Barrier(8)
        opened: list[Store] = []
        def make(url: str = url, opened: list[Store] = opened, start: threading.Barrier = start) -> None:
            start.wait()
            opened.append(open_store(url))
        together([make] * 8)
        assert len(opened) == 8 and list_users(opened[0]) == []
        for store in opened: store.close()

def together(what: list[Callable[[], None]]) -> None:
    "Do several things at once; raises what went wrong with the first that did."
    wrong: list[BaseException] = []
    def kept(f: Callable[[], None]) -> None:
        try: f()
        except BaseException as e: wrong.append(e)
    crowd = [threading.Thread(target=kept, args=(f,)) for f in what]
    for t in crowd: t.start()
    for t in crowd: t.join()
    if wrong: raise wrong[0]

def test_opening_it_again_keeps_what_is_there(database: Database, store: Store) -> None:
    add_user(store, "marie", HASH)
    again = open_store(database.url)
    assert [u.name for u in list_users(again)] == ["marie"]
    again.close()

@pytest.mark.parametrize("found", [0, SCHEMA + 1, 99, None])
def test_tables_of_another_version_are_refused(database: Database, store: Store, found: int | None) -> None:
    change = "DELETE FROM store_version" if found is None else f"UPDATE store_version SET version = {found}"
    with store.writing() as c: c.execute(sa.text(change))
    with pytest.raises(InputError, match=f"expected tables of version {SCHEMA}; found {found}"): open_store(database.url)

def as_version(store: Store, version: int) -> None:
    "Take away what later versions brought."
    for added in range(version + 1, SCHEMA + 1):
        for table in ADDED[added]: table.drop(store.engine)
    with store.writing() as c:
        if version < 3: c.execute(sa.text("DROP INDEX ix_predictions_product_id"))
        c.execute(sa.text(f"UPDATE store_version SET version = {version}"))

@pytest.mark.parametrize("version", range(1, SCHEMA))
def test_tables_of_an_older_version_get_what_is_missing_and_keep_what_is_there(database: Database, store: Store, version: int) -> None:
    add_user(store, "marie", HASH)
    as_version(store, version)
    opened: list[Store] = []
    together([lambda: opened.append(open_store(database.url))] * 6)
    for other in opened: other.close()
    assert [u.name for u in list_users(store)] == ["marie"] and job_numbers(store)[1] == {"answered": 0, "error": 0} and count_waiting(store) == 0
    indexes = {name for table in ("predictions", "kept", "feedback") for name in (i["name"] for i in sa.inspect(store.engine).get_indexes(table))}
    assert {"ix_predictions_product_id", "ix_kept_content", "ix_feedback_prediction"} <= indexes
    with store.reading() as c: assert c.execute(sa.text("SELECT count(*), max(version) FROM store_version")).one() == (1, SCHEMA)

def test_a_table_of_another_program_in_the_way_of_a_new_one_is_left_alone(database: Database, store: Store) -> None:
    as_version(store, 1)
    with store.writing() as c: c.execute(sa.text("CREATE TABLE jobs (theirs INTEGER)"))
    with pytest.raises(InputError, match="found only jobs"): open_store(database.url)
    with store.reading() as c: assert c.execute(sa.text("SELECT version FROM store_version")).scalar() == 1

@pytest.mark.parametrize("table", ["users", "predictions", "model_requests", "jobs", "feedback"])
def test_tables_of_another_program_are_refused_and_left_alone(database: Database, table: str) -> None:
    url = database.another()
    if url.startswith("sqlite"): Path(sa.make_url(url).database or "").parent.mkdir()
    theirs = sa.create_engine(url)
    with theirs.begin() as c:
        c.execute(sa.text(f"CREATE TABLE {table} (theirs INTEGER)"))
        c.execute(sa.text("CREATE TABLE else_ (theirs INTEGER)"))
    with pytest.raises(InputError, match=f"found only {table}"): open_store(url)
    assert sorted(sa.inspect(theirs).get_table_names()) == sorted(["else_", table]), "nothing half-made"
    theirs.dispose()

# --- users

def test_a_user_is_found_as_added(store: Store) -> None:
    before = datetime.now(UTC)
    add_user(store, "marie", HASH, "reviewer")
    found = find_user(store, "marie")
    assert found and (found.name, found.password_hash, found.role, found.disabled, found.generation) == ("marie", HASH, "reviewer", False, 0)
    assert before <= found.created <= datetime.now(UTC) and found.created.tzinfo is UTC

def test_a_second_user_of_that_name_is_refused(store: Store) -> None:
    add_user(store, "marie", HASH, "admin")
    with pytest.raises(InputError, match="user marie: there is one already"): add_user(store, "marie", HASH)
    assert [(u.name, u.role) for u in list_users(store)] == [("marie", "admin")]
    add_user(store, "Marie", HASH)
    assert [u.name for u in list_users(store)] == ["Marie", "marie"], "capitals tell names apart, and order is the same everywhere"

def test_of_many_who_add_one_user_one_succeeds(store: Store) -> None:
    done: list[int] = []
    def add(n: int) -> None:
        try: add_user(store, "marie", HASH[:-1] + str(n))
        except InputError: return
        done.append(n)
    together([lambda n=n: add(n) for n in range(8)]) # type: ignore[misc]
    found = find_user(store, "marie")
    assert len(done) == 1 and found and found.password_hash.endswith(str(done[0]))

@pytest.mark.parametrize("name", ["", " ", "a b", "-x", "é", "a" * 65, "a\0b", "a\n", "'; DROP TABLE users; --", "😀", "../x", "%s", ":name"])
def test_a_strange_name_is_nobodys(store: Store, name: str) -> None:
    with pytest.raises(InputError, match="user name"): add_user(store, name, HASH)
    assert find_user(store, name) is None
    with pytest.raises(InputError, match="there is none"): change_user(store, name, disabled=True)
    assert list_users(store) == []

@pytest.mark.parametrize("name", ["a", "A" * 64, "0", "marie@example.org", "x._-@", "null", "select", "table"])
def test_a_name_within_the_rules_is_taken(store: Store, name: str) -> None:
    add_user(store, name, HASH)
    found = find_user(store, name)
    assert found and found.name == name and find_user(store, name + "x") is None
    assert find_user(store, f"{name}\0") is None, "and is not found by another that a database might cut short"

def test_an_unknown_role_is_refused(store: Store) -> None:
    with pytest.raises(InputError, match="role: expected user, reviewer, admin; found 'king'"): add_user(store, "marie", HASH, "king")
    assert list_users(store) == []

def test_each_change_raises_the_generation(store: Store) -> None:
    for name in ("marie", "rose"): add_user(store, name, HASH)
    change_user(store, "marie", disabled=True)
    change_user(store, "marie", disabled=False, role="admin")
    marie, rose = list_users(store)
    assert (marie.disabled, marie.role, marie.generation) == (False, "admin", 2) and (rose.role, rose.generation) == ("user", 0)
    together([lambda: change_user(store, "marie", password_hash=HASH)] * 20)
    assert list_users(store)[0].generation == 22, "none is lost of many at once"

# --- predictions

def test_a_prediction_comes_back_as_written(store: Store) -> None:
    text = "🎁 <b>'\"; DROP TABLE users; --\u202e %s {} \\ \x01\x7f été ＤＲ " + "x" * 150
    at = datetime(2024, 7, 14, 23, 59, 59, 999999, tzinfo=PARIS)
    given = [row(0), row(1, product_id=text, at=at, experts={"é😀": 0.25, "image": 0.75}, top5=[], profile=[]),
             row(2, product_id="", confidence=1e-12, needs_review=True)]
    add_predictions(store, given)
    found = everything(store)
    assert [{k: v for k, v in r.items() if k != "id"} for r in found] == given
    assert [r["id"] for r in found] == [1, 2, 3] and found[1]["at"].utcoffset() == timedelta(0) and found[1]["at"].hour == 22

def test_predictions_are_written_all_or_none(store: Store) -> None:
    with pytest.raises(sa.exc.IntegrityError): add_predictions(store, [row(0), row(1, product_id=None), row(2)])
    assert everything(store) == []

def test_a_summer_hour_that_comes_twice_stays_two(store: Store) -> None:
    hours = [datetime(2024, 10, 27, 0, 30, tzinfo=UTC) + timedelta(hours=h) for h in range(3)]
    add_predictions(store, [row(n, at=at) for n, at in enumerate(hours)])
    assert [r["at"] for r in everything(store)] == hours

def test_many_that_write_at_once_lose_nothing(database: Database, store: Store) -> None:
    other = open_store(database.url) # as another process has it
    def write(n: int) -> None:
        for i in range(10): add_predictions(other if n % 2 else store, [row(1000 * n + 10 * i + k) for k in range(3)])
        list_users(store)
    together([lambda n=n: write(n) for n in range(12)]) # type: ignore[misc]
    expected = {f"r{1000 * n + 10 * i + k}" for n in range(12) for i in range(10) for k in range(3)}
    found = everything(store)
    assert len(found) == 360 and {r["request_id"] for r in found} == expected and len({r["id"] for r in found}) == 360
    other.close()

def test_a_store_with_no_connection_left_says_so(store: Store) -> None:
    began = time.monotonic()
    with ExitStack() as held, pytest.raises(StoreUnavailable) as e:
        for _ in range(200): held.enter_context(store.reading())
    assert time.monotonic() - began < 10 and one_line(e.value)
    assert list_users(store) == [], "and has some again afterwards"

# --- which model is wanted

def test_what_became_of_a_model_request(store: Store) -> None:
    assert last_model_request(store) == 0 and model_news(store, 1) == []
    first, second = ask_for_model(store, "root"), ask_for_model(store, "root")
    assert 0 < first < second == last_model_request(store)
    report_model(store, second, "b:2", "0123456789ab")
    report_model(store, second, "a:1", "", "bundle.json: differs 😀")
    report_model(store, first, "a:1", "0123456789ab")
    news = model_news(store, second)
    assert [(n["process"], n["model_version"], n["error"]) for n in news] == [("b:2", "0123456789ab", ""), ("a:1", "", "bundle.json: differs 😀")]
    assert all(n["at"].tzinfo is UTC for n in news) and len(model_news(store, first)) == 1

def test_requests_of_many_have_numbers_of_their_own(store: Store) -> None:
    numbers: list[int] = []
    together([lambda: numbers.append(ask_for_model(store, "root"))] * 16)
    assert len(set(numbers)) == 16 and max(numbers) == last_model_request(store)

# --- a database that is not there

SECRET = "hush-hush-7"

def one_line(error: RakutenError) -> str:
    "What it says, which is one line without the password."
    said = str(error)
    assert said and "\n" not in said and SECRET not in said and "Traceback" not in said
    return said

@pytest.mark.services
@needs_postgres
def test_a_wrong_password_is_said_without_it(postgres_server: "Postgres") -> None:
    for url in (postgres_server.url("postgres", SECRET), f"postgresql://{postgres_server.user}:{SECRET}@127.0.0.1:{postgres_server.port}/postgres"):
        with pytest.raises(StoreUnavailable) as e: open_store(url)
        assert "password authentication failed" in one_line(e.value)

@pytest.mark.services
@needs_postgres
def test_a_password_in_the_query_is_not_said_either(postgres_server: "Postgres") -> None:
    url = f"postgresql+psycopg://127.0.0.1:{postgres_server.port}/postgres?user={postgres_server.user}&password={SECRET}"
    with pytest.raises(RakutenError) as e: open_store(url)
    one_line(e.value)

@pytest.mark.services
@needs_postgres
def test_a_database_that_there_is_not(postgres_server: "Postgres") -> None:
    with pytest.raises(StoreUnavailable) as e: open_store(postgres_server.url("nowhere"))
    assert "nowhere" in one_line(e.value)

def test_a_server_that_is_absent() -> None:
    with pytest.raises(StoreUnavailable) as e: open_store(f"postgresql+psycopg://rakuten:{SECRET}@127.0.0.1:{free_port()}/rakuten")
    assert "refused" in one_line(e.value) and "***" in str(e.value)

@pytest.mark.parametrize("url", [f"mysql://u:{SECRET}@h/d", f"oracle+nonsense://u:{SECRET}@h/d", f"rakuten:{SECRET}", "sqlite://", "sqlite:///:memory:", ""])
def test_a_url_of_something_else_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InputError) as e: open_store(url)
    assert "RAKUTEN_DATABASE_URL" in one_line(e.value)

def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "store.sqlite").write_text("not a database, but long enough to look like the page of one\n" * 100)
    with pytest.raises(StoreUnavailable) as e: open_store(f"sqlite:///{tmp_path}/store.sqlite")
    assert "not a database" in one_line(e.value)

@pytest.mark.services
@needs_postgres
def test_reading_and_writing_while_it_is_away_say_so_and_work_afterwards(postgres_server: "Postgres") -> None:
    store = open_store(postgres_server.new_database())
    add_user(store, "marie", HASH)
    tasks: list[Callable[[], Any]] = [lambda: find_user(store, "marie"), lambda: list_users(store), lambda: ask_for_model(store, "root"),
                                      lambda: add_predictions(store, [row()])]
    with postgres_server.stopped():
        for what in tasks:
            with pytest.raises(StoreUnavailable) as e: what()
            assert postgres_server.password not in one_line(e.value)
    assert find_user(store, "marie") and ask_for_model(store, "root") and everything(store) == []
    store.close()

# --- writing behind

def test_the_journal_waits_for_the_database(database: Database, store: Store) -> None:
    lost: list[int] = []
    journal = PredictionLog(store, lost.append, every=0.05)
    journal.add(row(0))
    assert appear(store, 1) == ["r0"]
    with database.away():
        for n in range(1, 1201): # more than go into one batch
            journal.add(row(n))
            if n % 400 == 0: time.sleep(0.3)
    assert appear(store, 1201) == [f"r{n}" for n in range(1201)] and not lost
    journal.add(row(9999))
    journal.close()
    assert len(everything(store)) == 1202 and not lost, "what was waiting when it ended is written too"

def test_the_journal_tells_what_it_had_to_lose(database: Database, store: Store) -> None:
    lost: list[int] = []
    with database.away():
        journal = PredictionLog(store, lost.append, every=3600, keep=10)
        for n in range(25): journal.add(row(n))
    journal.close()
    assert [r["request_id"] for r in everything(store)] == [f"r{n}" for n in range(15, 25)] and sum(lost) == 15, "the oldest go first, and are counted"

def test_what_no_database_takes_does_not_hold_up_the_journal(store: Store) -> None:
    lost: list[int] = []
    journal = PredictionLog(store, lost.append, every=0.5)
    for n, changes in enumerate([{}, {"product_id": None}, {}]): journal.add(row(n, **changes))
    appear(store, 2, within=3)
    journal.add(row(3))
    journal.close()
    assert [r["request_id"] for r in everything(store)] == ["r0", "r2", "r3"] and lost == [1]
