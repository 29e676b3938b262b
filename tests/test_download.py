"""Downloads from a server that cuts, changes, corrupts and refuses: a file in place is complete, a failure is one line.

The promises are tested against a plain HTTP server; those that depend on the server also against a loopback hub,
which is asked through huggingface_hub."""
import io
import itertools
import json
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import Run
from urllib3.util.retry import Retry

from rakuten_nb.config import get_logger
from rakuten_nb.data.archive import FOLDERS
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.data.download import ARCHIVE, TABLES, download_catalog
from rakuten_nb.data.fetch import MIB, PATIENCE, fetch_file
from rakuten_nb.data.ingest import import_catalog
from rakuten_nb.errors import InputError

AT_ONCE = PATIENCE.new(backoff_factor=0, backoff_jitter=0)
X, Y = "X_train_update.csv", "Y_train_CVw08PX.csv"
SENDS = 32 << 10 # bytes that the server sends at a time; also the size of its buffer

@dataclass
class FileServer:
    "Serves files on loopback, counts what it sends, and fails as configured."
    files: dict[str, bytes]
    cuts: dict[str, list[int]] = field(default_factory=dict) # file → bytes after which the next answers are cut
    headers: dict[str, dict[str, str]] = field(default_factory=dict) # file → headers instead of the usual ones
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list) # of the next answers
    moved: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict) # file → redirect: target, headers
    etags: bool = True
    ranges: bool = True
    if_range: bool = True # whether the condition is respected
    pause: float = 0 # seconds between two sends
    before: Callable[[str], None] = lambda name: None # called with each request
    seen: list[dict[str, Any]] = field(default_factory=list) # requests: file, start, sent, headers
    path = "/main/"

    def __enter__(self) -> "FileServer":
        server = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def do_GET(self) -> None: server.answer(self)
            def do_HEAD(self) -> None: server.answer(self)
            def log_message(self, *args: object) -> None: pass
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        self.port = self.server.server_port
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.url = self.endpoint + self.path
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, h: BaseHTTPRequestHandler) -> None:
        "Answer one request."
        name = urlsplit(h.path).path.rpartition("/")[2]
        self.before(name)
        body, asked = self.files.get(name), re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range", ""))
        request: dict[str, Any] = {"file": name, "start": int(asked[1]) if asked else 0, "sent": 0, "path": h.path}
        request["probe"] = h.command == "HEAD" or bool(asked and asked[2])
        request["headers"] = {k.title(): v for k, v in h.headers.items()}
        self.seen.append(request)
        if self.statuses: return self.plain(h, *self.statuses.pop(0))
        if name in self.moved: return self.plain(h, 302, {"Location": self.moved[name][0]} | self.moved[name][1])
        if body is None: return self.plain(h, 404, {})
        sending = self.version(name, body)
        start, end = 0, len(body)
        unchanged = not self.if_range or h.headers.get("If-Range", sending.get("ETag")) == sending.get("ETag")
        if asked and self.ranges and unchanged:
            start, end = int(asked[1]), min(int(asked[2] or len(body)) + 1, len(body))
            if start >= len(body): return self.plain(h, 416, {"Content-Range": f"bytes */{len(body)}"})
            sending["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
        sending |= {"Content-Length": str(end - start)} | self.headers.get(name, {})
        h.send_response(206 if "Content-Range" in sending else 200)
        for k, v in sending.items(): h.send_header(k, v)
        h.end_headers()
        if h.command != "HEAD": self.send(h, name, body, start, end, request)

    def send(
        self, h: BaseHTTPRequestHandler, name: str, body: bytes, start: int, end: int, request: dict[str, Any]
    ) -> None:
        "Send a part of a file, and cut the connection as configured."
        cut = self.cuts[name].pop(0) if self.cuts.get(name) and not request["probe"] else end
        h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENDS)
        with suppress(OSError):
            for at in range(start, min(end, start + cut), SENDS):
                data = body[at:min(at + SENDS, end, start + cut)]
                request["sent"] += len(data) # counted before it is sent, so that the receiver finds it counted
                h.connection.sendall(data)
                time.sleep(self.pause)
        h.close_connection = True

    def version(self, name: str, body: bytes) -> dict[str, str]:
        "The headers that identify a version."
        return {"ETag": f'"{sha256(body).hexdigest()[:16]}"'} if self.etags else {}

    def plain(self, h: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        "An answer without a body."
        h.send_response(status)
        for k, v in ({"Content-Length": "0"} | headers).items(): h.send_header(k, v)
        h.end_headers()

    def sent(self, name: str) -> int:
        "Bytes of a file that were sent, in all answers together."
        return sum(r["sent"] for r in self.seen if r["file"] == name)

    def starts(self, name: str) -> list[int]:
        "First bytes of the requests for a file's content."
        return [r["start"] for r in self.seen if r["file"] == name and not r["probe"]]

class LoopbackHub(FileServer):
    "Imitates a hub with one repository: commits, and checksums as ETags."
    path = "/datasets/owner/shop/resolve/main/"

    @property
    def commit(self) -> str: return f"{hash(tuple(sorted(self.files.items()))) % (1 << 160):040x}"

    def version(self, name: str, body: bytes) -> dict[str, str]:
        "The SHA-256 of the archive, the Git object name of a table, and the commit."
        git = sha1(b"blob %d\0" % len(body) + body).hexdigest()
        checksum = sha256(body).hexdigest() if name == ARCHIVE else git
        return {"ETag": f'"{checksum}"', "X-Repo-Commit": self.commit}

KINDS = {"server": FileServer, "hub": LoopbackHub}

def packed(catalog: Path) -> bytes:
    "The pictures of a catalogue as the hub packs them, with four long ones so that cuts matter."
    with zipfile.ZipFile(b := io.BytesIO(), "w", zipfile.ZIP_STORED) as z:
        z.writestr("images/", b"")
        z.writestr("__MACOSX/images/._image_train", b"left in the archive")
        for folder in FOLDERS:
            for p in sorted((catalog / folder).iterdir()): z.write(p, f"images/{folder}/{p.name}")
        for n in range(4):
            z.writestr(f"images/image_train/image_{n}_product_{n}.jpg", random.Random(n).randbytes(2 * MIB))
    return b.getvalue()

@pytest.fixture(scope="module")
def files(sample_catalog: Path) -> dict[str, bytes]:
    "The files of the challenge; the archive is larger than 8 MiB."
    return {n: (sample_catalog / n).read_bytes() for n in TABLES} | {ARCHIVE: packed(sample_catalog)}

@pytest.fixture
def server(files: dict[str, bytes]) -> Iterator[FileServer]:
    "A plain HTTP server with the files."
    with FileServer(dict(files)) as running: yield running

@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[FileServer]:
    "A loopback hub with the files."
    with LoopbackHub(dict(files)) as running: yield running

@pytest.fixture(params=KINDS)
def either(request: pytest.FixtureRequest, files: dict[str, bytes]) -> Iterator[FileServer]:
    "A plain server, then a hub."
    with KINDS[request.param](dict(files)) as running: yield running

@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    "No proxies and no hub settings of this machine; logs and cache in the test's own folder."
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "hf_endpoint", "hf_token"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("RAKUTEN_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("RAKUTEN_DATA_DIR", str(tmp_path / "data"))
    get_logger.cache_clear()

def fetch(server: FileServer, out: Path, only: str | None = None, patience: Retry = AT_ONCE) -> dict[str, str]:
    "A download without waits."
    return download_catalog(out, only, server.url, patience=patience, timeout=(5, 20))

def visible(out: Path) -> dict[str, bytes]:
    "The files of a catalogue, without the hidden folder."
    paths = (p for p in sorted(out.rglob("*")) if p.is_file() and ".download" not in p.parts)
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in paths}

def refused(server: FileServer, out: Path, only: str | None = None, patience: Retry = AT_ONCE) -> str:
    "The one-line error of a download, which leaves visible files as they are."
    before = visible(out)
    with pytest.raises(InputError) as e: fetch(server, out, only, patience)
    assert "\n" not in str(e.value) and visible(out) == before
    return str(e.value)

def logged(tmp_path: Path) -> list[dict[str, Any]]:
    "The lines of the log."
    lines = (tmp_path / "logs/import_data_logger.log").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]

