"The import from the hub against a server that cuts, changes, lies and refuses: what arrives is whole, what does not is one line."
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
from hashlib import sha256
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import Run
from urllib3.util.retry import Retry

from rakuten_nb.config import get_logger
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.data.download import ARCHIVE, FOLDERS, MIB, PATIENCE, TABLES, download_catalog
from rakuten_nb.data.ingest import import_catalog
from rakuten_nb.errors import InputError

AT_ONCE = PATIENCE.new(backoff_factor=0, backoff_jitter=0)
X, Y = "X_train_update.csv", "Y_train_CVw08PX.csv"
SENDS = 32 << 10 # bytes that the server hands over at a time; its own buffer is held as small

@dataclass
class HubServer:
    "Serves files on loopback, counts what it sends, and fails as it is told."
    files: dict[str, bytes]
    cuts: dict[str, list[int]] = field(default_factory=dict) # file → bytes after which each of the next answers is cut
    headers: dict[str, dict[str, str]] = field(default_factory=dict) # file → further headers, which beat the usual ones
    statuses: list[tuple[int, dict[str, str]]] = field(default_factory=list) # of the next answers
    moved: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict) # file → where a redirect leads, and what it says
    etags: bool = True
    ranges: bool = True
    pause: float = 0 # seconds between two sends
    before: Callable[[str], None] = lambda name: None # called with each request
    seen: list[dict[str, Any]] = field(default_factory=list) # requests: file, start, sent, headers

    def __enter__(self) -> "HubServer":
        hub = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def do_GET(self) -> None: hub.answer(self)
            def log_message(self, *args: object) -> None: pass
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/main/"
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, h: BaseHTTPRequestHandler) -> None:
        "One answer."
        name = urlsplit(h.path).path.rpartition("/")[2]
        self.before(name)
        body, asked = self.files.get(name), re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range", ""))
        request: dict[str, Any] = {"file": name, "start": int(asked[1]) if asked else 0, "probe": bool(asked and asked[2]), "sent": 0}
        request["headers"] = dict(h.headers)
        self.seen.append(request)
        if self.statuses: return self.plain(h, *self.statuses.pop(0))
        if name in self.moved: return self.plain(h, 302, {"Location": self.moved[name][0]} | self.moved[name][1])
        if body is None: return self.plain(h, 404, {})
        etag = f'"{sha256(body).hexdigest()[:16]}"' if self.etags else ""
        said = {"ETag": etag} if etag else {}
        start, end = 0, len(body)
        if asked and self.ranges and h.headers.get("If-Range", etag) == etag:
            start, end = int(asked[1]), min(int(asked[2] or len(body)) + 1, len(body))
            if start >= len(body): return self.plain(h, 416, {"Content-Range": f"bytes */{len(body)}"})
            said["Content-Range"] = f"bytes {start}-{end - 1}/{len(body)}"
        said |= {"Content-Length": str(end - start)} | self.headers.get(name, {})
        h.send_response(206 if "Content-Range" in said else 200)
        for k, v in said.items(): h.send_header(k, v)
        h.end_headers()
        cut = self.cuts[name].pop(0) if self.cuts.get(name) and not request["probe"] else end
        h.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SENDS)
        with suppress(OSError):
            for at in range(start, min(end, start + cut), SENDS):
                data = body[at:min(at + SENDS, end, start + cut)]
                request["sent"] += len(data) # before it is sent: whoever has got it finds it counted
                h.connection.sendall(data)
                time.sleep(self.pause)
        h.close_connection = True

    def plain(self, h: BaseHTTPRequestHandler, status: int, headers: dict[str, str]) -> None:
        "An answer without a body."
        h.send_response(status)
        for k, v in ({"Content-Length": "0"} | headers).items(): h.send_header(k, v)
        h.end_headers()

    def sent(self, name: str) -> int:
        "Bytes of a file that were handed over, all answers together."
        return sum(r["sent"] for r in self.seen if r["file"] == name)

