"""HTTP as people's servers, keyboards and load balancers speak it: odd headers of downloads, passwords in another
Unicode form, HEAD, and several processes behind one port."""
import socket
import subprocess
import sys
import time
import unicodedata
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from api_process import ApiProcess, children_of
from conftest import Run
from test_download import AT_ONCE, FileServer, X

from rakuten_nb.data.download import TABLES, download_catalog
from rakuten_nb.data.fetch import FileNote, fetch_file
from rakuten_nb.data.sample import make_sample
from rakuten_nb.errors import InputError
from rakuten_nb.store.database import open_store
from rakuten_nb.store.users import add_user, check_password, find_user, hash_password

# --- downloads

WEIGHTS = bytes(range(256)) * 1000

class OddServer(FileServer):
    "A server whose answers to a range have another Content-Range; None leaves it out."
    content_range: str | None = None

    def answer(self, h: BaseHTTPRequestHandler) -> None:
        "Answer one request, with the header replaced."
        send_header = h.send_header
        def replaced(name: str, value: str) -> None:
            if name != "Content-Range": send_header(name, value)
            elif self.content_range is not None: send_header(name, self.content_range.format(value))
        h.send_header = replaced # type: ignore[method-assign]
        super().answer(h)

@pytest.fixture
def server() -> Iterator[OddServer]:
    "Serves one file of random bytes."
    with OddServer({"weights.h5": WEIGHTS}) as running: yield running

def fetch(server: FileServer, target: Path) -> FileNote:
    "Fetch the file without waiting between attempts."
    return fetch_file(f"{server.url}weights.h5", target, patience=AT_ONCE)

@pytest.mark.parametrize("coding", ["", " ", "identity", "Identity", "IDENTITY", "identity, identity", "none", "UTF-8",
                                    "aws-chunked", "binary", ", ,"])
def test_a_content_encoding_that_is_no_compression_is_accepted(coding: str, server: OddServer, tmp_path: Path) -> None:
    server.headers["weights.h5"] = {"Content-Encoding": coding}
    fetch(server, tmp_path / "w.h5")
    assert (tmp_path / "w.h5").read_bytes() == WEIGHTS

@pytest.mark.parametrize("coding", ["gzip", "GZIP", "br", "identity, zstd", "x-gzip", "deflate"])
def test_a_compressed_answer_is_refused(coding: str, server: OddServer, tmp_path: Path) -> None:
    server.headers["weights.h5"] = {"Content-Encoding": coding}
    with pytest.raises(InputError, match=f"without compression; found {coding.split()[-1]}"):
        fetch(server, tmp_path / "w.h5")
    assert not (tmp_path / "w.h5").exists()

UNUSABLE = [None, "", "bytes 5000-9999/*", "bytes */256000", "items 0-1/2", "bytes", "bytes 5000-/256000", "0-1/2"]

@pytest.mark.parametrize("unusable", UNUSABLE)
def test_a_part_is_fetched_anew_without_a_usable_content_range(
    unusable: str | None, server: OddServer, tmp_path: Path,
) -> None:
    server.content_range, server.cuts["weights.h5"] = unusable, [5000]
    with pytest.warns(UserWarning, match="weights.h5|w.h5") as seen: fetch(server, tmp_path / "w.h5")
    assert (tmp_path / "w.h5").read_bytes() == WEIGHTS
    assert server.starts("weights.h5") == [0, 5000, 0], "a range, then the whole file"
    assert "without a usable Content-Range: 5,000 bytes are dropped" in str(seen[0].message)
    assert [p.name for p in tmp_path.iterdir()] == ["w.h5"]

def test_a_connection_that_breaks_again_and_again_ends(server: OddServer, tmp_path: Path) -> None:
    server.content_range, server.cuts["weights.h5"] = None, [5000] * 100
    with pytest.warns(UserWarning), pytest.raises(InputError, match="given up after 7 tries"):
        fetch(server, tmp_path / "w.h5")
    assert not (tmp_path / "w.h5").exists()

@pytest.mark.parametrize("form", ["bytes {0}", "Bytes={0}", "BYTES {0}", " bytes  {0} "])
def test_a_content_range_in_another_spelling_continues(form: str, server: OddServer, tmp_path: Path) -> None:
    server.content_range, server.cuts["weights.h5"] = form.replace("{0}", "5000 - 255999 / 256000"), [5000]
    fetch(server, tmp_path / "w.h5")
    assert (tmp_path / "w.h5").read_bytes() == WEIGHTS and server.starts("weights.h5") == [0, 5000]

