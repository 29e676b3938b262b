"Jobs over HTTP: uploads that succeed or are refused, access, the end of a job, and workers that are killed."
import csv
import io
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
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
from api_process import USERS, ApiProcess, JobWorker, memory_mb
from conftest import Run, needs_postgres

from rakuten_nb.store.database import job_results, jobs, open_store, predictions, utc_now
from rakuten_nb.store.jobs import add_job, claim_chunk, find_jobs, job_counts, leftover_jobs, renew_claim
from rakuten_nb.store.users import add_user, change_user

if TYPE_CHECKING:
    from servers import Postgres

HEADER = ",designation,description,productid,imageid\n"
MAX_ROWS, MAX_MB = 1000, 4
ENDED = ("succeeded", "failed", "cancelled")
Header = dict[str, str]

@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], bundle: Path) -> Iterator[ApiProcess]:
    "A running API with an embedded worker and small limits."
    settings = {"RAKUTEN_EMBEDDED_WORKER": "true", "RAKUTEN_MAX_JOB_ROWS": str(MAX_ROWS),
                "RAKUTEN_MAX_JOB_MB": str(MAX_MB)}
    with ApiProcess(env, tmp_path_factory.mktemp("jobs"), bundle, **settings) as running:
        running.add_users(**USERS)
        yield running

@pytest.fixture(scope="module")
def marie(api: ApiProcess) -> Header:
    "The authorization header of a user without special rights."
    return api.token("marie")

@pytest.fixture
def workers() -> Iterator[list[JobWorker]]:
    "Workers that a test starts; the fixture kills those that still run."
    started: list[JobWorker] = []
    yield started
    for worker in started:
        if worker.process.poll() is None: worker.stop(signal.SIGKILL)

def send(api: ApiProcess, header: Header, content: bytes, name: str = "products.csv") -> httpx.Response:
    "Upload a file."
    return api.client.post("/jobs", files={"file": (name, content)}, headers=header)

def accepted(response: httpx.Response) -> str:
    "The id of the job that an upload created."
    assert response.status_code == 202, response.text
    assert set(response.json()) == {"id", "status"} and response.json()["status"] == "queued"
    return str(response.json()["id"])

def ended(api: ApiProcess, header: Header, job: str, within: float = 120) -> dict[str, Any]:
    "The state of a job once it has ended."
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        state: dict[str, Any] = api.client.get(f"/jobs/{job}", headers=header).json()
        if state["status"] in ENDED: return state
        time.sleep(0.1)
    raise AssertionError(state)

def until(condition: Callable[[], object], within: float = 30) -> None:
    "Wait until a condition is true."
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)

def problem(response: httpx.Response, status: int) -> str:
    "The detail of a problem document with this status."
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["request_id"] == response.headers["x-request-id"]
    assert "\n" not in response.json()["detail"] and "Traceback" not in response.text
    return str(response.json()["detail"])

def table(rows: int, title: str = "Piscine ronde {}") -> bytes:
    "A CSV file with this number of products."
    return (HEADER + "".join(f"{i},{title.format(i)},,{1000 + i},\n" for i in range(rows))).encode()

