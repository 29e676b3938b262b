"The store behaves the same on SQLite and PostgreSQL: concurrent use, outages, stores of earlier releases."
import json
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

import old_store
import pytest
import sqlalchemy as sa
from api_process import free_port
from conftest import needs_postgres

from rakuten_nb.config import Settings
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.errors import InputError, RakutenError
from rakuten_nb.store import migrations
from rakuten_nb.store.database import SCHEMA, Store, StoreUnavailable, open_store, predictions, tables
from rakuten_nb.store.feedback import (
    add_feedback,
    count_queued,
    find_feedback,
    find_prediction,
    find_queued,
    live_accuracy,
)
from rakuten_nb.store.job_files import answers_path, job_folder, read_chunk
from rakuten_nb.store.jobs import claim_chunk, find_jobs, finish_chunk, job_counts, read_results
from rakuten_nb.store.model_requests import find_model_reports, last_model_request, report_model, request_model
from rakuten_nb.store.prediction_log import PredictionLog, add_predictions
from rakuten_nb.store.products import picture_path
from rakuten_nb.store.retention import erase_user, store_contents
from rakuten_nb.store.review_export import export_reviewed
from rakuten_nb.store.users import add_user, change_user, check_password, find_user, list_users

if TYPE_CHECKING:
    from servers import Postgres

HASH = "$2b$04$" + "x" * 53
PARIS = timezone(timedelta(hours=1), "Paris in winter")

@dataclass
class Database:
    "An empty database of one of the two kinds."
    url: str
    new_url: Callable[[], str] # the URL of another empty database
    unavailable: Callable[[], AbstractContextManager[None]] # writes fail meanwhile

@contextmanager
def locked(path: Path) -> Iterator[None]:
    "Another process holds the lock of an SQLite file."
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try: yield
    finally: connection.close()

@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=[pytest.mark.services, needs_postgres])])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    "Both kinds of database; most tests run on each."
    if request.param == "postgresql":
        server: Postgres = request.getfixturevalue("postgres_server")
        return Database(server.new_database(), server.new_database, server.stopped)
    numbers = iter(range(1000))
    new_url = lambda: f"sqlite:///{tmp_path}/{next(numbers)}/store.sqlite"
    return Database(f"sqlite:///{tmp_path}/store.sqlite", new_url, lambda: locked(tmp_path / "store.sqlite"))

@pytest.fixture
def store(database: Database) -> Iterator[Store]:
    "An open store."
    opened = open_store(database.url)
    yield opened
    opened.close()

def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    "A prediction."
    at = datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=UTC)
    return {"request_id": f"r{number}", "at": at, "user": "marie", "product_id": "4711", "prdtypecode": 2583,
            "confidence": 0.1 + 0.2, "needs_review": False, "top5": [[2583, 0.75], [10, 0.25]],
            "experts": {"text_linear": 1.0}, "model_version": "0123456789ab", "variant": "champion",
            "profile": [1.0, 2.5, 0.0, 1e-300, 12345678.9, 0.0, 1.0, 3.0], "experiment": "", "audit": False,
            "review_order": 0.1 + 0.2, "seconds": None} | changes

def rows_of(store: Store, table: sa.Table) -> list[dict[str, Any]]:
    "All rows of a table, ordered by primary key."
    query = sa.select(table).order_by(*table.primary_key)
    with store.reading() as c: return [dict(r) for r in c.execute(query).mappings()]

def request_ids(store: Store) -> list[str]:
    "The request ids of all predictions, in the order in which they were written."
    return [r["request_id"] for r in rows_of(store, predictions)]

def wait_for_predictions(store: Store, count: int, within: float = 20) -> list[str]:
    "The request ids of all predictions, as soon as there are so many."
    deadline = time.monotonic() + within
    while len(ids := request_ids(store)) < count and time.monotonic() < deadline: time.sleep(0.05)
    return ids

def together(tasks: list[Callable[[], None]]) -> None:
    "Run tasks in threads at the same time; raises the first error."
    errors: list[BaseException] = []
    def run(task: Callable[[], None]) -> None:
        try: task()
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for t in threads: t.start()
    for t in threads: t.join()
    if errors: raise errors[0]

