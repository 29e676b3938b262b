"Files of products: sent, worked on by processes that die, fetched; and every way in which a file is refused."
import csv
import io
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pandas as pd
import pytest
import sqlalchemy as sa
from api_process import USERS, ApiProcess, memory_mb
from conftest import Run, needs_postgres

from rakuten_nb.store.jobs import add_job, claim_chunk, find_jobs, job_numbers, leftover_jobs, renew_claim
from rakuten_nb.store.database import add_user, change_user, job_results, jobs, open_store, predictions, utc_now

if TYPE_CHECKING:
    from servers import Postgres

HEADER = ",designation,description,productid,imageid\n"
MOST_ROWS, MOST_MB = 1000, 4
ENDED = ("succeeded", "failed", "cancelled")

@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], bundle: Path) -> Iterator[ApiProcess]:
    "A running API with a worker inside."
    limits = {"RAKUTEN_EMBEDDED_WORKER": "true", "RAKUTEN_MAX_JOB_ROWS": str(MOST_ROWS), "RAKUTEN_MAX_JOB_MB": str(MOST_MB)}
    with ApiProcess(env, tmp_path_factory.mktemp("jobs"), bundle, **limits) as running:
        running.add_users(**USERS)
        yield running

@pytest.fixture(scope="module")
def marie(api: ApiProcess) -> dict[str, str]:
    "The header of an ordinary user."
    return api.token("marie")

class JobWorker:
    "`rakuten-nb jobs worker` beside an API."
    def __init__(self, api: ApiProcess):
        command = [sys.executable, "-m", "rakuten_nb.cli", "jobs", "worker"]
        with (api.home / "worker.log").open("ab") as terminal:
            self.process = subprocess.Popen(command, env=api.env, cwd=api.home, stdout=terminal, stderr=terminal)

    def stop(self, number: int = signal.SIGTERM) -> int:
        "End it by a signal; its exit code."
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

@pytest.fixture
def workers() -> Iterator[list[JobWorker]]:
    "Those that a test started, ended with it."
    started: list[JobWorker] = []
    yield started
    for worker in started:
        if worker.process.poll() is None: worker.stop(signal.SIGKILL)

def send(api: ApiProcess, header: dict[str, str], content: bytes, name: str = "products.csv") -> httpx.Response:
    "Send a file."
    return api.client.post("/jobs", files={"file": (name, content)}, headers=header)

def accepted(answer: httpx.Response) -> str:
    "The id of a job that was taken."
    assert answer.status_code == 202, answer.text
    assert set(answer.json()) == {"id", "status"} and answer.json()["status"] == "queued"
    return str(answer.json()["id"])

def ended(api: ApiProcess, header: dict[str, str], job: str, within: float = 120) -> dict[str, Any]:
    "How a job stands when it has ended."
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        stands: dict[str, Any] = api.client.get(f"/jobs/{job}", headers=header).json()
        if stands["status"] in ENDED: return stands
        time.sleep(0.1)
    raise AssertionError(stands)

def until(what: Callable[[], object], within: float = 30) -> None:
    "Wait for something."
    deadline = time.monotonic() + within
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.05)

def problem(answer: httpx.Response, status: int) -> str:
    "The detail of an answer that says no."
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json" and answer.json()["request_id"] == answer.headers["x-request-id"]
    assert "\n" not in answer.json()["detail"] and "Traceback" not in answer.text
    return str(answer.json()["detail"])

def table(rows: int, title: str = "Piscine ronde {}") -> bytes:
    "A file of so many products."
    return (HEADER + "".join(f"{i},{title.format(i)},,{1000 + i},\n" for i in range(rows))).encode()

def zipped(members: dict[str, bytes]) -> bytes:
    "An archive."
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
        for name, raw in members.items(): z.writestr(name, raw)
    return out.getvalue()

def archive_of(catalog: Path) -> bytes:
    "A catalogue directory as somebody would send it."
    return zipped({p.relative_to(catalog).as_posix(): p.read_bytes() for p in sorted(catalog.rglob("*")) if p.is_file()})