# --- complete downloads

def test_a_catalogue_arrives_as_it_was_sent(
    rakuten: Run, either: FileServer, tmp_path: Path, sample_catalog: Path
) -> None:
    out = tmp_path / "new" / "catalogue"
    answer = rakuten("download", out, "--base-url", either.url)
    assert answer.returncode == 0, answer.stderr
    assert str(out) in answer.stdout.replace("\n", "") and answer.stderr == ""
    arrived, sent = visible(out), visible(sample_catalog)
    assert sent.items() <= arrived.items() and len(arrived) == len(sent) + 4
    assert sorted(p.name for p in out.iterdir()) == [".download", "X_test_update.csv", X, Y, *sorted(FOLDERS)]
    assert {p.suffix for p in (out / ".download").iterdir()} == {".json"}, "only the record stays"
    assert (read_catalog(out).products.label >= 0).sum() == 400
    agents = {(r["headers"]["User-Agent"].partition("/")[0], r["headers"]["Accept-Encoding"]) for r in either.seen}
    assert agents == {("rakuten_nb", "identity")}

def test_a_second_run_fetches_nothing(either: FileServer, tmp_path: Path) -> None:
    fetch(either, tmp_path / "out")
    either.seen.clear()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(fetch(either, tmp_path / "out").values()) == {"there already, unchanged on the server"}
    assert all(r["probe"] for r in either.seen) and sum(r["sent"] for r in either.seen) <= 4
    again = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert again == stamps, "nothing is unpacked again"