def packed(catalog: Path) -> bytes:
    "The pictures of a catalogue as the hub packs them, and a few of them made long so that the archive is worth cutting."
    with zipfile.ZipFile(b := io.BytesIO(), "w", zipfile.ZIP_STORED) as z:
        z.writestr("images/", b"")
        z.writestr("__MACOSX/images/._image_train", b"left in the archive")
        for folder in FOLDERS:
            for p in sorted((catalog / folder).iterdir()): z.write(p, f"images/{folder}/{p.name}")
        for n in range(4): z.writestr(f"images/image_train/image_{n}_product_{n}.jpg", random.Random(n).randbytes(2 * MIB))
    return b.getvalue()

@pytest.fixture(scope="module")
def files(sample_catalog: Path) -> dict[str, bytes]:
    "What the hub has; the archive is larger than 8 MiB."
    return {n: (sample_catalog / n).read_bytes() for n in TABLES} | {ARCHIVE: packed(sample_catalog)}

@pytest.fixture
def hub(files: dict[str, bytes]) -> Iterator[HubServer]:
    "A server that has it."
    with HubServer(dict(files)) as running: yield running

@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    "Nothing of this machine's network; logs and cache in the test's own folder."
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("RAKUTEN_LOG_DIR", str(tmp_path / "logs"))
    monkeypatch.setenv("RAKUTEN_DATA_DIR", str(tmp_path / "data"))
    get_logger.cache_clear()

def fetch(hub: HubServer, out: Path, only: str | None = None, patience: Retry = AT_ONCE) -> dict[str, str]:
    "A download without waits."
    return download_catalog(out, only, hub.url, patience=patience, timeout=(5, 20))

def visible(out: Path) -> dict[str, bytes]:
    "What a catalogue holds, apart from the hidden folder."
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file() and ".download" not in p.parts}

def refused(hub: HubServer, out: Path, only: str | None = None, patience: Retry = AT_ONCE) -> str:
    "The one line of a download that is refused; what was visible is visible still."
    before = visible(out)
    with pytest.raises(InputError) as e: fetch(hub, out, only, patience)
    assert "\n" not in str(e.value) and visible(out) == before
    return str(e.value)

def logged(tmp_path: Path) -> list[dict[str, Any]]:
    "The lines of the log."
    return [json.loads(line) for line in (tmp_path / "logs/import_data_logger.log").read_text(encoding="utf-8").splitlines()]

# --- what should be

def test_a_catalogue_arrives_as_it_was_sent(rakuten: Run, hub: HubServer, tmp_path: Path, sample_catalog: Path) -> None:
    out = tmp_path / "new" / "catalogue"
    answer = rakuten("download", out, "--base-url", hub.url)
    assert answer.returncode == 0, answer.stderr
    assert str(out) in answer.stdout.replace("\n", "") and answer.stderr == ""
    there, sent = visible(out), visible(sample_catalog)
    assert sent.items() <= there.items() and len(there) == len(sent) + 4
    assert sorted(p.name for p in out.iterdir()) == [".download", "X_test_update.csv", X, Y, *sorted(FOLDERS)]
    assert {p.suffix for p in (out / ".download").iterdir()} == {".json"}, "only the record stays"
    assert (read_catalog(out).products.label >= 0).sum() == 400
    assert {(r["headers"]["User-Agent"].partition("/")[0], r["headers"]["Accept-Encoding"]) for r in hub.seen} == {("rakuten_nb", "identity")}

def test_a_second_run_fetches_nothing(hub: HubServer, tmp_path: Path) -> None:
    fetch(hub, tmp_path / "out")
    hub.seen.clear()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(fetch(hub, tmp_path / "out").values()) == {"there already, unchanged on the server"}
    assert all(r["probe"] for r in hub.seen) and sum(r["sent"] for r in hub.seen) <= 4
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == stamps, "nothing is unpacked again"