def zipped(members: dict[str, bytes]) -> bytes:
    "A ZIP archive."
    with zipfile.ZipFile(out := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
        for name, raw in members.items(): z.writestr(name, raw)
    return out.getvalue()

def archive_of(catalog: Path) -> bytes:
    "A catalogue directory as a ZIP archive."
    files = (p for p in sorted(catalog.rglob("*")) if p.is_file())
    return zipped({p.relative_to(catalog).as_posix(): p.read_bytes() for p in files})

def predicted(rakuten: Run, bundle: Path, catalog: Path) -> bytes:
    "The predictions of the command line for a catalogue."
    out = catalog.parent / "predictions.csv"
    run = rakuten("predict", bundle, catalog, "--out", out)
    assert run.returncode == 0, run.stderr
    return out.read_bytes()

def read_texts(table: Path) -> pd.DataFrame:
    "A table of products with all values as text."
    return pd.read_csv(table, dtype=str, keep_default_na=False, index_col=0)

def part_of(sample_catalog: Path, folder: Path, rows: int, pictures: bool) -> Path:
    "The first rows of the sample, with or without their pictures."
    folder.mkdir(parents=True)
    x = read_texts(sample_catalog / "X_train_update.csv").iloc[:rows]
    x.to_csv(folder / "X_train_update.csv", lineterminator="\n")
    if not pictures: return folder
    (folder / "image_train").mkdir()
    for image, product in zip(x["imageid"], x["productid"], strict=True):
        name = f"image_train/image_{image}_product_{product}.jpg"
        if (sample_catalog / name).exists(): shutil.copy(sample_catalog / name, folder / name)
    return folder

def job_folders(api: ApiProcess) -> list[str]:
    "The jobs that have a folder on the disk."
    return sorted(p.name for p in (api.home / "data/jobs").glob("*"))

# --- the same predictions as the command line

def test_a_table_gets_the_predictions_of_the_command_line(api: ApiProcess, marie: Header, sample_catalog: Path,
                                                          bundle: Path, rakuten: Run, tmp_path: Path) -> None:
    catalog = part_of(sample_catalog, tmp_path / "catalogue", 400, pictures=False)
    expected = predicted(rakuten, bundle, catalog)
    job = accepted(send(api, marie, (catalog / "X_train_update.csv").read_bytes()))
    state = ended(api, marie, job)
    errors = sum(1 for row in csv.DictReader(io.StringIO(expected.decode())) if row["error"])
    assert (state["status"], state["rows"], state["done"]) == ("succeeded", 400, 400)
    assert (state["errors"], state["user"]) == (errors, "marie")
    assert state["created"] < state["finished"] and errors
    response = api.client.get(f"/jobs/{job}/predictions.csv", headers=marie)
    assert response.content == expected and response.headers["content-type"] == "text/csv; charset=utf-8"
    assert (api.home / f"data/predictions/job-{job}.csv").read_bytes() == expected
    parquet = api.client.get(f"/jobs/{job}/predictions.parquet", headers=marie).content
    texts = pd.read_csv(io.BytesIO(expected), dtype=str, keep_default_na=False)
    check_parquet(pd.read_parquet(io.BytesIO(parquet)), texts)

def check_parquet(parquet: pd.DataFrame, texts: pd.DataFrame) -> None:
    "The Parquet file has the values of the CSV file, with numbers as numbers."
    assert parquet.columns.tolist() == texts.columns.tolist()
    assert parquet["productid"].tolist() == texts["productid"].tolist()
    answered = texts["prdtypecode"] != ""
    for column, kind in (("prdtypecode", int), ("confidence", float)):
        assert parquet[column][answered].astype(kind).tolist() == texts[column][answered].astype(kind).tolist()
    assert parquet["prdtypecode"][~answered].isna().all()

def test_an_archive_gets_the_predictions_of_its_directory(api: ApiProcess, marie: Header, sample_catalog: Path,
                                                          bundle: Path, rakuten: Run, tmp_path: Path) -> None:
    catalog = part_of(sample_catalog, tmp_path / "catalogue", 60, pictures=True)
    pictures = sorted((catalog / "image_train").iterdir())
    pictures[0].write_bytes(pictures[0].read_bytes()[:-900])
    pictures[1].write_bytes(b"Bonjour")
    pictures[2].write_bytes(b"")
    pictures[3].unlink()
    x = read_texts(catalog / "X_train_update.csv")
    damaged = x["imageid"] == re.findall(r"\d+", pictures[1].name)[0]
    x.loc[damaged, ["designation", "description"]] = "" # no text and no readable picture
    x.to_csv(catalog / "X_train_update.csv", lineterminator="\n")
    expected = predicted(rakuten, bundle, catalog)
    job = accepted(send(api, marie, archive_of(catalog), "catalogue.zip"))
    assert ended(api, marie, job)["status"] == "succeeded"
    assert api.client.get(f"/jobs/{job}/predictions.csv", headers=marie).content == expected
    assert b"picture: not a JPEG, PNG or WebP" in expected and b"image:" in expected
    folder = api.home / "data/jobs" / job
    files = ["pictures.json", "predictions.csv", "predictions.parquet"]
    until(lambda: sorted(p.name for p in folder.iterdir()) == files)

def test_the_line_of_a_faulty_row_names_the_error(api: ApiProcess, marie: Header) -> None:
    content = 'description,designation\n,=HYPERLINK("http://x")\n,\n,' + "x" * 300_000 + "\n,+33\n,🎁 \"\"<b>\n"
    job = accepted(send(api, marie, content.encode()))
    assert ended(api, marie, job)["errors"] == 2
    text = api.client.get(f"/jobs/{job}/predictions.csv", headers=marie).text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [bool(r["prdtypecode"]) for r in rows] == [True, False, False, True, True]
    assert "neither title nor picture" in rows[1]["error"]
    assert "at most 262,144 bytes together; found 300,000" in rows[2]["error"]
    cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
    assert all(not cell.startswith(("=", "+", "-", "@")) for cell in cells) and "HYPERLINK" not in text

# --- refused files

def claiming(size: int) -> bytes:
    "An archive whose member list claims a size for the table, as a 64-bit number."
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
    "An archive that is marked as encrypted."
    raw = bytearray(zipped({"x.csv": table(3)}))
    for sign, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)): raw[raw.index(sign) + at] |= 1
    return bytes(raw)