def predicted(rakuten: Run, bundle: Path, catalog: Path) -> bytes:
    "What the command line says of a catalogue."
    out = catalog.parent / "predictions.csv"
    answer = rakuten("predict", bundle, catalog, "--out", out)
    assert answer.returncode == 0, answer.stderr
    return out.read_bytes()

def part_of(sample_catalog: Path, folder: Path, rows: int, pictures: bool) -> Path:
    "The first rows of the sample, with their pictures or without."
    folder.mkdir(parents=True)
    x = pd.read_csv(sample_catalog / "X_train_update.csv", dtype=str, keep_default_na=False, index_col=0).iloc[:rows]
    x.to_csv(folder / "X_train_update.csv", lineterminator="\n")
    if pictures:
        (folder / "image_train").mkdir()
        for image, product in zip(x["imageid"], x["productid"], strict=True):
            name = f"image_train/image_{image}_product_{product}.jpg"
            if (sample_catalog / name).exists(): shutil.copy(sample_catalog / name, folder / name)
    return folder

def left_on_disk(api: ApiProcess) -> list[str]:
    "The jobs that have a folder."
    return sorted(p.name for p in (api.home / "data/jobs").glob("*"))

# --- the same answers as everywhere else

def test_a_table_is_answered_as_the_command_line_answers_it(api: ApiProcess, marie: dict[str, str], sample_catalog: Path, bundle: Path,
                                                            rakuten: Run, tmp_path: Path) -> None:
    catalog = part_of(sample_catalog, tmp_path / "catalogue", 400, pictures=False)
    expected = predicted(rakuten, bundle, catalog)
    job = accepted(send(api, marie, (catalog / "X_train_update.csv").read_bytes()))
    stands = ended(api, marie, job)
    errors = sum(1 for row in csv.DictReader(io.StringIO(expected.decode())) if row["error"])
    assert (stands["status"], stands["rows"], stands["done"], stands["errors"], stands["user"]) == ("succeeded", 400, 400, errors, "marie")
    assert stands["created"] < stands["finished"] and errors
    answer = api.client.get(f"/jobs/{job}/predictions.csv", headers=marie)
    assert answer.content == expected and answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert (api.home / f"data/predictions/job-{job}.csv").read_bytes() == expected
    parquet = pd.read_parquet(io.BytesIO(api.client.get(f"/jobs/{job}/predictions.parquet", headers=marie).content))
    plain = pd.read_csv(io.BytesIO(expected), dtype=str, keep_default_na=False)
    assert parquet.columns.tolist() == plain.columns.tolist() and parquet["productid"].tolist() == plain["productid"].tolist()
    seen = plain["prdtypecode"] != ""
    assert parquet["prdtypecode"][seen].astype(int).tolist() == plain["prdtypecode"][seen].astype(int).tolist() and parquet["prdtypecode"][~seen].isna().all()
    assert parquet["confidence"][seen].tolist() == plain["confidence"][seen].astype(float).tolist()

def test_an_archive_is_answered_as_its_directory(api: ApiProcess, marie: dict[str, str], sample_catalog: Path, bundle: Path, rakuten: Run,
                                                 tmp_path: Path) -> None:
    catalog = part_of(sample_catalog, tmp_path / "catalogue", 60, pictures=True)
    pictures = sorted((catalog / "image_train").iterdir())
    pictures[0].write_bytes(pictures[0].read_bytes()[:-900])
    pictures[1].write_bytes(b"Bonjour")
    pictures[2].write_bytes(b"")
    pictures[3].unlink()
    x = pd.read_csv(catalog / "X_train_update.csv", dtype=str, keep_default_na=False, index_col=0)
    damaged = x["imageid"] == re.findall(r"\d+", pictures[1].name)[0]
    x.loc[damaged, ["designation", "description"]] = "" # nothing is left to see
    x.to_csv(catalog / "X_train_update.csv", lineterminator="\n")
    expected = predicted(rakuten, bundle, catalog)
    job = accepted(send(api, marie, archive_of(catalog), "catalogue.zip"))
    assert ended(api, marie, job)["status"] == "succeeded"
    assert api.client.get(f"/jobs/{job}/predictions.csv", headers=marie).content == expected
    assert b"picture: not a JPEG, PNG or WebP" in expected and b"image:" in expected
    folder = api.home / "data/jobs" / job
    until(lambda: sorted(p.name for p in folder.iterdir()) == ["predictions.csv", "predictions.parquet"])