def test_text_first_and_pictures_later(hub: HubServer, tmp_path: Path) -> None:
    fetch(hub, tmp_path / "out", "text")
    assert {r["file"] for r in hub.seen} == set(TABLES) and set(visible(tmp_path / "out")) == set(TABLES)
    fetch(hub, tmp_path / "out", "images")
    assert read_catalog(tmp_path / "out").products.has_picture.any()
    assert hub.sent(X) == len(hub.files[X])

# --- cuts

@pytest.mark.parametrize("seed", range(3))
def test_a_download_cut_three_times_costs_at_most_a_mib_each(hub: HubServer, tmp_path: Path, seed: int) -> None:
    size, rng = len(hub.files[ARCHIVE]), random.Random(seed)
    offsets = sorted(rng.sample(range(1, size), 3))
    hub.cuts[ARCHIVE] = [b - a for a, b in itertools.pairwise([0, *offsets])]
    fetch(hub, tmp_path / "out", "images")
    assert hub.cuts[ARCHIVE] == []
    assert [r["start"] for r in hub.seen] == [0, *offsets], "each answer begins where the last one ended"
    assert hub.sent(ARCHIVE) - size <= 3 * MIB
    assert [line["at"] for line in logged(tmp_path) if line["message"] == "resumed"] == offsets

def test_a_later_run_goes_on_where_the_last_one_ended(hub: HubServer, tmp_path: Path) -> None:
    hub.cuts[ARCHIVE] = [3 * MIB]
    assert "given up after 1 try" in refused(hub, tmp_path / "out", "images", Retry(total=0))
    fetch(hub, tmp_path / "out", "images")
    assert [r["start"] for r in hub.seen] == [0, 3 * MIB] and hub.sent(ARCHIVE) == len(hub.files[ARCHIVE])

@pytest.mark.parametrize("seed", range(2))
def test_a_killed_process_costs_at_most_a_mib(hub: HubServer, tmp_path: Path, env: dict[str, str], seed: int) -> None:
    hub.pause = 0.002
    kill_at = random.Random(seed).randrange(2 * MIB, 6 * MIB)
    program = "import sys; from rakuten_nb.data.download import download_catalog; download_catalog(sys.argv[1], 'images', sys.argv[2])"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "out"), hub.url], env=env | {"NO_PROXY": "*"}, cwd=tmp_path)
    try:
        while process.poll() is None and hub.sent(ARCHIVE) < kill_at: time.sleep(0.001)
    finally: process.kill()
    assert process.wait() == -signal.SIGKILL, "it was still at work"
    hub.pause = 0
    time.sleep(0.1) # until the server has noticed
    first = hub.sent(ARCHIVE)
    assert visible(tmp_path / "out") == {}
    fetch(hub, tmp_path / "out", "images")
    again = [r["start"] for r in hub.seen if not r["probe"]][-1]
    assert 0 < again <= first and first - again <= MIB
    assert len(visible(tmp_path / "out")) > 200

def test_a_run_killed_while_it_unpacks_goes_on(hub: HubServer, tmp_path: Path, env: dict[str, str]) -> None:
    stop = """
import os, signal, sys
import rakuten_nb.data.download as d
work, left = d.unpack_member, 150
def dying(*args):
    global left
    left -= 1
    if not left: os.kill(os.getpid(), signal.SIGKILL)
    work(*args)
d.unpack_member = dying
d.download_catalog(sys.argv[1], 'images', sys.argv[2])
"""
    answer = subprocess.run([sys.executable, "-c", stop, str(tmp_path / "out"), hub.url], env=env | {"NO_PROXY": "*"}, cwd=tmp_path, check=False)
    assert answer.returncode == -signal.SIGKILL and visible(tmp_path / "out") == {}
    unpacked = {p: p.stat().st_mtime_ns for p in (tmp_path / "out/.download/unpacking").rglob("*.jpg")}
    assert len(unpacked) == 149
    next(iter(unpacked)).write_bytes(b"half") # what a power cut may leave
    fetch(hub, tmp_path / "out", "images")
    there = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.jpg")}
    assert sum(there[p.name] == stamp for p, stamp in unpacked.items()) == 148, "what was right is not written again"
    with zipfile.ZipFile(io.BytesIO(hub.files[ARCHIVE])) as z:
        assert all((tmp_path / "out" / n.removeprefix("images/")).read_bytes() == z.read(n) for n in z.namelist() if n.endswith(".jpg"))
    assert hub.sent(ARCHIVE) <= len(hub.files[ARCHIVE]) + 1, "one byte, to ask whether it is the same still"
    assert not (tmp_path / "out/.download/unpacking").exists()