def corrupt() -> bytes:
    "An archive whose table is damaged."
    raw = bytearray(zipped({"x.csv": table(300)}))
    raw[60:80] = bytes(20)
    return bytes(raw)

CSV = table(3)
LATIN = "1,été,,1,2\n".encode("latin-1")
PICTURE = "image_1_product_1.jpg"
REFUSED: dict[str, tuple[int, str, Callable[[], bytes]]] = {
    "empty file": (422, "it is empty", lambda: b""),
    "no row": (422, "no row", HEADER.encode),
    "other columns": (422, "'designation' is missing", lambda: b",title,description\n0,a,b\n"),
    "a column twice": (422, "given twice", lambda: b"designation,description,designation\n0,a,b\n"),
    "semicolons": (422, "semicolons", lambda: b"designation;description\na;b\n"),
    "Latin-1": (422, "line 3 is not", lambda: HEADER.encode() + b"0,a,b,1,2\n" + LATIN),
    "UTF-16": (422, "found UTF-16", lambda: CSV.decode().encode("utf-16")),
    "a short row": (422, "line 3: expected 5 fields", lambda: HEADER.encode() + b"0,a,b,1,2\n1,a,b\n"),
    "a quotation mark": (422, "not CSV", lambda: HEADER.encode() + b'0,"a" b,c,1,2\n'),
    "an id that is a path": (422, "row 1, field productid", lambda: HEADER.encode() + b"0,a,b,../../etc/passwd,2\n"),
    "an id that is a formula": (422, "row 1, field imageid", lambda: HEADER.encode() + b"0,a,b,1,=1+1\n"),
    "a row too many": (413, f"at most {MAX_ROWS:,} rows", lambda: table(MAX_ROWS + 1)),
    "too large": (413, "4 MiB", lambda: b"x" * (MAX_MB * 2**20 + 10**6)),
    "an archive without an end": (422, "its end is missing", lambda: zipped({"x.csv": CSV})[:-30]),
    "a corrupt archive": (422, "damaged in the archive", corrupt),
    "an encrypted archive": (422, "password", encrypted),
    "a path in an archive": (422, "points elsewhere", lambda: zipped({"x.csv": CSV, f"../{PICTURE}": b""})),
    "an absolute path": (422, "points elsewhere", lambda: zipped({"/etc/cron.d/x.csv": CSV})),
    "two tables": (422, "expected one CSV file in it; found 'x.csv' and 'y.csv'",
                   lambda: zipped({"x.csv": CSV, "y.csv": CSV})),
    "no table": (422, "found none", lambda: zipped({PICTURE: b""})),
    "an archive that claims 10 GB": (413, "it claims 10,000,000,000", lambda: claiming(10**10)),
    "a bomb": (413, "expected at most 4,194,304 bytes", lambda: zipped({"x.csv": CSV + b"\n" * 10**7})),
    "a row too many in an archive": (413, "rows", lambda: zipped({"x.csv": table(MAX_ROWS + 1)})),
}