def test_what_is_wrong_with_a_row_is_in_its_line(api: ApiProcess, marie: dict[str, str]) -> None:
    content = 'description,designation\n,=HYPERLINK("http://x")\n,\n,' + "x" * 300_000 + "\n,+33\n,🎁 \"\"<b>\n"
    job = accepted(send(api, marie, content.encode()))
    assert ended(api, marie, job)["errors"] == 2
    text = api.client.get(f"/jobs/{job}/predictions.csv", headers=marie).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [bool(r["prdtypecode"]) for r in rows] == [True, False, False, True, True]
    assert "neither title nor picture" in rows[1]["error"] and "at most 262,144 bytes together; found 300,000" in rows[2]["error"]
    assert all(not cell.startswith(("=", "+", "-", "@")) for row in csv.reader(io.StringIO(text)) for cell in row) and "HYPERLINK" not in text

# --- what is refused

def claiming(size: int) -> bytes:
    "An archive whose table claims to have so many bytes, in numbers of 64 bits."
    raw = bytearray(zipped({"x.csv": table(3)}))
    at = raw.index(b"PK\x01\x02")
    extra = struct.pack("<HHQ", 1, 8, size)
    struct.pack_into("<I", raw, at + 24, 0xFFFFFFFF)
    struct.pack_into("<H", raw, at + 30, len(extra))
    raw[at + 46 + 5 : at + 46 + 5] = extra
    end = raw.index(b"PK\x05\x06")
    struct.pack_into("<I", raw, end + 12, end - at)
    return bytes(raw)

def encrypted() -> bytes:
    "An archive with a password, by its own account."
    raw = bytearray(zipped({"x.csv": table(3)}))
    for sign, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)): raw[raw.index(sign) + at] |= 1
    return bytes(raw)

def corrupt() -> bytes:
    "An archive whose table is not what it was."
    raw = bytearray(zipped({"x.csv": table(300)}))
    raw[60:80] = bytes(20)
    return bytes(raw)

CSV = table(3)
REFUSED: dict[str, tuple[int, str, Callable[[], bytes]]] = {
    "nothing": (422, "it is empty", lambda: b""),
    "no row": (422, "no row", HEADER.encode),
    "other columns": (422, "'designation' is missing", lambda: b",title,description\n0,a,b\n"),
    "a column twice": (422, "given twice", lambda: b"designation,description,designation\n0,a,b\n"),
    "semicolons": (422, "semicolons", lambda: b"designation;description\na;b\n"),
    "Latin-1": (422, "line 3 is not", lambda: HEADER.encode() + b"0,a,b,1,2\n" + "1,été,,1,2\n".encode("latin-1")),
    "UTF-16": (422, "expected UTF-8", lambda: CSV.decode().encode("utf-16")),
    "a short row": (422, "line 3: expected 5 fields", lambda: HEADER.encode() + b"0,a,b,1,2\n1,a,b\n"),
    "a quotation mark": (422, "not CSV", lambda: HEADER.encode() + b'0,"a" b,c,1,2\n'),
    "an id that is a path": (422, "row 1, field productid", lambda: HEADER.encode() + b"0,a,b,../../etc/passwd,2\n"),
    "an id that is a formula": (422, "row 1, field imageid", lambda: HEADER.encode() + b"0,a,b,1,=1+1\n"),
    "a row too many": (413, f"at most {MOST_ROWS:,} rows", lambda: table(MOST_ROWS + 1)),
    "too large": (413, "4 MiB", lambda: b"x" * (MOST_MB * 2**20 + 10**6)),
    "an archive without an end": (422, "its end is missing", lambda: zipped({"x.csv": CSV})[:-30]),
    "a corrupt archive": (422, "damaged in the archive", corrupt),
    "a protected archive": (422, "password", encrypted),
    "a path in an archive": (422, "points elsewhere", lambda: zipped({"x.csv": CSV, "../image_1_product_1.jpg": b""})),
    "an absolute path in an archive": (422, "points elsewhere", lambda: zipped({"/etc/cron.d/x.csv": CSV})),
    "two tables": (422, "expected one CSV file in it; found 'x.csv' and 'y.csv'", lambda: zipped({"x.csv": CSV, "y.csv": CSV})),
    "no table": (422, "found none", lambda: zipped({"image_1_product_1.jpg": b""})),
    "an archive that claims 10 GB": (413, "it claims 10,000,000,000", lambda: claiming(10**10)),
    "a bomb": (413, "expected at most 4,194,304 bytes", lambda: zipped({"x.csv": CSV + b"\n" * 10**8})),
    "a row too many in an archive": (413, "rows", lambda: zipped({"x.csv": table(MOST_ROWS + 1)})),
}