def test_two_downloads_to_one_folder_do_not_mix(hub: HubServer, tmp_path: Path) -> None:
    said: list[str] = []
    def second(name: str) -> None:
        hub.before = lambda name: None
        said.append(refused(hub, tmp_path / "out"))
    hub.before = second
    fetch(hub, tmp_path / "out", "text")
    assert len(said) == 1 and "another download to this folder is running" in said[0]

# --- changes

@pytest.mark.parametrize("ranges", ["keeps to If-Range", "ignores If-Range", "knows no ranges"])
def test_a_part_is_never_glued_to_another_file(hub: HubServer, tmp_path: Path, ranges: str) -> None:
    hub.cuts, hub.ranges = {ARCHIVE: [2 * MIB], X: [5000]}, ranges != "knows no ranges"
    for only in ("images", "text"): refused(hub, tmp_path / "out", only, Retry(total=0))
    hub.files[X] = hub.files[X].replace(b" ", b"_", 1) # another file of the same length
    if ranges == "ignores If-Range":
        plain = hub.answer
        def careless(h: BaseHTTPRequestHandler) -> None:
            del h.headers["If-Range"]
            plain(h)
        hub.answer = careless # type: ignore[method-assign]
    with pytest.warns(UserWarning, match="changed on the server") as told: fetch(hub, tmp_path / "out", "text")
    assert len(told) == 1 and visible(tmp_path / "out")[X] == hub.files[X]
    fetch(hub, tmp_path / "out", "images") # unchanged, and continued
    assert (hub.sent(ARCHIVE) > len(hub.files[ARCHIVE])) == (ranges == "knows no ranges")

def test_a_part_of_no_known_version_is_thrown_away(hub: HubServer, tmp_path: Path) -> None:
    hub.etags, hub.cuts[X] = False, [5000]
    fetch(hub, tmp_path / "out", "text")
    assert [r["start"] for r in hub.seen if r["file"] == X] == [0, 0] and visible(tmp_path / "out")[X] == hub.files[X]

def test_a_file_changed_on_the_server_leaves_the_old_one(rakuten: Run, hub: HubServer, tmp_path: Path) -> None:
    fetch(hub, tmp_path / "out")
    old = hub.files[Y]
    for new in (old + b"400,10\n", old.replace(b",10\n", b",40\n", 1)): # another length, and the same one
        hub.files[Y] = new
        hub.seen.clear()
        assert re.search(r"Y_train_CVw08PX.csv: changed on the server: expected .*; found .*; the old file stays", refused(hub, tmp_path / "out"))
        assert all(r["probe"] for r in hub.seen) == (len(new) != len(old)), "fetched only where the length leaves it open"
    answer = rakuten("download", tmp_path / "out", "--base-url", hub.url)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "changed on the server" in answer.stderr
    assert any(line["message"] == "refused" for line in logged(tmp_path))
    hub.files[Y], hub.headers[Y] = old, {"ETag": '"another machine"'}
    assert fetch(hub, tmp_path / "out")[Y] == "there already, the same content on the server"