def test_fetches_text_first_and_pictures_later(either: FileServer, tmp_path: Path) -> None:
    fetch(either, tmp_path / "out", "text")
    assert {r["file"] for r in either.seen} == set(TABLES) and set(visible(tmp_path / "out")) == set(TABLES)
    fetch(either, tmp_path / "out", "images")
    assert read_catalog(tmp_path / "out").products.has_picture.any()
    assert either.sent(X) == len(either.files[X])

# --- cuts

@pytest.mark.parametrize(("kind", "seed"), [("server", 0), ("server", 1), ("hub", 2)])
def test_three_cuts_cost_at_most_a_mib_each(files: dict[str, bytes], tmp_path: Path, kind: str, seed: int) -> None:
    size, rng = len(files[ARCHIVE]), random.Random(seed)
    offsets = sorted(rng.sample(range(1, size), 3))
    with KINDS[kind](dict(files), cuts={ARCHIVE: [b - a for a, b in itertools.pairwise([0, *offsets])]}) as server:
        fetch(server, tmp_path / "out", "images")
        assert server.cuts[ARCHIVE] == []
        assert server.starts(ARCHIVE) == [0, *offsets], "each answer begins where the last one ended"
        assert server.sent(ARCHIVE) - size <= 3 * MIB
    assert [line["at"] for line in logged(tmp_path) if line["message"] == "resumed"] == offsets

def test_a_later_run_continues_where_the_last_one_ended(either: FileServer, tmp_path: Path) -> None:
    either.cuts[ARCHIVE] = [3 * MIB]
    assert "given up after 1 try" in refused(either, tmp_path / "out", "images", Retry(total=0))
    fetch(either, tmp_path / "out", "images")
    assert either.starts(ARCHIVE) == [0, 3 * MIB] and either.sent(ARCHIVE) == len(either.files[ARCHIVE])

@pytest.mark.parametrize(("kind", "seed"), [("server", 0), ("hub", 1)])
def test_a_killed_process_costs_at_most_a_mib(
    files: dict[str, bytes], tmp_path: Path, env: dict[str, str], kind: str, seed: int
) -> None:
    kill_at, out = random.Random(seed).randrange(2 * MIB, 6 * MIB), tmp_path / "out"
    program = ("import sys; from rakuten_nb.data.download import download_catalog; "
               "download_catalog(sys.argv[1], 'images', sys.argv[2])")
    with KINDS[kind](dict(files), pause=0.002) as server:
        command = [sys.executable, "-c", program, str(out), server.url]
        process = subprocess.Popen(command, env=env | {"NO_PROXY": "*"}, cwd=tmp_path)
        try:
            while process.poll() is None and server.sent(ARCHIVE) < kill_at: time.sleep(0.001)
        finally: process.kill()
        assert process.wait() == -signal.SIGKILL, "it was still running"
        server.pause = 0
        time.sleep(0.1) # until the server has noticed
        first = server.sent(ARCHIVE)
        assert visible(out) == {}
        fetch(server, out, "images")
        again = server.starts(ARCHIVE)[-1]
    assert 0 < again <= first and first - again <= MIB
    assert len(visible(out)) > 200

KILLED_UNPACKING = """
import os, signal, sys
import rakuten_nb.data.archive as archive
from rakuten_nb.data.download import download_catalog
unpack, left = archive.unpack_member, 150
def dying(*args):
    global left
    left -= 1
    if not left: os.kill(os.getpid(), signal.SIGKILL)
    unpack(*args)
archive.unpack_member = dying
download_catalog(sys.argv[1], 'images', sys.argv[2])
"""

def test_a_run_killed_while_unpacking_continues(server: FileServer, tmp_path: Path, env: dict[str, str]) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED_UNPACKING, str(out), server.url]
    answer = subprocess.run(command, env=env | {"NO_PROXY": "*"}, cwd=tmp_path, check=False)
    assert answer.returncode == -signal.SIGKILL and visible(out) == {}
    unpacked = {p: p.stat().st_mtime_ns for p in (out / ".download/unpacking").rglob("*.jpg")}
    assert len(unpacked) == 149
    next(iter(unpacked)).write_bytes(b"half") # what a power failure may leave
    fetch(server, out, "images")
    stamps = {p.name: p.stat().st_mtime_ns for p in out.rglob("*.jpg")}
    assert sum(stamps[p.name] == stamp for p, stamp in unpacked.items()) == 148, "right files are not written again"
    with zipfile.ZipFile(io.BytesIO(server.files[ARCHIVE])) as z:
        pictures = [n for n in z.namelist() if n.endswith(".jpg")]
        assert all((out / n.removeprefix("images/")).read_bytes() == z.read(n) for n in pictures)
    assert server.sent(ARCHIVE) <= len(server.files[ARCHIVE]) + 1, "one byte to ask for the version"
    assert not (out / ".download/unpacking").exists()