@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_file_is_a_problem_document_and_leaves_nothing(what: str, api: ApiProcess, marie: dict[str, str]) -> None:
    status, word, make = REFUSED[what]
    before = left_on_disk(api)
    detail = problem(send(api, marie, make()), status)
    assert word in detail and str(api.home) not in detail
    assert left_on_disk(api) == before, "nothing of it is kept"

def test_as_many_rows_as_are_allowed_are_taken(api: ApiProcess, marie: dict[str, str]) -> None:
    job = accepted(send(api, marie, table(MOST_ROWS)))
    assert api.client.delete(f"/jobs/{job}", headers=marie).status_code == 204

CUT_OFF = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + CSV
FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "JSON": (415, {"json": {}}), "a bare table": (415, {"content": CSV, "headers": {"Content-Type": "text/csv"}}),
    "another field": (422, {"files": {"table": ("x.csv", CSV)}}), "plain text": (422, {"files": {"file": (None, CSV)}}),
    "two files": (422, {"files": [("file", ("x.csv", CSV)), ("file", ("y.csv", CSV))]}),
    "cut off": (400, {"content": CUT_OFF, "headers": {"Content-Type": "multipart/form-data; boundary=b"}}),
}

@pytest.mark.parametrize("what", FORMS)
def test_a_bad_form_is_a_problem_document_and_leaves_nothing(what: str, api: ApiProcess, marie: dict[str, str]) -> None:
    status, options = FORMS[what]
    before = left_on_disk(api)
    problem(api.client.post("/jobs", **options | {"headers": options.get("headers", {}) | marie}), status)
    assert left_on_disk(api) == before