def test_what_somebody_mended_by_hand_is_not_overwritten(hub: HubServer, tmp_path: Path) -> None:
    fetch(hub, tmp_path / "out")
    (tmp_path / "out" / Y).write_bytes(hub.files[Y] + b"400,2583\n")
    assert f"{tmp_path / 'out' / Y}: expected {len(hub.files[Y]):,} bytes" in refused(hub, tmp_path / "out")
    (tmp_path / "out" / Y).unlink()
    next((tmp_path / "out/image_test").iterdir()).unlink()
    assert "image_test: expected" in refused(hub, tmp_path / "out", "images")
    fetch(hub, tmp_path / "out", "text")
    assert (tmp_path / "out" / Y).read_bytes() == hub.files[Y]

# --- sizes and checksums

def linked(content: bytes, **wrong: str) -> dict[str, str]:
    "What the hub says on its redirect."
    return {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha256(content).hexdigest()}"'} | wrong

def test_the_hub_s_redirect_is_followed_and_believed(hub: HubServer, tmp_path: Path) -> None:
    with HubServer(dict(hub.files), cuts={ARCHIVE: [MIB, 2 * MIB, MIB]}) as cdn:
        cdn.headers = {n: {"ETag": f'"{"ab" * 32}"'} for n in hub.files} # looks like a SHA-256 and is none
        plain = cdn.answer
        def sloppy(h: BaseHTTPRequestHandler) -> None:
            del h.headers["If-Range"] # it would be the wrong one for this server's own idea of an ETag
            plain(h)
        cdn.answer = sloppy # type: ignore[method-assign]
        hub.moved = {n: (f"http://localhost:{cdn.port}/cdn/{n}?Signature=secret", linked(c)) for n, c in hub.files.items()}
        base = hub.url.replace("http://", "http://me:hush@")
        download_catalog(tmp_path / "out", base_url=base, patience=AT_ONCE)
        assert cdn.sent(ARCHIVE) == len(hub.files[ARCHIVE])
        assert all("Authorization" in r["headers"] for r in hub.seen) and not any("Authorization" in r["headers"] for r in cdn.seen)
        hub.moved[X] = (hub.moved[X][0], linked(b"another"))
        with pytest.raises(InputError) as e: download_catalog(tmp_path / "out", base_url=base, patience=AT_ONCE)
    told = f"{e.value} {logged(tmp_path)} {[p.read_text() for p in (tmp_path / 'out/.download').iterdir()]}"
    assert "wrong size" in str(e.value) and "hush" not in told and "secret" not in told

WRONG = { # what is wrong → further headers of the answer, part of the line
    "a checksum": ({"ETag": f'"{"0" * 64}"'}, r"wrong content: expected SHA-256 0{64}; found [0-9a-f]{64}"),
    "a size": ({"X-Linked-Size": "12345"}, r"wrong size: expected 12,345 bytes, as the hub says; found [\d,]+"),
    "no size": ({"Content-Length": "", "Transfer-Encoding": "identity"}, "says how long the file is"),
    "a length beyond the end": ({"Content-Length": "99999999"}, r"given up after \d tries: "),
    "more than any disk has": ({"Content-Length": str(10**18)}, r": not enough disk space for X_train_update.csv: expected 1(,000){6} bytes free"),
    "another coding": ({"Content-Encoding": "gzip"}, "expected the file as it is; found it sent as gzip"),
}

@pytest.mark.parametrize("case", WRONG)
def test_an_answer_that_is_wrong_is_refused(hub: HubServer, tmp_path: Path, case: str) -> None:
    headers, said = WRONG[case]
    hub.headers[X] = headers
    assert re.search(said, refused(hub, tmp_path / "out", "text", AT_ONCE.new(total=2)))
    assert not (tmp_path / "out" / X).exists()

def test_a_checksum_that_fails_after_a_cut_is_tried_once_more(hub: HubServer, tmp_path: Path) -> None:
    hub.headers[X], hub.cuts[X] = {"ETag": f'"{sha256(hub.files[X]).hexdigest()}"'}, [5000]
    plain = hub.files[X]
    hub.files[X] = b"?" * 100 + plain[100:] # spoilt on the way, until the cut
    def mend(name: str) -> None:
        if hub.sent(X): hub.files[X] = plain
    hub.before = mend
    hub.headers[X]["ETag"] = f'"{sha256(plain).hexdigest()}"'
    server_answer = hub.answer
    def careless(h: BaseHTTPRequestHandler) -> None:
        del h.headers["If-Range"]
        server_answer(h)
    hub.answer = careless # type: ignore[method-assign]
    fetch(hub, tmp_path / "out", "text")
    assert [r["start"] for r in hub.seen if r["file"] == X] == [0, 5000, 0] and visible(tmp_path / "out")[X] == plain