@pytest.mark.parametrize("what", REFUSED)
def test_a_faulty_file_is_refused_and_deleted(what: str, api: ApiProcess, marie: Header) -> None:
    status, text, make = REFUSED[what]
    before = job_folders(api)
    detail = problem(send(api, marie, make()), status)
    assert text in detail and str(api.home) not in detail
    assert job_folders(api) == before, "the upload is deleted"

def test_the_largest_allowed_number_of_rows_is_accepted(api: ApiProcess, marie: Header) -> None:
    job = accepted(send(api, marie, table(MAX_ROWS)))
    assert api.client.delete(f"/jobs/{job}", headers=marie).status_code == 204

FORM = {"Content-Type": "multipart/form-data; boundary=b"}
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
FORMS: dict[str, tuple[int, dict[str, Any]]] = {
    "JSON": (415, {"json": {}}),
    "a CSV file as the body": (415, {"content": CSV, "headers": {"Content-Type": "text/csv"}}),
    "another field": (422, {"files": {"table": ("x.csv", CSV)}}),
    "plain text": (422, {"files": {"file": (None, CSV)}}),
    "two files": (422, {"files": [("file", ("x.csv", CSV)), ("file", ("y.csv", CSV))]}),
    "cut off": (400, {"content": PART + CSV, "headers": FORM}),
}

@pytest.mark.parametrize("what", FORMS)
def test_a_faulty_form_is_refused_and_deleted(what: str, api: ApiProcess, marie: Header) -> None:
    status, options = FORMS[what]
    before = job_folders(api)
    problem(api.client.post("/jobs", **options | {"headers": options.get("headers", {}) | marie}), status)
    assert job_folders(api) == before