@pytest.mark.parametrize("unusable", UNUSABLE[:3])
def test_a_catalogue_is_downloaded_and_compared_without_content_range(unusable: str | None, tmp_path: Path) -> None:
    sample = make_sample(tmp_path / "sample", 100, images=False, progress=False)
    files = {name: (sample / name).read_bytes() for name in TABLES}
    with OddServer(files) as server:
        server.content_range = unusable
        for name in TABLES: server.headers[name] = {"Content-Encoding": ""}
        first = download_catalog(tmp_path / "out", "text", server.url, patience=AT_ONCE)
        again = download_catalog(tmp_path / "out", "text", server.url, patience=AT_ONCE)
    assert (tmp_path / "out" / X).read_bytes() == files[X] and first.keys() == again.keys()

# --- passwords

MIXED = "s\u0323\u0307 and \u1e69" # one letter, decomposed and composed
SPELLINGS = ["Zoë à Orléans, 1998", "Ångström und Übermut", "한국어 비밀번호", "Tiếng Việt rất đẹp", MIXED]

@pytest.mark.parametrize("password", SPELLINGS)
def test_a_password_is_compared_in_one_form(password: str) -> None:
    forms = {unicodedata.normalize(form, password) for form in ("NFC", "NFD")} | {password}
    assert len(forms) > 1
    for hashed in [hash_password(form, 4) for form in forms]:
        assert all(check_password(form, hashed) for form in forms)
        assert not check_password(password + "!", hashed) and not check_password(password[1:], hashed)

@pytest.mark.parametrize("password", SPELLINGS)
def test_an_older_hash_is_matched(password: str) -> None:
    composed, decomposed = (unicodedata.normalize(form, password) for form in ("NFC", "NFD"))
    for older in {composed, decomposed, password}:
        hashed = bcrypt.hashpw(older.encode(), bcrypt.gensalt(4)).decode()
        assert check_password(older, hashed)
        if older != MIXED: assert check_password(composed, hashed) and check_password(decomposed, hashed)
        assert not check_password(password + "!", hashed)

def test_letters_that_look_alike_stay_different() -> None:
    assert not check_password("ﬁne enough", hash_password("fine enough", 4)), "a ligature is another character"
    assert not check_password("Ａ long one", hash_password("A long one", 4)), "so is a wide letter"

def test_length_counts_in_the_composed_form() -> None:
    decomposed = unicodedata.normalize("NFD", "é" * 36)
    assert len(decomposed.encode()) == 108 and check_password(decomposed, hash_password(decomposed, 4))
    assert not check_password("e\u0301" * 37, hash_password(decomposed, 4))
    with pytest.raises(InputError, match="found 73"): hash_password(decomposed + "!", 4)

def test_a_user_logs_in_from_another_keyboard(api: ApiProcess) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Léa, à bientôt") for form in ("NFC", "NFD"))
    store = api.store()
    add_user(store, "lea", hash_password(composed, 4))
    add_user(store, "leo", bcrypt.hashpw(decomposed.encode(), bcrypt.gensalt(4)).decode()) # an older hash
    store.close()
    for name in ("lea", "leo"):
        for password in (composed, decomposed):
            response = api.client.post("/token", data={"username": name, "password": password})
            assert response.status_code == 200, response.text
        wrong = api.client.post("/token", data={"username": name, "password": "Lea, a bientot"})
        assert wrong.status_code == 401

MARKED = {
    "a mark of UTF-8": "\ufeffclé à molette\n".encode(),
    "a mark and a line end of Windows": "\ufeffclé à molette\r\n".encode(),
    "decomposed": unicodedata.normalize("NFD", "clé à molette").encode(),
    "no line end": "clé à molette".encode(),
}