def test_two_downloads_to_one_folder_do_not_mix(server: FileServer, tmp_path: Path) -> None:
    messages: list[str] = []
    def second(name: str) -> None:
        server.before = lambda name: None
        messages.append(refused(server, tmp_path / "out"))
    server.before = second
    fetch(server, tmp_path / "out", "text")
    assert len(messages) == 1 and "another download to this folder is running" in messages[0]

# --- changes

@pytest.mark.parametrize("kind", ["respects If-Range", "ignores If-Range", "knows no ranges", "is a hub"])
def test_parts_of_two_versions_are_never_combined(files: dict[str, bytes], tmp_path: Path, kind: str) -> None:
    with (LoopbackHub if kind == "is a hub" else FileServer)(dict(files)) as server:
        server.cuts, server.ranges = {ARCHIVE: [2 * MIB], X: [5000]}, kind != "knows no ranges"
        for only in ("images", "text"): refused(server, tmp_path / "out", only, Retry(total=0))
        server.files[X] = server.files[X].replace(b" ", b"_", 1) # another file of the same length
        server.if_range = kind != "ignores If-Range"
        with pytest.warns(UserWarning, match="changed on the server") as caught: fetch(server, tmp_path / "out", "text")
        assert len(caught) == 1 and visible(tmp_path / "out")[X] == server.files[X]
        fetch(server, tmp_path / "out", "images") # unchanged, and continued
        assert (server.sent(ARCHIVE) > len(server.files[ARCHIVE])) == (kind == "knows no ranges")

def test_a_part_of_an_unknown_version_is_dropped(server: FileServer, tmp_path: Path) -> None:
    server.etags, server.cuts[X] = False, [5000]
    fetch(server, tmp_path / "out", "text")
    assert server.starts(X) == [0, 0] and visible(tmp_path / "out")[X] == server.files[X]

def test_rejects_a_file_that_changed_on_the_server_and_retains_the_local_one(
    rakuten: Run, server: FileServer, tmp_path: Path,
) -> None:
    fetch(server, tmp_path / "out")
    old = server.files[Y]
    for new in (old + b"400,10\n", old.replace(b",10\n", b",40\n", 1)): # another length, and the same one
        server.files[Y] = new
        server.seen.clear()
        line = refused(server, tmp_path / "out")
        assert re.search(r"Y_train_CVw08PX.csv: changed on the server: expected .*; found .*; the old file stays", line)
        fetched = not all(r["probe"] for r in server.seen)
        assert fetched == (len(new) == len(old)), "fetched only if the length leaves it open"
    answer = rakuten("download", tmp_path / "out", "--base-url", server.url)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "changed on the server" in answer.stderr
    assert any(line["message"] == "refused" for line in logged(tmp_path))
    server.files[Y], server.headers[Y] = old, {"ETag": '"another machine"'}
    assert fetch(server, tmp_path / "out")[Y] == "there already, the same content on the server"

def test_rejects_a_file_that_changed_on_the_hub_before_fetching_it(hub: FileServer, tmp_path: Path) -> None:
    fetch(hub, tmp_path / "out", "text")
    hub.files[Y] = hub.files[Y].replace(b",10\n", b",40\n", 1) # the same length, another checksum
    hub.seen.clear()
    assert "changed on the server: expected checksum" in refused(hub, tmp_path / "out", "text")
    assert all(r["probe"] for r in hub.seen)

def test_files_edited_by_hand_are_not_overwritten(server: FileServer, tmp_path: Path) -> None:
    fetch(server, tmp_path / "out")
    (tmp_path / "out" / Y).write_bytes(server.files[Y] + b"400,2583\n")
    assert f"{tmp_path / 'out' / Y}: expected {len(server.files[Y]):,} bytes" in refused(server, tmp_path / "out")
    (tmp_path / "out" / Y).unlink()
    next((tmp_path / "out/image_test").iterdir()).unlink()
    assert "image_test: expected" in refused(server, tmp_path / "out", "images")
    fetch(server, tmp_path / "out", "text")
    assert (tmp_path / "out" / Y).read_bytes() == server.files[Y]

# --- the hub