def test_a_large_upload_is_refused_in_little_memory(api: ApiProcess, marie: Header) -> None:
    assert api.process
    def endless() -> Iterator[bytes]:
        yield PART
        for _ in range(2000): yield b"x" * 65536
    before, peak = job_folders(api), memory_mb(api.process.pid)
    head = {"Host": "x", **marie, **FORM, "Content-Length": "10000000000"}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    with socket.create_connection(("127.0.0.1", api.port), timeout=5) as connection: # sends less than it announces
        connection.sendall(f"POST /jobs HTTP/1.1\r\n{lines}\r\n--b\r\n".encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    for _ in range(3): problem(api.client.post("/jobs", content=endless(), headers=marie | FORM), 413)
    assert memory_mb(api.process.pid) - peak < 50 and job_folders(api) == before

def test_a_full_disk_is_reported_and_the_upload_deleted(api: ApiProcess, marie: Header) -> None:
    assert api.process
    before, limit = job_folders(api), resource.prlimit(api.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(api.process.pid, resource.RLIMIT_FSIZE, (2**20, limit[1])) # largest file that may be written
    try: response = send(api, marie, b"x" * 3 * 2**20)
    finally: resource.prlimit(api.process.pid, resource.RLIMIT_FSIZE, limit)
    assert "cannot be stored" in problem(response, 503) and response.headers["retry-after"]
    assert job_folders(api) == before
    state = ended(api, marie, accepted(send(api, marie, CSV)))
    assert state["status"] == "succeeded", "the service continues"

# --- access

def test_a_job_is_visible_to_its_owner_and_to_admins(api: ApiProcess, marie: Header) -> None:
    job, rose, root = accepted(send(api, marie, CSV)), api.token("rose"), api.token("root")
    ended(api, marie, job)
    for path in (f"/jobs/{job}", f"/jobs/{job}/predictions.csv", f"/jobs/{job}/predictions.parquet"):
        problem(api.client.get(path, headers=rose), 404)
        problem(api.client.get(path), 401)
        for header in (root, marie): assert api.client.get(path, headers=header).status_code == 200
    problem(api.client.delete(f"/jobs/{job}", headers=rose), 404)
    assert api.client.get("/jobs", headers=rose).json() == {"jobs": []}
    for header in (marie, root):
        assert job in [j["id"] for j in api.client.get("/jobs", headers=header).json()["jobs"]]

def test_jobs_need_the_scope_jobs(api: ApiProcess) -> None:
    narrow, unknown = api.token("marie", scope="predict"), "0" * 32
    for path in (f"/jobs/{unknown}", "/jobs"): problem(api.client.get(path, headers=narrow), 403)
    problem(send(api, narrow, CSV), 403)
    problem(send(api, {}, CSV), 401)

UNKNOWN = ["0" * 32, "1", "..%2F..%2Fetc%2Fpasswd", "..%5Cx", "%00", "é" * 32, "A" * 32, "0" * 32 + "%0A",
           "' OR 1=1 --"]

@pytest.mark.parametrize("job", UNKNOWN)
def test_an_unknown_id_is_not_found(job: str, api: ApiProcess, marie: Header) -> None:
    time.sleep(0.2) # each case sends three of the twenty requests that are allowed in a second
    for path in (f"/jobs/{job}", f"/jobs/{job}/predictions.csv", f"/jobs/{job}/predictions.parquet"):
        problem(api.client.get(path, headers=marie), 404)
    problem(api.client.delete(f"/jobs/{job}", headers=marie), 404)

def test_requests_about_jobs_are_limited_per_user(api: ApiProcess) -> None:
    rose, root = api.token("rose"), api.token("root")
    responses: list[httpx.Response] = []
    def ask() -> None:
        with httpx.Client(base_url=api.url) as client:
            responses.extend(client.get("/jobs", headers=rose) for _ in range(12))
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    refused = [r for r in responses if r.status_code != 200]
    assert refused and len(responses) - len(refused) >= 20
    for response in refused:
        assert "20 per 1 second" in problem(response, 429) and int(response.headers["retry-after"]) == 1
    assert api.client.get("/jobs", headers=root).status_code == 200

# --- the end of a job

def check_metrics(api: ApiProcess) -> None:
    "The metrics count one succeeded job with 250 rows and two cancelled ones."
    text = api.client.get("/metrics").text
    for line in ('rakuten_jobs{status="succeeded"} 1.0', 'rakuten_jobs{status="cancelled"} 2.0',
                 'rakuten_job_rows_total{state="answered"} 250.0'):
        assert line in text

def test_a_waiting_job_is_cancelled_and_an_ended_one_is_removed(own_api: ApiProcess, workers: list[JobWorker]) -> None:
    own_api.start().add_users(marie="user", paul="user")
    marie, paul = own_api.token("marie"), own_api.token("paul")
    cancelled, wanted, stopped = (accepted(send(own_api, user, table(250))) for user in (marie, marie, paul))
    assert "queued" in problem(own_api.client.get(f"/jobs/{wanted}/predictions.csv", headers=marie), 404)
    assert own_api.client.delete(f"/jobs/{cancelled}", headers=marie).status_code == 204
    state = own_api.client.get(f"/jobs/{cancelled}", headers=marie).json()
    assert (state["status"], state["done"], state["message"]) == ("cancelled", 0, "by marie") and state["finished"]
    assert job_folders(own_api) == sorted([wanted, stopped])
    store = own_api.store()
    change_user(store, "paul", disabled=True)
    workers.append(JobWorker(own_api))
    assert ended(own_api, marie, wanted)["status"] == "succeeded"
    assert "cancelled" in problem(own_api.client.get(f"/jobs/{cancelled}/predictions.csv", headers=marie), 404)
    (job,) = find_jobs(store, job=stopped)
    assert (job.status, job.done, job.message) == ("cancelled", 0, "its user is disabled")
    until(lambda: job_folders(own_api) == [wanted])
    check_metrics(own_api)
    assert own_api.client.delete(f"/jobs/{wanted}", headers=marie).status_code == 204
    assert job_folders(own_api) == [] and not list((own_api.home / "data/predictions").iterdir())
    problem(own_api.client.get(f"/jobs/{wanted}", headers=marie), 404)
    assert workers[0].stop() == 0 and "Traceback" not in (own_api.home / "worker.log").read_text()
    store.close()

def test_a_job_expires(own_api: ApiProcess) -> None:
    own_api.env |= {"RAKUTEN_EMBEDDED_WORKER": "true", "RAKUTEN_JOB_KEEP_DAYS": "2"}
    own_api.start().add_users(marie="user")
    marie = own_api.token()
    old, new = accepted(send(own_api, marie, CSV)), accepted(send(own_api, marie, CSV))
    for job in (old, new): ended(own_api, marie, job)
    store, expired = own_api.store(), utc_now() - timedelta(days=2, seconds=1)
    with store.writing() as c: c.execute(jobs.update().where(jobs.c.id == old).values(finished=expired))
    own_api.stop()
    own_api.start() # a worker removes expired jobs when it starts, and every minute
    until(lambda: job_folders(own_api) == [new])
    until(lambda: [j.id for j in find_jobs(store)] == [new])
    files = sorted(p.name for p in (own_api.home / "data/predictions").iterdir())
    assert files == [f"job-{new}.csv", f"job-{new}.parquet"]
    store.close()

# --- processes that are killed

KILLS = 2
both_sizes = pytest.mark.parametrize("rows", [pytest.param(3000, marks=pytest.mark.services),
                                              pytest.param(20_000, marks=pytest.mark.heavy)])

def kill(*processes: "subprocess.Popen[bytes] | None") -> None:
    "Kill processes and wait for them."
    for p in processes:
        if p: p.send_signal(signal.SIGKILL)
    for p in processes:
        if p: p.wait(timeout=60)

def many_products(sample_catalog: Path, folder: Path, rows: int) -> Path:
    "A catalogue with this number of different products."
    folder.mkdir()
    x = read_texts(sample_catalog / "X_train_update.csv")
    x = pd.concat([x] * (rows // len(x) + 1), ignore_index=True).iloc[:rows]
    x["designation"] += [f" n° {i}" for i in range(rows)]
    x["productid"], x["imageid"] = [str(10**9 + 7 * i) for i in range(rows)], ""
    x.to_csv(folder / "X_train_update.csv", lineterminator="\n")
    return folder

def kill_and_restart(api: ApiProcess, n_workers: int, workers: list[JobWorker], catalog: Path, rows: int) -> bytes:
    "The predictions of a job whose API and workers are killed twice while they work on it."
    api.start().add_users(marie="user")
    store = api.store()
    job = accepted(send(api, api.token(), (catalog / "X_train_update.csv").read_bytes()))
    state, done = lambda: find_jobs(store, job=job)[0], [0]
    for _ in range(KILLS):
        workers += (started := [JobWorker(api) for _ in range(n_workers)])
        deadline = time.monotonic() + 120
        while state().done <= done[-1] and time.monotonic() < deadline: time.sleep(0.005)
        kill(api.process, *(w.process for w in started))
        done.append(state().done)
        assert done[-2] < done[-1] < rows and state().status == "running", "killed before the end"
        count = sa.select(sa.func.count()).select_from(job_results)
        with store.reading() as c: assert c.execute(count).scalar() == done[-1]
        api.start()
    workers += [JobWorker(api) for _ in range(n_workers)]
    header = api.token()
    last = ended(api, header, job)
    print(f"killed after {done[1:]} of {rows} rows; {last['finished']}")
    assert (last["status"], last["done"], last["rows"]) == ("succeeded", rows, rows), last
    until(lambda: not leftover_jobs(store))
    assert job_counts(store)[1] == {"answered": rows - last["errors"], "error": last["errors"]}, "counted once"
    query = sa.select(predictions.c.request_id).order_by(predictions.c.id)
    with store.reading() as c: ids = c.execute(query).scalars().all()
    assert len(ids) == len(set(ids)) == rows - last["errors"], "each row is in the prediction log once"
    store.close()
    return api.client.get(f"/jobs/{job}/predictions.csv", headers=header).content

@both_sizes
def test_each_row_is_predicted_once_when_processes_are_killed(own_api: ApiProcess, workers: list[JobWorker],
                                                              sample_catalog: Path, bundle: Path, rakuten: Run,
                                                              tmp_path: Path, rows: int) -> None:
    catalog = many_products(sample_catalog, tmp_path / "catalogue", rows)
    assert kill_and_restart(own_api, 1, workers, catalog, rows) == predicted(rakuten, bundle, catalog)

@both_sizes
@needs_postgres
def test_each_row_is_predicted_once_by_two_workers_on_postgresql(own_api: ApiProcess, workers: list[JobWorker],
                                                                 sample_catalog: Path, bundle: Path, rakuten: Run,
                                                                 tmp_path: Path, postgres: str, rows: int) -> None:
    own_api.env["RAKUTEN_DATABASE_URL"] = postgres
    catalog = many_products(sample_catalog, tmp_path / "catalogue", rows)
    assert kill_and_restart(own_api, 2, workers, catalog, rows) == predicted(rakuten, bundle, catalog)

@pytest.mark.services
@needs_postgres
def test_a_worker_continues_after_a_database_outage(own_api: ApiProcess, workers: list[JobWorker],
                                                    sample_catalog: Path, tmp_path: Path,
                                                    postgres_server: "Postgres") -> None:
    own_api.env |= {"RAKUTEN_DATABASE_URL": postgres_server.new_database()}
    own_api.start().add_users(marie="user")
    header, catalog = own_api.token(), many_products(sample_catalog, tmp_path / "c", 2000)
    job = accepted(send(own_api, header, (catalog / "X_train_update.csv").read_bytes()))
    workers.append(JobWorker(own_api))
    store = own_api.store()
    until(lambda: find_jobs(store, job=job)[0].done > 0, 60)
    with postgres_server.stopped(): time.sleep(2)
    with suppress(KeyError): ended(own_api, header, job) # a 503 has no status of a job
    last = ended(own_api, header, job)
    assert (last["status"], last["done"]) == ("succeeded", 2000) and workers[0].process.poll() is None
    assert workers[0].stop(signal.SIGINT) == 0
    store.close()

@pytest.mark.services
@needs_postgres
def test_claims_use_the_clock_of_the_database(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(postgres)
    add_user(store, "marie", "x" * 60)
    add_job(store, "a" * 32, "marie", [3])
    claim = claim_chunk(store, "worker 1")
    for hours in (-2, 2):
        shifted = lambda hours=hours: utc_now() + timedelta(hours=hours)
        for module in ("database", "jobs"): monkeypatch.setattr(f"rakuten_nb.store.{module}.utc_now", shifted)
        assert claim and claim_chunk(store, "worker 2, whose clock is wrong") is None and renew_claim(store, claim)
    store.close()