# --- refusals of the server

@pytest.mark.parametrize("status", [401, 403, 404, 410, 418])
def test_a_refusal_is_one_line(hub: HubServer, tmp_path: Path, status: int) -> None:
    hub.statuses = [(status, {})]
    assert re.search(rf"X_test_update.csv: expected the file; found {status} ", refused(hub, tmp_path / "out"))
    assert len(hub.seen) == 1 and not (tmp_path / "out").exists()

def test_a_404_on_the_command_line(rakuten: Run, hub: HubServer, tmp_path: Path) -> None:
    del hub.files[ARCHIVE]
    answer = rakuten("download", tmp_path / "other", "--base-url", hub.url)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1 and "404" in answer.stderr and "RAKUTEN_DOWNLOAD_URL" in answer.stderr
    assert visible(tmp_path / "other") == {}, "tables wait for their pictures"

def test_a_storm_of_503_is_sat_out_or_given_up(hub: HubServer, tmp_path: Path) -> None:
    hub.statuses = [(503, {})] * 3 + [(429, {"Retry-After": "0"}), (502, {})]
    fetch(hub, tmp_path / "out", "text")
    assert [(line["reason"], line["wait"]) for line in logged(tmp_path) if line["message"] == "retry"] == [
        ("503 Service Unavailable", 0)] * 3 + [("429 Too Many Requests", 0), ("502 Bad Gateway", 0)]
    hub.seen.clear()
    hub.statuses = [(503, {})] * 100
    assert "given up after 7 tries: 503 Service Unavailable" in refused(hub, tmp_path / "other", "text")
    assert len(hub.seen) == 7

def test_a_server_that_asks_for_time_gets_it(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("rakuten_nb.data.download.time.sleep", waits.append)
    hub.statuses = [(503, {"Retry-After": "7"}), (429, {"Retry-After": "11"})]
    fetch(hub, tmp_path / "out", "text")
    assert [w for w in waits if w] == [7, 11]
    hub.statuses = [(503, {"Retry-After": "3600"})]
    assert "asks to come back in 3,600 seconds" in refused(hub, tmp_path / "other", "text")

def test_waits_double_with_something_random() -> None:
    left, waits = PATIENCE, []
    for _ in range(6):
        left = left.increment("GET", "/", error=OSError("cut"))
        waits.append(left.get_backoff_time())
    assert waits[0] == 0 and all(w <= found <= w + 1 for w, found in zip((1, 2, 4, 8, 16), waits[1:], strict=True))
    assert any(w % 1 for w in waits)

def test_nobody_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
    for url, said in ((f"http://127.0.0.1:{port}/", "given up after 3 tries: Connection refused"), ("http://nobody.invalid/", "given up after 3 tries: "),
                      ("file:///etc/", "expected an address"), ("ftp://127.0.0.1/", "expected an address")):
        with pytest.raises(InputError, match=re.escape(said)) as e: download_catalog(tmp_path / "out", base_url=url, patience=AT_ONCE)
        assert "\n" not in str(e.value) and not (tmp_path / "out").exists()

def test_a_redirect_to_a_file_is_not_followed(hub: HubServer, tmp_path: Path) -> None:
    hub.moved = {"X_test_update.csv": ("file:///etc/hostname", {})}
    assert "X_test_update.csv" in refused(hub, tmp_path / "out")
    hub.moved = {"X_test_update.csv": (f"{hub.url}X_test_update.csv", {})}
    assert "more than 10 redirects" in refused(hub, tmp_path / "out")

def test_a_proxy_of_the_environment_is_used(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            passed.append(self.path)
            there = HTTPConnection("127.0.0.1", hub.port)
            there.request("GET", urlsplit(self.path).path, headers={k: v for k, v in self.headers.items() if k in ("Range", "If-Range")})
            answer = there.getresponse()
            self.send_response(answer.status)
            for k, v in answer.getheaders(): self.send_header(k, v)
            self.end_headers()
            with suppress(OSError): self.wfile.write(answer.read())
            there.close()
        def log_message(self, *args: object) -> None: pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}") # read where a library writes it in small letters too
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    try: download_catalog(tmp_path / "out", "text", "http://only-the-proxy-knows.invalid/main/", patience=AT_ONCE)
    finally:
        server.shutdown()
        server.server_close()
    assert sorted(urlsplit(p).path for p in passed) == sorted(f"/main/{n}" for n in TABLES) and "only-the-proxy-knows.invalid" in passed[0]
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="given up after 3 tries: the proxy: "): download_catalog(tmp_path / "other", "text", hub.url, patience=AT_ONCE)