def test_what_claims_to_be_large_is_refused_unread_and_what_is_large_in_little_memory(api: ApiProcess, marie: dict[str, str]) -> None:
    assert api.process
    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(2000): yield b"x" * 65536
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    before, peak = left_on_disk(api), memory_mb(api.process.pid)
    with socket.create_connection(("127.0.0.1", api.port), timeout=5) as line: # no client library would send so little of so much
        head = {"Host": "x", **marie, **form, "Content-Length": "10000000000"}
        line.sendall(("POST /jobs HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in head.items()) + "\r\n--b\r\n").encode())
        assert line.recv(1000).startswith(b"HTTP/1.1 413 ")
    for _ in range(3): problem(api.client.post("/jobs", content=endless(), headers=marie | form), 413)
    assert memory_mb(api.process.pid) - peak < 50 and left_on_disk(api) == before

def test_a_full_disk_is_said_and_leaves_nothing(api: ApiProcess, marie: dict[str, str]) -> None:
    assert api.process
    before, limit = left_on_disk(api), resource.prlimit(api.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(api.process.pid, resource.RLIMIT_FSIZE, (2**20, limit[1])) # as much as the disk will take of a file
    try: answer = send(api, marie, b"x" * 3 * 2**20)
    finally: resource.prlimit(api.process.pid, resource.RLIMIT_FSIZE, limit)
    assert "cannot be kept" in problem(answer, 503) and answer.headers["retry-after"] and left_on_disk(api) == before
    assert ended(api, marie, accepted(send(api, marie, CSV)))["status"] == "succeeded", "and it goes on afterwards"

# --- who may do what

def test_a_job_is_its_users_and_the_admins(api: ApiProcess, marie: dict[str, str]) -> None:
    job, rose, root = accepted(send(api, marie, CSV)), api.token("rose"), api.token("root")
    ended(api, marie, job)
    for path in (f"/jobs/{job}", f"/jobs/{job}/predictions.csv", f"/jobs/{job}/predictions.parquet"):
        problem(api.client.get(path, headers=rose), 404)
        problem(api.client.get(path), 401)
        assert api.client.get(path, headers=root).status_code == api.client.get(path, headers=marie).status_code == 200
    problem(api.client.delete(f"/jobs/{job}", headers=rose), 404)
    assert api.client.get("/jobs", headers=rose).json() == {"jobs": []}
    for header in (marie, root): assert job in [j["id"] for j in api.client.get("/jobs", headers=header).json()["jobs"]]
    narrow = api.token("marie", scope="predict")
    for answer in (api.client.get(f"/jobs/{job}", headers=narrow), api.client.get("/jobs", headers=narrow), send(api, narrow, CSV)): problem(answer, 403)
    problem(send(api, {}, CSV), 401)

@pytest.mark.parametrize("job", ["0" * 32, "1", "..%2F..%2Fetc%2Fpasswd", "..%5Cx", "%00", "é" * 32, "A" * 32, "0" * 32 + "%0A", "' OR 1=1 --"])
def test_there_is_no_other_job(job: str, api: ApiProcess, marie: dict[str, str]) -> None:
    time.sleep(0.2) # three questions each, of twenty a second
    for path in (f"/jobs/{job}", f"/jobs/{job}/predictions.csv", f"/jobs/{job}/predictions.parquet"): problem(api.client.get(path, headers=marie), 404)
    problem(api.client.delete(f"/jobs/{job}", headers=marie), 404)

def test_questions_are_limited_by_user(api: ApiProcess) -> None:
    rose, root = api.token("rose"), api.token("root")
    answers: list[httpx.Response] = []
    def ask() -> None:
        with httpx.Client(base_url=api.url) as client: answers.extend(client.get("/jobs", headers=rose) for _ in range(12))
    crowd = [threading.Thread(target=ask) for _ in range(4)]
    for t in crowd: t.start()
    for t in crowd: t.join()
    held = [a for a in answers if a.status_code != 200]
    assert held and len(answers) - len(held) >= 20
    for answer in held: assert "20 per 1 second" in problem(answer, 429) and int(answer.headers["retry-after"]) == 1
    assert api.client.get("/jobs", headers=root).status_code == 200

# --- how it ends

def test_a_job_that_waits_is_cancelled_and_one_that_has_ended_removed(own_api: ApiProcess, workers: list[JobWorker]) -> None:
    own_api.start().add_users(marie="user", paul="user")
    marie, paul = own_api.token("marie"), own_api.token("paul")
    cancelled, wanted, stopped = (accepted(send(own_api, who, table(250))) for who in (marie, marie, paul))
    assert "queued" in problem(own_api.client.get(f"/jobs/{wanted}/predictions.csv", headers=marie), 404)
    assert own_api.client.delete(f"/jobs/{cancelled}", headers=marie).status_code == 204
    stands = own_api.client.get(f"/jobs/{cancelled}", headers=marie).json()
    assert (stands["status"], stands["done"], stands["message"]) == ("cancelled", 0, "by marie") and stands["finished"]
    assert left_on_disk(own_api) == sorted([wanted, stopped])
    store = own_api.store()
    change_user(store, "paul", disabled=True)
    workers.append(JobWorker(own_api))
    assert ended(own_api, marie, wanted)["status"] == "succeeded"
    assert "cancelled" in problem(own_api.client.get(f"/jobs/{cancelled}/predictions.csv", headers=marie), 404)
    (found,) = find_jobs(store, job=stopped)
    assert (found.status, found.done, found.message) == ("cancelled", 0, "its user is disabled"), "by the rule: who is disabled has no work done"
    until(lambda: left_on_disk(own_api) == [wanted])
    text = own_api.client.get("/metrics").text
    for line in ('rakuten_jobs{status="succeeded"} 1.0', 'rakuten_jobs{status="cancelled"} 2.0', 'rakuten_job_rows_total{state="answered"} 250.0'):
        assert line in text
    assert own_api.client.delete(f"/jobs/{wanted}", headers=marie).status_code == 204
    assert left_on_disk(own_api) == [] and not list((own_api.home / "data/predictions").iterdir())
    problem(own_api.client.get(f"/jobs/{wanted}", headers=marie), 404)
    assert workers[0].stop() == 0 and "Traceback" not in (own_api.home / "worker.log").read_text()
    store.close()

def test_a_job_expires(own_api: ApiProcess) -> None:
    own_api.env |= {"RAKUTEN_EMBEDDED_WORKER": "true", "RAKUTEN_JOB_KEEP_DAYS": "2"}
    own_api.start().add_users(marie="user")
    marie = own_api.token()
    old, new = accepted(send(own_api, marie, CSV)), accepted(send(own_api, marie, CSV))
    for job in (old, new): ended(own_api, marie, job)
    store = own_api.store()
    with store.writing() as c: c.execute(jobs.update().where(jobs.c.id == old).values(finished=utc_now() - timedelta(days=2, seconds=1)))
    own_api.stop()
    own_api.start() # a worker looks when it starts, and every minute
    until(lambda: left_on_disk(own_api) == [new])
    until(lambda: [j.id for j in find_jobs(store)] == [new])
    assert [p.name for p in sorted((own_api.home / "data/predictions").iterdir())] == [f"job-{new}.csv", f"job-{new}.parquet"]
    store.close()

# --- whoever dies

KILLS = 2
how_many = pytest.mark.parametrize("rows", [pytest.param(3000, marks=pytest.mark.services), pytest.param(20_000, marks=pytest.mark.heavy)])

def kill(*processes: "subprocess.Popen[bytes] | None") -> None:
    "End processes without a word."
    for p in processes:
        if p: p.send_signal(signal.SIGKILL)
    for p in processes:
        if p: p.wait(timeout=60)

def many_products(sample_catalog: Path, folder: Path, rows: int) -> Path:
    "A catalogue of so many products, no two of them the same."
    folder.mkdir()
    x = pd.read_csv(sample_catalog / "X_train_update.csv", dtype=str, keep_default_na=False, index_col=0)
    x = pd.concat([x] * (rows // len(x) + 1), ignore_index=True).iloc[:rows]
    x["designation"] += [f" n° {i}" for i in range(rows)]
    x["productid"], x["imageid"] = [str(10**9 + 7 * i) for i in range(rows)], ""
    x.to_csv(folder / "X_train_update.csv", lineterminator="\n")
    return folder

def killed_and_restarted(api: ApiProcess, crew: int, workers: list[JobWorker], catalog: Path, rows: int) -> bytes:
    "The answers to a job whose API and workers are killed while they work on it, twice."
    api.start().add_users(marie="user")
    store = api.store()
    job = accepted(send(api, api.token(), (catalog / "X_train_update.csv").read_bytes()))
    stands, seen = lambda: find_jobs(store, job=job)[0], [0]
    for _ in range(KILLS):
        workers += (started := [JobWorker(api) for _ in range(crew)])
        deadline = time.monotonic() + 120
        while stands().done <= seen[-1] and time.monotonic() < deadline: time.sleep(0.005)
        kill(api.process, *(w.process for w in started))
        seen.append(stands().done)
        assert seen[-2] < seen[-1] < rows and stands().status == "running", "killed in the middle"
        with store.reading() as c: assert c.execute(sa.select(sa.func.count()).select_from(job_results)).scalar() == seen[-1]
        api.start()
    workers += [JobWorker(api) for _ in range(crew)]
    header = api.token()
    found = ended(api, header, job)
    print(f"killed at {seen[1:]} of {rows}; {found['finished']}")
    assert (found["status"], found["done"], found["rows"]) == ("succeeded", rows, rows), found
    until(lambda: not leftover_jobs(store))
    assert job_numbers(store)[1] == {"answered": rows - found["errors"], "error": found["errors"]}, "each row was counted once"
    with store.reading() as c: logged = c.execute(sa.select(predictions.c.request_id).order_by(predictions.c.id)).scalars().all()
    assert len(logged) == len(set(logged)) == rows - found["errors"], "and is once in the log of predictions"
    store.close()
    return api.client.get(f"/jobs/{job}/predictions.csv", headers=header).content

@how_many
def test_every_row_is_answered_once_whoever_is_killed(own_api: ApiProcess, workers: list[JobWorker], sample_catalog: Path, bundle: Path, rakuten: Run,
                                                      tmp_path: Path, rows: int) -> None:
    catalog = many_products(sample_catalog, tmp_path / "catalogue", rows)
    assert killed_and_restarted(own_api, 1, workers, catalog, rows) == predicted(rakuten, bundle, catalog)

@how_many
@needs_postgres
def test_every_row_is_answered_once_by_two_workers_on_postgresql(own_api: ApiProcess, workers: list[JobWorker], sample_catalog: Path, bundle: Path,
                                                                 rakuten: Run, tmp_path: Path, postgres: str, rows: int) -> None:
    own_api.env["RAKUTEN_DATABASE_URL"] = postgres
    catalog = many_products(sample_catalog, tmp_path / "catalogue", rows)
    assert killed_and_restarted(own_api, 2, workers, catalog, rows) == predicted(rakuten, bundle, catalog)

@pytest.mark.services
@needs_postgres
def test_a_worker_outlasts_its_database(own_api: ApiProcess, workers: list[JobWorker], sample_catalog: Path, tmp_path: Path,
                                        postgres_server: "Postgres") -> None:
    own_api.env |= {"RAKUTEN_DATABASE_URL": postgres_server.new_database()}
    own_api.start().add_users(marie="user")
    header = own_api.token()
    job = accepted(send(own_api, header, (many_products(sample_catalog, tmp_path / "c", 2000) / "X_train_update.csv").read_bytes()))
    workers.append(JobWorker(own_api))
    store = own_api.store()
    until(lambda: find_jobs(store, job=job)[0].done > 0, 60)
    with postgres_server.stopped(): time.sleep(2)
    with suppress(KeyError): ended(own_api, header, job)
    found = ended(own_api, header, job)
    assert (found["status"], found["done"]) == ("succeeded", 2000) and workers[0].process.poll() is None
    assert workers[0].stop(signal.SIGINT) == 0
    store.close()

@pytest.mark.services
@needs_postgres
def test_claims_go_by_the_databases_clock(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(postgres)
    add_user(store, "marie", "x" * 60)
    add_job(store, "a" * 32, "marie", [3])
    claim = claim_chunk(store, "one machine")
    for hours in (-2, 2):
        for module in ("store", "jobs"): monkeypatch.setattr(f"rakuten_nb.serving.{module}.utc_now", lambda hours=hours: utc_now() + timedelta(hours=hours))
        assert claim and claim_chunk(store, "another, whose clock is wrong") is None and renew_claim(store, claim)
    store.close()