def add_jean(raw: bytes, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[bytes]:
    "Run `users add` with these bytes on standard input."
    line = [sys.executable, "-m", "rakuten_nb.cli", "users", "add", "jean", "--password-stdin"]
    own = env | {"RAKUTEN_DATA_DIR": str(folder)}
    return subprocess.run(line, env=own, cwd=folder, input=raw, capture_output=True, check=False)

@pytest.mark.parametrize("case", MARKED)
def test_a_mark_is_no_part_of_a_password(case: str, env: dict[str, str], tmp_path: Path) -> None:
    done = add_jean(MARKED[case], env, tmp_path)
    assert done.returncode == 0, done.stderr
    store = open_store(f"sqlite:///{tmp_path}/rakuten.sqlite")
    jean = find_user(store, "jean")
    store.close()
    assert jean and check_password("clé à molette", jean.password_hash)
    assert not check_password("\ufeffclé à molette", jean.password_hash)

@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_other_bytes_are_no_password(encoding: str, env: dict[str, str], tmp_path: Path) -> None:
    done = add_jean("clé à molette".encode(encoding), env, tmp_path)
    errors = [line for line in done.stderr.splitlines() if not line.startswith(b"note: ")]
    assert done.returncode == 2 and len(errors) == 1 and errors[0].startswith(b"error: password: expected")

# --- HEAD

def test_head_works_where_get_does(api: ApiProcess) -> None:
    headers = api.token("root")
    paths = api.client.get("/openapi.json").json()["paths"]
    plain = [path for path, methods in paths.items() if "get" in methods and "{" not in path]
    assert {"/status", "/health", "/ready", "/metrics", "/model", "/jobs", "/review"} <= set(plain)
    for path in [*plain, "/docs", "/docs/swagger-ui.css", "/openapi.json"]:
        get, head = api.client.get(path, headers=headers), api.client.head(path, headers=headers)
        expected = 404 if path == "/drift" else 200 # there is no report yet
        assert head.status_code == get.status_code == expected and head.content == b"", path
        assert head.headers["content-type"] == get.headers["content-type"] and head.headers["x-request-id"]
        if path not in ("/metrics", "/model"): assert head.headers["content-length"] == str(len(get.content)), path

@pytest.mark.parametrize("path, status", [("/predict", 405), ("/token", 405), ("/nowhere", 404), ("/model", 401),
                                          ("/jobs/0123456789abcdef0123456789abcdef", 401)])
def test_head_is_refused_where_get_is(path: str, status: int, api: ApiProcess) -> None:
    get, head = api.client.get(path), api.client.head(path)
    assert (get.status_code, head.status_code) == (status, status) and head.content == b""
    assert head.headers["content-type"] == "application/problem+json"
    assert head.headers.get("allow") == get.headers.get("allow")

def test_head_of_the_result_of_a_job(own_api: ApiProcess) -> None:
    own_api.env["RAKUTEN_EMBEDDED_WORKER"] = "true"
    own_api.start()
    own_api.add_users(marie="user", paul="user")
    headers = own_api.token()
    table = b"designation,description\n" + b"Piscine gonflable,\n" * 3
    job = own_api.client.post("/jobs", files={"file": ("x.csv", table)}, headers=headers).json()["id"]
    began = time.monotonic()
    while own_api.client.get(f"/jobs/{job}", headers=headers).json()["status"] != "succeeded":
        assert time.monotonic() - began < 60
        time.sleep(0.2)
    for name in ("predictions.csv", "predictions.parquet"):
        get, head = (own_api.client.request(m, f"/jobs/{job}/{name}", headers=headers) for m in ("GET", "HEAD"))
        assert head.status_code == 200 and head.content == b"" and len(get.content) > 0
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.headers.get("content-disposition") == get.headers.get("content-disposition")
    assert own_api.client.head(f"/jobs/{job}", headers=own_api.token("paul")).status_code == 404
    assert '"method": "HEAD"' in own_api.log()

def test_allow_names_head_beside_get(api: ApiProcess) -> None:
    allowed = {path: api.client.put(path).headers["allow"] for path in ("/jobs", "/model", "/status", "/predict")}
    assert allowed == {"/jobs": "GET, HEAD, POST", "/model": "GET, HEAD", "/status": "GET, HEAD", "/predict": "POST"}

# --- several processes

WARNING = "expected 1 worker process; found 2: /metrics and rate limits count per process"

@pytest.mark.parametrize("how", ["option", "variable"])
def test_several_processes_are_named_where_they_start(
    how: str, own_api: ApiProcess, monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = subprocess.Popen
    def with_workers(line: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return real([*line, "--workers", "2"], **options)
    if how == "variable": own_api.env["WEB_CONCURRENCY"] = "2"
    else: monkeypatch.setattr("api_process.subprocess.Popen", with_workers)
    own_api.start()
    assert own_api.process and len(children_of(own_api.process.pid)) >= 2
    began = time.monotonic()
    while own_api.terminal().count(WARNING) < 2:
        assert time.monotonic() - began < 30, own_api.terminal()
        time.sleep(0.2)
    assert own_api.stop() in (0, -15)

def test_one_process_is_not_warned_of(api: ApiProcess) -> None:
    assert "worker process" not in api.terminal()

@pytest.mark.parametrize("workers", ["2", "0", "-1", "16"])
def test_serve_starts_one_process(workers: str, rakuten: Run, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy: # a server that starts all the same fails
        done = rakuten("serve", "--workers", workers, "--port", busy.getsockname()[1],
                       extra={"RAKUTEN_DATA_DIR": str(tmp_path), "SECRET_KEY": "k" * 48})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"--workers: expected 1; found {workers}: metrics and rate limits count per process" in done.stderr