# --- disks

def test_a_full_disk_while_writing_keeps_what_came(hub: HubServer, tmp_path: Path, env: dict[str, str]) -> None:
    limit = 3 * MIB + 1000 # bytes: the largest file that this process may write: its disk is full there
    def small_disk() -> None: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    command = [sys.executable, "-m", "rakuten_nb.cli", "download", str(tmp_path / "out"), "--base-url", hub.url]
    quiet = env | {"NO_PROXY": "*", "PYTHONDONTWRITEBYTECODE": "1"}
    answer = subprocess.run(command, env=quiet, cwd=tmp_path, preexec_fn=small_disk, capture_output=True, text=True, check=False)
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1, answer.stderr
    assert "images.zip.part: cannot be written: File too large: what has arrived is kept" in answer.stderr
    assert visible(tmp_path / "out") == {} and (tmp_path / "out/.download/images.zip.part").stat().st_size == limit
    fetch(hub, tmp_path / "out")
    assert [r["start"] for r in hub.seen if r["file"] == ARCHIVE] == [0, limit] and len(visible(tmp_path / "out")) > 200

def test_unpacking_asks_for_room_first(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size, real = len(hub.files[ARCHIVE]), shutil.disk_usage
    monkeypatch.setattr("rakuten_nb.data.download.shutil.disk_usage", lambda p: real(p)._replace(free=size)) # enough for the archive, not for its pictures
    assert "not enough disk space for the pictures that are unpacked: expected" in refused(hub, tmp_path / "out", "images")
    monkeypatch.undo()
    fetch(hub, tmp_path / "out", "images")
    assert hub.sent(ARCHIVE) <= size + 1, "the archive is not fetched again"

# --- archives

def archive(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    "An archive of these."
    with warnings.catch_warnings(), zipfile.ZipFile(b := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as z:
        warnings.simplefilter("ignore")
        for name, data in members: z.writestr(name, data)
    return b.getvalue()

def linking() -> zipfile.ZipInfo:
    "A member that is a symbolic link."
    info = zipfile.ZipInfo("images/image_train/image_5_product_6.jpg")
    info.external_attr = 0o120777 << 16
    return info

def shrunk(content: bytes) -> bytes:
    "The directory says that the first member has half the bytes that it has."
    at = content.index(b"PK\x01\x02") + 24
    return content[:at] + (int.from_bytes(content[at : at + 4], "little") // 2).to_bytes(4, "little") + content[at + 4 :]

def locked(content: bytes) -> bytes:
    "The directory says that the first member is encrypted."
    at = content.index(b"PK\x01\x02") + 8
    return content[:at] + bytes([content[at] | 1]) + content[at + 1 :]

def folded(content: bytes) -> bytes:
    "The second member of the directory lies where the first one does."
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4) + 42
    return content[:second] + (0).to_bytes(4, "little") + content[second + 4 :]

A, B = "images/image_train/image_1_product_2.jpg", "images/image_train/image_3_product_4.jpg"
TWO = archive((A, random.Random(1).randbytes(3000)), (B, random.Random(2).randbytes(3000)))
BAD = { # what it is → the archive, part of the line
    "leads out": (archive((A, b"1"), ("../outside.jpg", b"2")), "member '../outside.jpg': its name leads out"),
    "leads out, deeper": (archive((A, b"1"), ("images/image_train/../../../outside.jpg", b"2")), "its name leads out"),
    "absolute": (archive((A, b"1"), ("/outside.jpg", b"2")), "its name leads out"),
    "backslashes": (archive((A, b"1"), ("..\\outside.jpg", b"2")), "its name leads out"),
    "drive": (archive((A, b"1"), ("C:outside.jpg", b"2")), "not one of this system"),
    "link": (archive((A, b"1"), (linking(), b"/etc/passwd")), "a link or a device"),
    "encrypted": (locked(TWO), "it is encrypted"),
    "twice": (archive((A, b"1"), (A, b"2")), "given twice"),
    "twice in two places": (archive((A, b"1"), (A.removeprefix("images/"), b"2")), "given twice"),
    "bomb": (archive((A, bytes(65 * MIB))), "which hardly shrink"),
    "says less than it has": (shrunk(TWO), "CRC"),
    "one within the other": (folded(TWO), "lies within another"),
    "damaged": (TWO[:500] + bytes(8) + TWO[508:], "image_1_product_2.jpg"),
    "cut short": (TWO[:-100], "not a zip file"),
    "a page of a log-in": (b"<html>log in first</html>", "not a zip file"),
    "no pictures": (archive(("README.txt", b"elsewhere")), "found none"),
}

@pytest.mark.parametrize("case", BAD)
def test_a_bad_archive_is_refused_whole(hub: HubServer, tmp_path: Path, case: str) -> None:
    hub.files[ARCHIVE], said = BAD[case]
    line = refused(hub, tmp_path / "deep/out", "images")
    assert "images.zip: cannot be unpacked: " in line and said in line
    assert [p for p in tmp_path.rglob("*") if p.suffix in {".jpg", ".zip", ".part"} or "outside" in p.name] == []

def test_tables_that_are_none_are_thrown_away(hub: HubServer, tmp_path: Path) -> None:
    hub.files[X], good = b"<html>log in first</html>", hub.files[X]
    assert "the tables are not those of a catalogue" in refused(hub, tmp_path / "out", "text")
    hub.files[X] = good
    fetch(hub, tmp_path / "out", "text")
    assert set(visible(tmp_path / "out")) == set(TABLES)

# --- the import stage

def test_the_import_keeps_the_download_outside(hub: HubServer, tmp_path: Path, sample_catalog: Path) -> None:
    raw = tmp_path / "project/data/raw"
    import_catalog(raw, hub=hub.url)
    assert visible(sample_catalog).items() <= visible(raw).items() and not (raw / ".download").exists()
    picture = next((raw / "image_train").iterdir())
    assert picture.stat().st_nlink == 2 and (raw / X).stat().st_nlink == 1, "pictures are links, tables are copies"
    shutil.rmtree(raw) # as DVC does before a stage runs again
    hub.seen.clear()
    import_catalog(raw, hub=hub.url)
    assert sum(r["sent"] for r in hub.seen) <= 4 and visible(sample_catalog).items() <= visible(raw).items()
    done = [line for line in logged(tmp_path) if line["message"] == "import done"]
    assert len(done) == 2 and done[0]["train_rows"] == 400 and done[0]["origin"] == hub.url

def test_a_directory_and_a_hub_are_one_too_many(tmp_path: Path, sample_catalog: Path) -> None:
    with pytest.raises(InputError, match="expected a catalogue directory or a hub; found both"): import_catalog(tmp_path / "raw", sample_catalog, hub="default")
    assert not (tmp_path / "raw").exists()