def linked(content: bytes, **wrong: str) -> dict[str, str]:
    "The headers of a hub's redirect to the storage of large files."
    checksum = f'"{sha256(content).hexdigest()}"'
    return {"X-Repo-Commit": "c0" * 20, "X-Linked-Size": str(len(content)), "X-Linked-Etag": checksum} | wrong

@pytest.fixture
def storage(hub: FileServer) -> Iterator[FileServer]:
    "The storage that the hub redirects to; it cuts the archive three times."
    with FileServer(dict(hub.files), cuts={ARCHIVE: [MIB, 2 * MIB, MIB]}) as running:
        running.headers = {n: {"ETag": f'"{"ab" * 32}"'} for n in hub.files} # looks like a SHA-256 and is none
        target = f"http://localhost:{running.port}/cdn"
        hub.moved = {n: (f"{target}/{n}?Signature=secret", linked(c)) for n, c in hub.files.items()}
        yield running

def secrets_shown(tmp_path: Path, *more: object) -> str:
    "All messages, log lines and records of a download."
    return f"{more} {logged(tmp_path)} {[p.read_text() for p in (tmp_path / 'out/.download').iterdir()]}"

def test_the_hub_s_redirect_is_followed_and_verified(hub: FileServer, storage: FileServer, tmp_path: Path) -> None:
    base = hub.url.replace("http://", "http://me:hush@")
    download_catalog(tmp_path / "out", base_url=base, patience=AT_ONCE)
    assert storage.sent(ARCHIVE) == len(hub.files[ARCHIVE])
    assert all("Authorization" in r["headers"] for r in hub.seen)
    assert not any("Authorization" in r["headers"] for r in storage.seen)
    hub.moved[X] = (hub.moved[X][0], linked(b"another"))
    with pytest.raises(InputError) as e: download_catalog(tmp_path / "other", base_url=base, patience=AT_ONCE)
    shown = secrets_shown(tmp_path, e.value)
    assert "wrong size" in str(e.value) and "hush" not in shown and "secret" not in shown

def test_content_that_differs_from_the_hub_s_checksum_is_refused(
    hub: FileServer, storage: FileServer, tmp_path: Path
) -> None:
    storage.files[X] = storage.files[X].replace(b" ", b"_", 1) # damaged on the way
    assert re.search("wrong content: expected checksum [0-9a-f]{64}", refused(hub, tmp_path / "out", "text"))
    hub.moved.clear()
    hub.headers[X] = {"ETag": f'"{"0" * 40}"'}
    assert re.search("wrong content: expected checksum 0{40}; found", refused(hub, tmp_path / "other", "text"))