# --- opening a store

OPEN = """
import sys
from rakuten_nb.store.database import open_store
from rakuten_nb.store.users import add_user, list_users
for url in sys.argv[2:]:
    print("ready", flush=True)
    sys.stdin.readline() # until the other processes are ready too
    store = open_store(url)
    add_user(store, sys.argv[1], "x" * 60)
    assert sys.argv[1] in [u.name for u in list_users(store)]
    store.close()
assert "alembic" not in sys.modules, "a new store needs no migration"
"""

def version_rows(store: Store) -> tuple[int, int]:
    "The number of rows of `store_version`, and the highest version."
    with store.reading() as c: n, version = c.execute(sa.text("SELECT count(*), max(version) FROM store_version")).one()
    return n, version

def test_processes_that_open_a_new_store_at_once_all_succeed(database: Database, env: dict[str, str]) -> None:
    urls, names = [database.new_url() for _ in range(6)], ["marie", "root", "rose"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    start: Any = lambda name: subprocess.Popen([sys.executable, "-c", OPEN, name, *urls], env=env, text=True, **pipes)
    processes = [start(name) for name in names]
    for _ in urls:
        if not all(process.stdout.readline() for process in processes): break # one has failed; its error is shown below
        for process in processes: process.stdin.write("\n")
        for process in processes: process.stdin.flush()
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 3, errors
    for url in urls:
        store = open_store(url)
        assert [u.name for u in list_users(store)] == names and version_rows(store) == (1, SCHEMA)
        store.close()

def test_threads_that_open_a_new_store_at_once_all_succeed(database: Database) -> None:
    for _ in range(5):
        url, start = database.new_url(), threading.Barrier(8)
        opened: list[Store] = []
        def open_one(url: str = url, opened: list[Store] = opened, start: threading.Barrier = start) -> None:
            start.wait()
            opened.append(open_store(url))
        together([open_one] * 8)
        assert len(opened) == 8 and list_users(opened[0]) == []
        for store in opened: store.close()

def test_opening_a_store_again_keeps_its_rows(database: Database, store: Store) -> None:
    add_user(store, "marie", HASH)
    again = open_store(database.url)
    assert [u.name for u in list_users(again)] == ["marie"]
    again.close()

@pytest.mark.parametrize("version", [0, SCHEMA + 1, 99, None])
def test_an_unknown_version_is_refused(database: Database, store: Store, version: int | None) -> None:
    change = "DELETE FROM store_version" if version is None else f"UPDATE store_version SET version = {version}"
    with store.writing() as c: c.execute(sa.text(change))
    advice = "update rakuten_nb" if version and version > SCHEMA else "Restore a backup"
    with pytest.raises(InputError, match=f"expected tables of version {SCHEMA}; found {version}. .*{advice}") as e:
        open_store(database.url)
    assert "or set RAKUTEN_DATABASE_URL to another database" in one_line(e.value)

@pytest.mark.parametrize("table", ["users", "predictions", "model_requests", "jobs", "feedback", "retained_products"])
def test_tables_of_another_program_are_refused_and_stay(database: Database, table: str) -> None:
    url = database.new_url()
    if url.startswith("sqlite"): Path(sa.make_url(url).database or "").parent.mkdir()
    theirs = sa.create_engine(url)
    with theirs.begin() as c:
        c.execute(sa.text(f"CREATE TABLE {table} (theirs INTEGER)"))
        c.execute(sa.text("CREATE TABLE else_ (theirs INTEGER)"))
    with pytest.raises(InputError, match=f"found only {table}"): open_store(url)
    assert sorted(sa.inspect(theirs).get_table_names()) == sorted(["else_", table]), "no table was added"
    theirs.dispose()

def test_an_incomplete_store_is_refused_and_stays(database: Database, store: Store) -> None:
    with store.writing() as c: c.execute(sa.text("DROP TABLE feedback"))
    with pytest.raises(InputError, match=f"expected all tables of version {SCHEMA}; missing: feedback"):
        open_store(database.url)
    assert "feedback" not in sa.inspect(store.engine).get_table_names() and version_rows(store) == (1, SCHEMA)

# --- stores of earlier releases

RENAMED = {"kept": "retained_products"} # table of version 3 → table of version 4
RENAMED_COLUMNS = {"wanted": "for_review"}

@pytest.fixture
def carried(database: Database, tmp_path: Path) -> Iterator[Store]:
    "A store of version 3, opened by this release."
    old_store.write_old_store(database.url, tmp_path / "data")
    opened = open_store(database.url)
    yield opened
    opened.close()

def schema_of(store: Store) -> dict[str, Any]: # table → columns, keys and indexes
    "What the database knows about its tables."
    inspector = sa.inspect(store.engine)
    def describe(table: str) -> dict[str, Any]:
        columns = [(c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(table)]
        indexes = sorted((i["name"], i["column_names"], i["unique"]) for i in inspector.get_indexes(table))
        unique = sorted(u["column_names"] for u in inspector.get_unique_constraints(table))
        return {"columns": columns, "indexes": indexes, "unique": unique, "key": inspector.get_pk_constraint(table)}
    return {table: describe(table) for table in sorted(inspector.get_table_names())}

@pytest.mark.parametrize("version", range(1, SCHEMA))
def test_a_store_of_an_earlier_version_is_carried_over_with_all_rows(
        database: Database, tmp_path: Path, version: int) -> None:
    old = old_store.write_old_store(database.url, tmp_path / "data", version)
    opened: list[Store] = []
    together([lambda: opened.append(open_store(database.url))] * 6)
    store = opened[0]
    for table, rows in old.items():
        now = rows_of(store, tables.tables[RENAMED.get(table, table)])
        expected = [{RENAMED_COLUMNS.get(name, name): value for name, value in row.items()} for row in rows]
        assert [{name: r[name] for name in e} for r, e in zip(now, expected, strict=True)] == expected, table
    assert version_rows(store) == (1, SCHEMA)
    if version == 1: assert job_counts(store)[1] == {"answered": 0, "error": 0} and count_queued(store) == 0
    for other in opened: other.close()

@pytest.mark.parametrize("version", range(1, SCHEMA))
def test_a_store_that_was_carried_over_has_the_tables_of_a_new_one(
        database: Database, tmp_path: Path, version: int) -> None:
    old_store.write_old_store(database.url, tmp_path / "data", version)
    carried, new = open_store(database.url), open_store(database.new_url())
    assert schema_of(carried) == schema_of(new)
    carried.close()
    new.close()

def test_users_of_an_earlier_release_log_in(carried: Store) -> None:
    assert [(u.name, u.role, u.disabled, u.generation) for u in list_users(carried)] == [
        ("marie", "reviewer", False, 3), ("paul", "user", False, 3), ("rose", "admin", True, 3)]
    marie = find_user(carried, "marie")
    assert marie and check_password(old_store.PASSWORD, marie.password_hash)
    change_user(carried, "marie", disabled=True)
    add_user(carried, "jean", HASH)
    assert [u.name for u in list_users(carried) if not u.disabled] == ["jean", "paul"]

def test_the_review_queue_of_an_earlier_release_goes_on(carried: Store, tmp_path: Path) -> None:
    (item,) = find_queued(carried)
    assert (item.title, item.prdtypecode, item.confidence, item.user_labels) == (old_store.POOL, 2583, 0.31, [2583])
    assert picture_path(tmp_path / "data", item.picture).read_bytes() == old_store.PICTURE
    novel = find_prediction(carried, "paul", request_id="r2")
    assert novel and novel.retained
    add_feedback(carried, novel.id, "paul", 1160, False)
    add_feedback(carried, item.id, "marie", 2583, True)
    assert [q.title for q in find_queued(carried)] == [old_store.NOVEL]

def test_feedback_of_an_earlier_release_counts(carried: Store) -> None:
    label = find_feedback(carried, 3, "marie")
    assert label and (label.prdtypecode, label.reviewer, label.at) == (1302, True, old_store.at(12, 3))
    assert [(a.answers, a.n, a.right) for a in live_accuracy(carried)] == [("reviewed", 2, 1), ("doubtful", 2, 1)]

def test_reviewed_products_of_an_earlier_release_are_exported(carried: Store, tmp_path: Path) -> None:
    done = export_reviewed(carried, tmp_path / "data", tmp_path / "out", any_user=True)
    assert sorted(read_catalog(tmp_path / "out").labelled.title) == sorted([old_store.POOL, old_store.GAME])
    assert done.left_out == []

def test_jobs_of_an_earlier_release_are_finished(carried: Store, tmp_path: Path) -> None:
    settings = Settings(rakuten_data_dir=tmp_path / "data")
    assert [(j.id, j.user, j.status, j.done) for j in find_jobs(carried)] == [
        (old_store.RUNNING, "marie", "running", 1), (old_store.JOB, "paul", "succeeded", 1)]
    assert answers_path(settings, old_store.JOB, "csv").read_text() == "productid\n4711\n"
    claim = claim_chunk(carried, "worker")
    assert claim and (claim.job, claim.number, claim.first) == (old_store.RUNNING, 1, 1)
    (product,) = read_chunk(job_folder(settings, claim.job), claim.number)
    assert (product.productid, product.title, product.description) == ("4712", "Jeu", "en bois")
    assert finish_chunk(carried, claim, [["4712", "", "1281"]])
    assert [line[0] for page in read_results(carried, claim.job) for line in page] == ["4711", "4712"]

def test_what_an_earlier_release_retained_expires_by_the_same_rules(carried: Store, tmp_path: Path) -> None:
    contents = store_contents(carried, Settings(rakuten_data_dir=tmp_path / "data"))
    assert dict(zip(contents["what"], contents["rows"], strict=True)) == {
        "predictions": 4, "feedback": 2, "products for review or learning": 2, "other products": 1,
        "jobs": 2, "users": 3, "pictures": 1}

def test_new_rows_follow_those_of_an_earlier_release(carried: Store) -> None:
    add_predictions(carried, [row(5)])
    assert request_ids(carried) == ["r1", "r2", "r3", "r4", "r5"]
    assert request_model(carried, "rose") == 2 and find_model_reports(carried, 1)[0]["process"] == "host:1"

def test_a_migration_that_fails_leaves_the_store_as_it_was(
        database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_store.write_old_store(database.url, tmp_path / "data", 1)
    def fail(op: object) -> None: raise ZeroDivisionError
    with monkeypatch.context() as m, pytest.raises(ZeroDivisionError):
        m.setitem(migrations.MIGRATIONS, SCHEMA, fail)
        open_store(database.url)
    engine = sa.create_engine(database.url)
    assert set(sa.inspect(engine).get_table_names()) == migrations.TABLES[1]
    engine.dispose()
    store = open_store(database.url)
    assert version_rows(store) == (1, SCHEMA) and len(list_users(store)) == 3
    store.close()

@pytest.mark.parametrize("table", ["jobs", "feedback", "retained_products"])
def test_a_table_of_another_program_in_the_way_of_a_migration_stays(
        database: Database, tmp_path: Path, table: str) -> None:
    old_store.write_old_store(database.url, tmp_path / "data", 1)
    engine = sa.create_engine(database.url)
    with engine.begin() as c: c.execute(sa.text(f"CREATE TABLE {table} (theirs INTEGER)"))
    with pytest.raises(InputError, match=f"expected the tables of version 1; found also {table}") as e:
        open_store(database.url)
    assert "rename them" in one_line(e.value)
    with engine.begin() as c: assert c.execute(sa.text("SELECT version FROM store_version")).scalar() == 1
    assert [c["name"] for c in sa.inspect(engine).get_columns(table)] == ["theirs"]
    engine.dispose()

def test_old_store_script_writes_a_version_2_store(tmp_path: Path) -> None:
    script = Path(old_store.__file__)
    url = f"sqlite:///{tmp_path}/store.sqlite"
    subprocess.run([sys.executable, script, url, tmp_path / "data", "2"], check=True, timeout=60)
    with sqlite3.connect(tmp_path / "store.sqlite") as c:
        assert c.execute("SELECT version FROM store_version").fetchone() == (2,)
        assert json.loads(c.execute("SELECT top5 FROM predictions").fetchone()[0]) == [[2583, 0.31], [10, 0.01]]

# --- users

def test_a_user_is_found_as_added(store: Store) -> None:
    before = datetime.now(UTC)
    add_user(store, "marie", HASH, "reviewer")
    user = find_user(store, "marie")
    assert user and (user.name, user.password_hash, user.role) == ("marie", HASH, "reviewer")
    assert not user.disabled and 0 <= user.generation < 2**30
    assert before <= user.created <= datetime.now(UTC) and user.created.tzinfo is UTC

def test_a_new_user_of_an_erased_name_has_another_generation(store: Store, tmp_path: Path) -> None:
    generations = set()
    for _ in range(3):
        add_user(store, "marie", HASH)
        generations |= {user.generation for user in list_users(store)}
        erase_user(store, Settings(rakuten_data_dir=tmp_path), "marie")
    assert len(generations) == 3, "a token of the erased user would be valid for the new one"

def test_a_second_user_of_the_same_name_is_refused(store: Store) -> None:
    add_user(store, "marie", HASH, "admin")
    with pytest.raises(InputError, match="user marie: expected a new name; this user exists"):
        add_user(store, "marie", HASH)
    assert [(u.name, u.role) for u in list_users(store)] == [("marie", "admin")]
    add_user(store, "Marie", HASH)
    assert [u.name for u in list_users(store)] == ["Marie", "marie"], "case matters, in the same order everywhere"

def test_one_of_many_who_add_the_same_user_succeeds(store: Store) -> None:
    added: list[int] = []
    def add(n: int) -> None:
        try: add_user(store, "marie", HASH[:-1] + str(n))
        except InputError: return
        added.append(n)
    together([lambda n=n: add(n) for n in range(8)]) # type: ignore[misc]
    user = find_user(store, "marie")
    assert len(added) == 1 and user and user.password_hash.endswith(str(added[0]))

STRANGE_NAMES = ["", " ", "a b", "-x", "é", "a" * 65, "a\0b", "a\n", "'; DROP TABLE users; --", "😀", "../x", "%s",
                 ":name"]

@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_a_strange_name_is_refused_and_never_found(store: Store, name: str) -> None:
    with pytest.raises(InputError, match="user name"): add_user(store, name, HASH)
    assert find_user(store, name) is None
    with pytest.raises(InputError, match="not found"): change_user(store, name, disabled=True)
    assert list_users(store) == []

@pytest.mark.parametrize("name", ["a", "A" * 64, "0", "marie@example.org", "x._-@", "null", "select", "table"])
def test_a_valid_name_is_accepted(store: Store, name: str) -> None:
    add_user(store, name, HASH)
    user = find_user(store, name)
    assert user and user.name == name and find_user(store, name + "x") is None
    assert find_user(store, f"{name}\0") is None, "a database could end the text at the NUL"

def test_an_unknown_role_is_refused(store: Store) -> None:
    with pytest.raises(InputError, match="role: expected user, reviewer, admin; found 'king'"):
        add_user(store, "marie", HASH, "king")
    assert list_users(store) == []

def test_each_change_raises_the_generation(store: Store) -> None:
    for name in ("marie", "rose"): add_user(store, name, HASH)
    first, other = (user.generation for user in list_users(store))
    change_user(store, "marie", disabled=True)
    change_user(store, "marie", disabled=False, role="admin")
    marie, rose = list_users(store)
    assert (marie.disabled, marie.role, marie.generation) == (False, "admin", first + 2)
    assert (rose.role, rose.generation) == ("user", other)
    together([lambda: change_user(store, "marie", password_hash=HASH)] * 20)
    assert list_users(store)[0].generation == first + 22, "concurrent changes all count"

# --- predictions

def test_a_prediction_comes_back_as_written(store: Store) -> None:
    text = "🎁 <b>'\"; DROP TABLE users; --\u202e %s {} \\ \x01\x7f été ＤＲ " + "x" * 150
    at = datetime(2024, 7, 14, 23, 59, 59, 999999, tzinfo=PARIS)
    given = [row(0), row(1, product_id=text, at=at, experts={"é😀": 0.25, "image": 0.75}, top5=[], profile=[]),
             row(2, product_id="", confidence=1e-12, needs_review=True)]
    add_predictions(store, given)
    rows = rows_of(store, predictions)
    assert [{name: value for name, value in r.items() if name != "id"} for r in rows] == given
    assert [r["id"] for r in rows] == [1, 2, 3]
    assert rows[1]["at"].utcoffset() == timedelta(0) and rows[1]["at"].hour == 22

def test_predictions_are_written_all_or_none(store: Store) -> None:
    with pytest.raises(sa.exc.IntegrityError): add_predictions(store, [row(0), row(1, product_id=None), row(2)])
    assert request_ids(store) == []

def test_the_hour_that_daylight_saving_repeats_stays_two_hours(store: Store) -> None:
    hours = [datetime(2024, 10, 27, 0, 30, tzinfo=UTC) + timedelta(hours=h) for h in range(3)]
    add_predictions(store, [row(n, at=at) for n, at in enumerate(hours)])
    assert [r["at"] for r in rows_of(store, predictions)] == hours

def test_concurrent_writers_lose_nothing(database: Database, store: Store) -> None:
    other = open_store(database.url) # as another process would
    def write(n: int) -> None:
        for i in range(10): add_predictions(other if n % 2 else store, [row(1000 * n + 10 * i + k) for k in range(3)])
        list_users(store)
    together([lambda n=n: write(n) for n in range(12)]) # type: ignore[misc]
    expected = {f"r{1000 * n + 10 * i + k}" for n in range(12) for i in range(10) for k in range(3)}
    rows = rows_of(store, predictions)
    assert len(rows) == 360 and {r["request_id"] for r in rows} == expected and len({r["id"] for r in rows}) == 360
    other.close()

def test_a_store_without_free_connections_says_so(store: Store) -> None:
    began = time.monotonic()
    with ExitStack() as open_transactions, pytest.raises(StoreUnavailable) as e:
        for _ in range(200): open_transactions.enter_context(store.reading())
    assert time.monotonic() - began < 10 and one_line(e.value)
    assert list_users(store) == [], "afterwards connections are free again"

# --- model requests

def test_reports_on_a_model_request_are_found(store: Store) -> None:
    assert last_model_request(store) == 0 and find_model_reports(store, 1) == []
    first, second = request_model(store, "root"), request_model(store, "root")
    assert 0 < first < second == last_model_request(store)
    report_model(store, second, "b:2", "0123456789ab")
    report_model(store, second, "a:1", "", "bundle.json: differs 😀")
    report_model(store, first, "a:1", "0123456789ab")
    reports = find_model_reports(store, second)
    assert [(r["process"], r["model_version"], r["error"]) for r in reports] == [
        ("b:2", "0123456789ab", ""), ("a:1", "", "bundle.json: differs 😀")]
    assert all(r["at"].tzinfo is UTC for r in reports) and len(find_model_reports(store, first)) == 1

def test_concurrent_requests_have_numbers_of_their_own(store: Store) -> None:
    numbers: list[int] = []
    together([lambda: numbers.append(request_model(store, "root"))] * 16)
    assert len(set(numbers)) == 16 and max(numbers) == last_model_request(store)

# --- an unavailable database

SECRET = "hush-hush-7"

def one_line(error: RakutenError) -> str:
    "The message of an error: one line, without the password."
    message = str(error)
    assert message and "\n" not in message and SECRET not in message and "Traceback" not in message
    return message

@pytest.mark.services
@needs_postgres
def test_a_wrong_password_is_reported_without_it(postgres_server: "Postgres") -> None:
    plain = f"postgresql://{postgres_server.user}:{SECRET}@127.0.0.1:{postgres_server.port}/postgres"
    for url in (postgres_server.url("postgres", SECRET), plain):
        with pytest.raises(StoreUnavailable) as e: open_store(url)
        assert "password authentication failed" in one_line(e.value)

@pytest.mark.services
@needs_postgres
def test_a_password_in_the_query_is_not_reported_either(postgres_server: "Postgres") -> None:
    query = f"user={postgres_server.user}&password={SECRET}"
    url = f"postgresql+psycopg://127.0.0.1:{postgres_server.port}/postgres?{query}"
    with pytest.raises(RakutenError) as e: open_store(url)
    one_line(e.value)

@pytest.mark.services
@needs_postgres
def test_a_missing_database_is_named(postgres_server: "Postgres") -> None:
    with pytest.raises(StoreUnavailable) as e: open_store(postgres_server.url("nowhere"))
    assert "nowhere" in one_line(e.value)

def test_a_server_that_does_not_run_is_named() -> None:
    with pytest.raises(StoreUnavailable) as e:
        open_store(f"postgresql+psycopg://rakuten:{SECRET}@127.0.0.1:{free_port()}/rakuten")
    assert "refused" in one_line(e.value) and "postgresql+psycopg://127.0.0.1" in str(e.value)

OTHER_URLS = [f"mysql://u:{SECRET}@h/d", f"oracle+nonsense://u:{SECRET}@h/d", f"rakuten:{SECRET}",
              "sqlite://", "sqlite:///:memory:", ""]

@pytest.mark.parametrize("url", OTHER_URLS)
def test_the_url_of_another_database_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InputError) as e: open_store(url)
    assert "RAKUTEN_DATABASE_URL" in one_line(e.value)

def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.sqlite").write_text("not a database, but as long as a page of one\n" * 100)
    with pytest.raises(StoreUnavailable) as e: open_store(f"sqlite:///{tmp_path}/store.sqlite")
    assert "not a database" in one_line(e.value)

@pytest.mark.services
@needs_postgres
def test_calls_fail_while_the_server_is_stopped_and_succeed_afterwards(postgres_server: "Postgres") -> None:
    store = open_store(postgres_server.new_database())
    add_user(store, "marie", HASH)
    tasks: list[Callable[[], Any]] = [lambda: find_user(store, "marie"), lambda: list_users(store),
                                      lambda: request_model(store, "root"), lambda: add_predictions(store, [row()])]
    with postgres_server.stopped():
        for task in tasks:
            with pytest.raises(StoreUnavailable) as e: task()
            assert postgres_server.password not in one_line(e.value)
    assert find_user(store, "marie") and request_model(store, "root") and request_ids(store) == []
    store.close()

# --- the prediction log

def test_the_prediction_log_waits_for_the_database(database: Database, store: Store) -> None:
    lost: list[int] = []
    log = PredictionLog(store, lost.append, every=0.05)
    log.add(row(0))
    assert wait_for_predictions(store, 1) == ["r0"]
    with database.unavailable():
        for n in range(1, 1201): # more than one batch
            log.add(row(n))
            if n % 400 == 0: time.sleep(0.3)
    assert wait_for_predictions(store, 1201) == [f"r{n}" for n in range(1201)] and not lost
    log.add(row(9999))
    log.close()
    assert len(request_ids(store)) == 1202 and not lost, "the queue is written when the log is closed"

def test_the_prediction_log_drops_the_oldest_and_reports_how_many(database: Database, store: Store) -> None:
    lost: list[int] = []
    with database.unavailable():
        log = PredictionLog(store, lost.append, every=3600, capacity=10)
        for n in range(25): log.add(row(n))
    log.close()
    assert request_ids(store) == [f"r{n}" for n in range(15, 25)] and sum(lost) == 15

def test_a_row_that_the_database_refuses_does_not_stop_the_prediction_log(store: Store) -> None:
    lost: list[int] = []
    log = PredictionLog(store, lost.append, every=0.5)
    for n, changes in enumerate([{}, {"product_id": None}, {}]): log.add(row(n, **changes))
    wait_for_predictions(store, 2, within=3)
    log.add(row(3))
    log.close()
    assert request_ids(store) == ["r0", "r2", "r3"] and lost == [1]