def test_a_token_is_sent_to_the_hub_of_the_environment_only(
    hub: FileServer, storage: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(hub, tmp_path / "out", "text")
    assert not any("Authorization" in r["headers"] for r in hub.seen), "not the hub of the environment"
    hub.seen.clear()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    public = "https://huggingface.co/datasets/owner/shop/resolve/main/"
    download_catalog(tmp_path / "other", "text", public, patience=AT_ONCE)
    assert {r["headers"].get("Authorization") for r in hub.seen} == {"Bearer hf_secret"}
    assert not any("Authorization" in r["headers"] for r in storage.seen)
    assert "hf_secret" not in secrets_shown(tmp_path)

def test_the_token_in_the_home_of_the_library_is_used(rakuten: Run, hub: FileServer, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text("hf_stored")
    extra = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint}
    answer = rakuten("download", tmp_path / "out", "--only", "text", "--base-url", hub.url, extra=extra)
    assert answer.returncode == 0, answer.stderr
    assert {r["headers"].get("Authorization") for r in hub.seen} == {"Bearer hf_stored"}

def test_all_files_come_from_one_commit(hub: FileServer, tmp_path: Path) -> None:
    first = hub.commit
    hub.before = lambda name: hub.files.update({"README.md": name.encode()}) if len(hub.seen) == 3 else None
    fetch(hub, tmp_path / "out", "text")
    revisions = [r["path"].split("/resolve/")[1].split("/")[0] for r in hub.seen]
    assert revisions == ["main", *[first] * 5] and hub.commit != first

def test_a_server_that_is_no_hub_is_one_line(server: FileServer, tmp_path: Path) -> None:
    server.url = server.endpoint + LoopbackHub.path
    line = refused(server, tmp_path / "out")
    assert "expected a hub (header X-Repo-Commit); found another server" in line

# --- sizes and checksums

WRONG = { # what is wrong → further headers of the answer, part of the line
    "a checksum": ({"ETag": f'"{"0" * 64}"'}, r"wrong content: expected checksum 0{64}; found [0-9a-f]{64}"),
    "no size": ({"Content-Length": "", "Transfer-Encoding": "identity"}, "expected the file's length"),
    "a length beyond the end": ({"Content-Length": "99999999"}, r"given up after \d tries: "),
    "more than any disk has": ({"Content-Length": str(10**18)},
                               r": not enough disk space for X_train_update.csv: expected 1(,000){6} bytes free"),
    "another coding": ({"Content-Encoding": "gzip"}, "expected the file without compression; found gzip"),
}

@pytest.mark.filterwarnings("ignore:X_train_update.csv. changed on the server")
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_answer_is_refused(server: FileServer, tmp_path: Path, case: str) -> None:
    headers, message = WRONG[case]
    server.headers[X] = headers
    assert re.search(message, refused(server, tmp_path / "out", "text", AT_ONCE.new(total=2)))
    assert not (tmp_path / "out" / X).exists()

def test_a_size_that_differs_from_the_hub_s_is_refused(hub: FileServer, tmp_path: Path) -> None:
    hub.headers[X] = {"X-Linked-Size": "12345"}
    message = r"wrong size: expected 12,345 bytes, from the hub's metadata; found [\d,]+"
    assert re.search(message, refused(hub, tmp_path / "out", "text"))

def test_a_wrong_checksum_after_a_cut_is_retried_once(server: FileServer, tmp_path: Path) -> None:
    right = server.files[X]
    server.files[X] = b"?" * 100 + right[100:] # damaged on the way, until the cut
    server.headers[X], server.cuts[X] = {"ETag": f'"{sha256(right).hexdigest()}"'}, [5000]
    server.if_range = False
    def repair(name: str) -> None:
        if server.sent(X): server.files[X] = right
    server.before = repair
    fetch(server, tmp_path / "out", "text")
    assert server.starts(X) == [0, 5000, 0] and visible(tmp_path / "out")[X] == right

# --- refusals of the server

@pytest.mark.parametrize("status", [401, 403, 404, 410, 418])
def test_a_refusal_is_one_line(either: FileServer, tmp_path: Path, status: int) -> None:
    either.statuses = [(status, {})]
    line = refused(either, tmp_path / "out")
    assert re.search(rf"X_test_update.csv: expected the file; found {status} ", line)
    assert len(either.seen) == 1 and not (tmp_path / "out").exists()

def test_the_command_line_reports_a_missing_file(rakuten: Run, server: FileServer, tmp_path: Path) -> None:
    del server.files[ARCHIVE]
    answer = rakuten("download", tmp_path / "other", "--base-url", server.url)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert "404" in answer.stderr and "RAKUTEN_DOWNLOAD_URL" in answer.stderr
    assert visible(tmp_path / "other") == {}, "tables wait for their pictures"

def test_an_overloaded_server_is_retried_a_limited_number_of_times(either: FileServer, tmp_path: Path) -> None:
    either.statuses = [(503, {})] * 3 + [(429, {"Retry-After": "0"}), (502, {})]
    fetch(either, tmp_path / "out", "text")
    assert [(line["reason"], line["wait"]) for line in logged(tmp_path) if line["message"] == "retry"] == [
        ("503 Service Unavailable", 0)] * 3 + [("429 Too Many Requests", 0), ("502 Bad Gateway", 0)]
    either.seen.clear()
    either.statuses = [(503, {})] * 100
    assert "given up after 7 tries: 503 Service Unavailable" in refused(either, tmp_path / "other", "text")
    assert len(either.seen) == 7

def test_a_requested_pause_is_respected(either: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("rakuten_nb.data.fetch.time.sleep", waits.append)
    either.statuses = [(503, {"Retry-After": "7"}), (429, {"Retry-After": "11"})]
    fetch(either, tmp_path / "out", "text")
    assert [w for w in waits if w] == [7, 11]
    either.statuses = [(503, {"Retry-After": "3600"})]
    assert "requests a pause of 3,600 seconds" in refused(either, tmp_path / "other", "text")

def test_waits_double_with_a_random_part() -> None:
    left, waits = PATIENCE, []
    for _ in range(6):
        left = left.increment("GET", "/", error=OSError("cut"))
        waits.append(left.get_backoff_time())
    assert waits[0] == 0 and all(w <= wait <= w + 1 for w, wait in zip((1, 2, 4, 8, 16), waits[1:], strict=True))
    assert any(w % 1 for w in waits)

def test_an_absent_server_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
    for url, message in ((f"http://127.0.0.1:{port}/", "given up after 3 tries: Connection refused"),
                         (f"http://127.0.0.1:{port}{LoopbackHub.path}", "given up after 3 tries: Connection refused"),
                         ("http://nobody.invalid/", "given up after 3 tries: "),
                         ("file:///etc/", "expected an address"), ("ftp://127.0.0.1/", "expected an address")):
        with pytest.raises(InputError, match=re.escape(message)) as e:
            download_catalog(tmp_path / "out", base_url=url, patience=AT_ONCE)
        assert "\n" not in str(e.value) and not (tmp_path / "out").exists()

def test_a_redirect_to_a_file_is_not_followed(server: FileServer, tmp_path: Path) -> None:
    server.moved = {"X_test_update.csv": ("file:///etc/hostname", {})}
    assert "X_test_update.csv" in refused(server, tmp_path / "out")
    server.moved = {"X_test_update.csv": (f"{server.url}X_test_update.csv", {})}
    assert "more than 10 redirects" in refused(server, tmp_path / "out")

@pytest.fixture
def proxy(server: FileServer) -> Iterator[tuple[str, list[str]]]:
    "A proxy that sends every request to the server; its address, and the requests."
    passed: list[str] = []
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            passed.append(self.path)
            connection = HTTPConnection("127.0.0.1", server.port)
            headers = {k: v for k, v in self.headers.items() if k in ("Range", "If-Range")}
            connection.request("GET", urlsplit(self.path).path, headers=headers)
            answer = connection.getresponse()
            self.send_response(answer.status)
            for k, v in answer.getheaders(): self.send_header(k, v)
            self.end_headers()
            with suppress(OSError): self.wfile.write(answer.read())
            connection.close()
        def log_message(self, *args: object) -> None: pass
    running = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=running.serve_forever, args=[0.02], daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", passed
    running.shutdown()
    running.server_close()

def test_a_proxy_of_the_environment_is_used(
    server: FileServer, proxy: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, passed = proxy
    for name in ("HTTP_PROXY", "http_proxy"): monkeypatch.setenv(name, address)
    download_catalog(tmp_path / "out", "text", "http://only-the-proxy-knows.invalid/main/", patience=AT_ONCE)
    assert sorted(urlsplit(p).path for p in passed) == sorted(f"/main/{n}" for n in TABLES)
    assert "only-the-proxy-knows.invalid" in passed[0]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="given up after 3 tries: the proxy: "):
        download_catalog(tmp_path / "other", "text", server.url, patience=AT_ONCE)

# --- disks

def test_a_full_disk_retains_what_arrived(server: FileServer, tmp_path: Path, env: dict[str, str]) -> None:
    limit = 3 * MIB + 1000 # bytes: the largest file that the process may write, as on a full disk
    def small_disk() -> None: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    command = [sys.executable, "-m", "rakuten_nb.cli", "download", str(tmp_path / "out"), "--base-url", server.url]
    quiet = env | {"NO_PROXY": "*", "PYTHONDONTWRITEBYTECODE": "1"}
    answer = subprocess.run(
        command, env=quiet, cwd=tmp_path, preexec_fn=small_disk, capture_output=True, text=True, check=False)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1, answer.stderr
    assert "images.zip.part: cannot be written: File too large: received data stays" in answer.stderr
    assert visible(tmp_path / "out") == {} and (tmp_path / "out/.download/images.zip.part").stat().st_size == limit
    fetch(server, tmp_path / "out")
    assert server.starts(ARCHIVE) == [0, limit] and len(visible(tmp_path / "out")) > 200

def test_unpacking_checks_for_space_first(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, real = len(server.files[ARCHIVE]), shutil.disk_usage # space for the archive, not for its pictures
    monkeypatch.setattr("rakuten_nb.data.fetch.shutil.disk_usage", lambda p: real(p)._replace(free=size))
    line = refused(server, tmp_path / "out", "images")
    assert "not enough disk space for the unpacked pictures: expected" in line
    monkeypatch.undo()
    fetch(server, tmp_path / "out", "images")
    assert server.sent(ARCHIVE) <= size + 1, "the archive is not fetched again"

# --- one file

def test_a_single_file_is_resumed_and_verified(server: FileServer, tmp_path: Path) -> None:
    target, checksum = tmp_path / "weights.h5", sha256(server.files[X]).hexdigest()
    server.cuts[X] = [5000]
    with pytest.raises(InputError, match=r"given up after 1 try: IncompleteRead\(5000 bytes read"):
        fetch_file(server.url + X, target, checksum, patience=Retry(total=0))
    assert fetch_file(server.url + X, target, checksum, patience=AT_ONCE).found == checksum
    assert server.starts(X) == [0, 5000] and target.read_bytes() == server.files[X]
    assert [p.name for p in tmp_path.iterdir() if "weights" in p.name] == ["weights.h5"]

# --- archives

def archive(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    "An archive of these members."
    with warnings.catch_warnings(), zipfile.ZipFile(b := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
        warnings.simplefilter("ignore")
        for name, data in members: z.writestr(name, data)
    return b.getvalue()

def symbolic_link() -> zipfile.ZipInfo:
    "A member that is a symbolic link."
    info = zipfile.ZipInfo("images/image_train/image_5_product_6.jpg")
    info.external_attr = 0o120777 << 16
    return info

def with_half_size(content: bytes) -> bytes:
    "The directory gives half the size of the first member."
    at = content.index(b"PK\x01\x02") + 24
    half = int.from_bytes(content[at : at + 4], "little") // 2
    return content[:at] + half.to_bytes(4, "little") + content[at + 4 :]

def encrypted(content: bytes) -> bytes:
    "The directory marks the first member as encrypted."
    at = content.index(b"PK\x01\x02") + 8
    return content[:at] + bytes([content[at] | 1]) + content[at + 1 :]

def overlapping(content: bytes) -> bytes:
    "The second member of the directory begins where the first one does."
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4) + 42
    return content[:second] + (0).to_bytes(4, "little") + content[second + 4 :]

A, B = "images/image_train/image_1_product_2.jpg", "images/image_train/image_3_product_4.jpg"
TWO = archive((A, random.Random(1).randbytes(3000)), (B, random.Random(2).randbytes(3000)))
BAD = { # what it is → the archive, part of the line
    "leads out": (archive((A, b"1"), ("../outside.jpg", b"2")), "member '../outside.jpg': its path leads out"),
    "leads out, deeper": (archive((A, b"1"), ("images/image_train/../../../outside.jpg", b"2")), "its path leads out"),
    "absolute": (archive((A, b"1"), ("/outside.jpg", b"2")), "its path leads out"),
    "backslashes": (archive((A, b"1"), ("..\\outside.jpg", b"2")), "its path leads out"),
    "drive": (archive((A, b"1"), ("C:outside.jpg", b"2")), "invalid on this system"),
    "link": (archive((A, b"1"), (symbolic_link(), b"/etc/passwd")), "a link or a device"),
    "encrypted": (encrypted(TWO), "it is encrypted"),
    "twice": (archive((A, b"1"), (A, b"2")), "given twice"),
    "twice in two places": (archive((A, b"1"), (A.removeprefix("images/"), b"2")), "given twice"),
    "bomb": (archive((A, bytes(65 * MIB))), "which hardly shrink"),
    "half the size": (with_half_size(TWO), "CRC"),
    "one within the other": (overlapping(TWO), "lies within another"),
    "damaged": (TWO[:500] + bytes(8) + TWO[508:], "image_1_product_2.jpg"),
    "cut short": (TWO[:-100], "not a zip file"),
    "a log-in page": (b"<html>log in first</html>", "not a zip file"),
    "no pictures": (archive(("README.txt", b"elsewhere")), "found none"),
}

@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_is_refused_completely(server: FileServer, tmp_path: Path, case: str) -> None:
    server.files[ARCHIVE], message = BAD[case]
    line = refused(server, tmp_path / "deep/out", "images")
    assert "images.zip: cannot be unpacked: " in line and message in line
    left = [p for p in tmp_path.rglob("*") if p.suffix in {".jpg", ".zip", ".part"} or "outside" in p.name]
    assert left == []

def test_tables_of_another_kind_are_removed(server: FileServer, tmp_path: Path) -> None:
    server.files[X], good = b"<html>log in first</html>", server.files[X]
    assert "expected the tables of a catalogue" in refused(server, tmp_path / "out", "text")
    server.files[X] = good
    fetch(server, tmp_path / "out", "text")
    assert set(visible(tmp_path / "out")) == set(TABLES)

# --- the import stage

def test_the_import_caches_the_download(either: FileServer, tmp_path: Path, sample_catalog: Path) -> None:
    raw = tmp_path / "project/data/raw"
    import_catalog(raw, hub=either.url)
    assert visible(sample_catalog).items() <= visible(raw).items() and not (raw / ".download").exists()
    picture = next((raw / "image_train").iterdir())
    assert picture.stat().st_nlink == 2 and (raw / X).stat().st_nlink == 1, "pictures are links, tables are copies"
    shutil.rmtree(raw) # as DVC does before a stage runs again
    either.seen.clear()
    import_catalog(raw, hub=either.url)
    assert sum(r["sent"] for r in either.seen) <= 4 and visible(sample_catalog).items() <= visible(raw).items()
    done = [line for line in logged(tmp_path) if line["message"] == "import done"]
    assert len(done) == 2 and done[0]["train_rows"] == 400 and done[0]["origin"] == either.url

def test_import_rejects_a_directory_together_with_a_hub(tmp_path: Path, sample_catalog: Path) -> None:
    with pytest.raises(InputError, match="expected a catalogue directory or a hub; found both"):
        import_catalog(tmp_path / "raw", sample_catalog, hub="default")
    assert not (tmp_path / "raw").exists()
