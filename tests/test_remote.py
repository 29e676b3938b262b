"""Data and models to a remote storage and back, by the settings alone, against an S3 server on loopback.

A small DVC project runs once; each test takes a copy. The server asks for credentials, as a real one does."""
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import moto.settings
import pytest
from api_process import free_port
from conftest import once
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from rakuten_nb.config import read_settings
from rakuten_nb.errors import InputError, RakutenError
from rakuten_nb.operations import remote

BUCKET, FOLDER = "rakuten", "data"
PIPELINE = """stages:
  prepare:
    cmd: python prepare.py
    deps: [prepare.py]
    outs: [data/preprocessed]
  learn:
    cmd:
      - mkdir -p models metrics
      - cat data/preprocessed/*.txt > models/weights.bin
      - echo '{"f1":0.5}' > metrics/gold.json
    deps: [data/preprocessed]
    outs: [models/weights.bin]
    metrics: [metrics/gold.json]
"""
PREPARE = """from pathlib import Path
folder = Path("data/preprocessed/été")
folder.mkdir(parents=True)
for i in range(12): (folder.parent / f"{i}.txt").write_text(f"product {i}\\n" * 50)
(folder / "empty").touch()
(folder / "large.bin").write_bytes(bytes(range(256)) * 4096)
"""
MADE = ("data/preprocessed", "models", "metrics") # what the pipeline makes
Tell = Callable[..., subprocess.CompletedProcess[str]]

# --- an S3 server

def without_folder(app: Callable[..., Any]) -> Callable[..., Any]:
    "Answers below /OWNER/REPOSITORY.s3 too, as DagsHub does."
    def at_the_top(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        path = environ["PATH_INFO"]
        if ".s3/" in path: environ |= {name: environ[name].partition(".s3")[2] for name in ("PATH_INFO", "RAW_URI", "REQUEST_URI") if name in environ}
        return app(environ, start_response)
    return at_the_top

@dataclass
class Storage:
    "A running S3 server; what is asked of it here is asked as its owner."
    port: int
    owner: dict[str, str]

    @property
    def url(self) -> str:
        "Where it listens."
        return f"http://127.0.0.1:{self.port}"

    def client(self, service: str = "s3") -> Any:
        "A client of the owner's."
        keys = {"aws_access_key_id": self.owner["AWS_ACCESS_KEY_ID"], "aws_secret_access_key": self.owner["AWS_SECRET_ACCESS_KEY"]}
        return boto3.client(service, endpoint_url=self.url, region_name="us-east-1", **keys)

    def user(self, name: str, *actions: str) -> dict[str, str]:
        "The settings of a new user who may do this much."
        iam = self.client("iam")
        iam.create_user(UserName=name)
        allowed = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": list(actions), "Resource": "*"}]}
        iam.put_user_policy(UserName=name, PolicyName="may", PolicyDocument=json.dumps(allowed))
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def objects(self, bucket: str = BUCKET) -> dict[str, int]:
        "Names and sizes of what lies there."
        return {o["Key"]: o["Size"] for o in self.client().list_objects_v2(Bucket=bucket).get("Contents", [])}

    def ask_for_credentials(self, asked: bool) -> None:
        "Whether a request without good credentials is refused."
        moto.settings.INITIAL_NO_AUTH_ACTION_COUNT = 0 if asked else float("inf")

@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    "An S3 server of this module's, with an owner and no bucket."
    server = make_server("127.0.0.1", 0, without_folder(DomainDispatcherApplication(create_backend_app)), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    running = Storage(server.server_port, {"AWS_ACCESS_KEY_ID": "unknown", "AWS_SECRET_ACCESS_KEY": "unknown"})
    running.owner = running.user("owner", "*")
    running.ask_for_credentials(True)
    yield running
    running.ask_for_credentials(False)
    server.shutdown()
    thread.join()

@pytest.fixture
def bucket(storage: Storage) -> Iterator[str]:
    "An empty bucket."
    s3 = storage.client()
    s3.create_bucket(Bucket=BUCKET)
    yield BUCKET
    for key in storage.objects(): s3.delete_object(Bucket=BUCKET, Key=key)
    s3.delete_bucket(Bucket=BUCKET)

# --- a project

@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "No credentials or proxies of this machine's; DVC's notes about storages in a folder of this test's."
    for name in list(os.environ):
        if name.startswith(("AWS_", "DAGSHUB_", "RAKUTEN_REMOTE")) or name.lower() in ("http_proxy", "https_proxy", "all_proxy"): monkeypatch.delenv(name)
    (empty := tmp_path / "empty").touch()
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"): monkeypatch.setenv(name, str(empty))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))

@pytest.fixture(scope="module")
def ran(shared: Path, env: dict[str, str]) -> Path:
    "A small DVC project that has run."
    def make(part: Path) -> None:
        files = {"dvc.yaml": PIPELINE, "prepare.py": PREPARE, "settings.ini": "", ".dvcignore": ""}
        for name, text in files.items(): (part / name).write_text(text, encoding="utf-8")
        (part / ".dvc").mkdir()
        (part / ".dvc/config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
        programs = f"{Path(sys.executable).parent}:{env['PATH']}"
        subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=part, env=env | {"PATH": programs}, check=True, capture_output=True)
    return once(shared / "ran", make)

@pytest.fixture
def project(ran: Path, tmp_path: Path) -> Path:
    "A copy of it."
    return Path(shutil.copytree(ran, tmp_path / "project", symlinks=True))

def clone(project: Path, to: Path) -> Path:
    "What a colleague gets from git where dvc.lock is committed."
    return Path(shutil.copytree(project, to, symlinks=True, ignore=shutil.ignore_patterns("data", "models", "metrics", "cache", "tmp", ".env")))

def made(project: Path) -> dict[str, bytes]:
    "The files that the pipeline made."
    return {p.relative_to(project).as_posix(): p.read_bytes() for top in MADE for p in (project / top).rglob("*") if p.is_file()}

def write_settings(project: Path, **settings: str) -> None:
    "The project's .env."
    (project / ".env").write_text("".join(f"{k}={v}\n" for k, v in settings.items()), encoding="utf-8")

def s3_settings(storage: Storage, **changed: str) -> dict[str, str]:
    "The settings that lead to the bucket."
    return {"RAKUTEN_REMOTE_URL": f"s3://{BUCKET}/{FOLDER}", "RAKUTEN_REMOTE_ENDPOINT": storage.url} | storage.owner | changed

def push(project: Path) -> list[remote.Transfer]:
    "In this process, with the settings of the project's .env."
    return remote.push(project, read_settings(project / ".env"))

def pull(project: Path) -> remote.Transfer:
    "The same for fetching."
    return remote.pull(project, read_settings(project / ".env"))

@pytest.fixture
def command(env: dict[str, str]) -> Tell:
    "Runs a command line in a project."
    def run(project: Path, module: str, *words: str) -> subprocess.CompletedProcess[str]:
        ours = {k: os.environ[k] for k in os.environ if k.startswith(("AWS_", "DVC_"))}
        without = {k: v for k, v in env.items() if not k.startswith(("AWS_", "DAGSHUB_")) and not k.lower().endswith("_proxy")}
        return subprocess.run([sys.executable, "-m", module, *words], cwd=project, env=without | ours, capture_output=True, text=True, check=False)
    return run

# --- there and back

def test_a_colleague_gets_what_was_pushed(project: Path, tmp_path: Path, storage: Storage, bucket: str, command: Tell) -> None:
    write_settings(project, **s3_settings(storage))
    pushed = command(project, "rakuten_nb.cli", "data", "push")
    assert pushed.returncode == 0, pushed.stderr
    colleague = clone(project, tmp_path / "colleague")
    write_settings(colleague, **s3_settings(storage))
    (colleague / "nbs").mkdir()
    pulled = command(colleague / "nbs", "rakuten_nb.cli", "data", "pull") # from any folder of the project
    assert pulled.returncode == 0, pulled.stderr
    assert made(colleague) == made(project) and len(made(project)) == 16
    assert "up to date" in command(colleague, "dvc", "status").stdout
    said = pushed.stdout + pushed.stderr + pulled.stdout + pulled.stderr
    kept = [p.read_bytes() for top in (project, colleague, tmp_path / "site") for p in top.rglob("*") if p.is_file() and p.name != ".env"]
    for secret in storage.owner.values():
        assert secret not in said
        assert not any(secret.encode() in text for text in kept), "a secret was written to a file"

def test_a_wiped_cache_is_filled_again(project: Path, storage: Storage, bucket: str) -> None:
    write_settings(project, **s3_settings(storage))
    before = made(project)
    assert [t.files for t in push(project)] == [len(set(before.values())) + 1], "every content once, and the list of the folder"
    assert [t.files for t in push(project)] == [0], "nothing is sent twice"
    for top in (".dvc/cache", *MADE): shutil.rmtree(project / top)
    assert pull(project).files == len(set(before.values())) + 1
    assert made(project) == before
    assert pull(project).files == 0

def test_only_what_is_missing_is_sent(project: Path, storage: Storage, bucket: str) -> None:
    write_settings(project, **s3_settings(storage))
    push(project)
    lost = max(storage.objects().items(), key=lambda o: o[1])[0]
    listed = next(key for key in storage.objects() if key.endswith(".dir"))
    for key in (lost, listed): storage.client().delete_object(Bucket=BUCKET, Key=key)
    assert [t.files for t in push(project)] == [2]

# --- what is refused

def one_line(error: BaseException, storage: Storage) -> str:
    "The message of an error, which is one line and tells no secret."
    said = str(error)
    assert "\n" not in said and "Traceback" not in said
    assert not any(value in said for value in storage.owner.values())
    return said

REFUSED: dict[str, tuple[dict[str, str], int, tuple[str, ...]]] = { # what is set otherwise, the exit code, what the line names
    "wrong secret": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 2, ("SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY")),
    "unknown key": ({"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}, 2, ("InvalidAccessKeyId", "AWS_ACCESS_KEY_ID")),
    "half a key": ({"AWS_SECRET_ACCESS_KEY": ""}, 2, ("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "only one")),
    "no key": ({"AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY_ID": ""}, 2, ("no key to it", "AWS_ACCESS_KEY_ID")),
    "no bucket": ({"RAKUTEN_REMOTE_URL": "s3://elsewhere/data"}, 2, ("no bucket 'elsewhere'", "RAKUTEN_REMOTE_URL")),
    "no name of a bucket": ({"RAKUTEN_REMOTE_URL": "s3://Not_A/data"}, 2, ("'Not_A'", "RAKUTEN_REMOTE_URL")),
    "nobody listens": ({"RAKUTEN_REMOTE_ENDPOINT": f"http://127.0.0.1:{free_port()}"}, 1, ("does not answer", "RAKUTEN_REMOTE_ENDPOINT")),
    "no address": ({"RAKUTEN_REMOTE_ENDPOINT": "minio"}, 2, ("RAKUTEN_REMOTE_ENDPOINT",)),
    "another protocol": ({"RAKUTEN_REMOTE_URL": "gs://rakuten/data"}, 2, ("RAKUTEN_REMOTE_URL", "s3://bucket/folder", "gs://rakuten/data")),
    "no storage": ({"RAKUTEN_REMOTE_URL": ""}, 2, ("RAKUTEN_REMOTE_URL", ".env")),
    "no such directory": ({"RAKUTEN_REMOTE_URL": "disk/rakuten"}, 2, ("disk/rakuten", "no such directory")),
}

@pytest.mark.parametrize("how", REFUSED)
def test_refused_in_one_line(how: str, project: Path, storage: Storage, bucket: str, capfd: pytest.CaptureFixture[str]) -> None:
    changed, code, named = REFUSED[how]
    write_settings(project, **s3_settings(storage, **changed))
    before = made(project)
    for move in (push, pull):
        with pytest.raises(RakutenError) as e: move(project)
        said = one_line(e.value, storage)
        assert e.value.exit_code == code
        for word in named: assert word in said
    assert made(project) == before and storage.objects() == {}
    assert "".join(capfd.readouterr()) == "", "no report of DVC's beside the line"

def test_the_command_says_it_in_one_line_too(project: Path, storage: Storage, bucket: str, command: Tell) -> None:
    write_settings(project, **s3_settings(storage, AWS_SECRET_ACCESS_KEY="wrong"))
    answer = command(project, "rakuten_nb.cli", "data", "push")
    assert (answer.returncode, answer.stdout, len(answer.stderr.splitlines())) == (2, "", 1), answer.stderr
    assert answer.stderr.startswith("error: s3://rakuten/data at http://127.0.0.1")

def test_who_may_only_read_sends_nothing(project: Path, storage: Storage, bucket: str, capfd: pytest.CaptureFixture[str]) -> None:
    reader = storage.user("reader", "s3:ListBucket", "s3:GetObject", "s3:HeadObject")
    write_settings(project, **s3_settings(storage, **reader))
    with pytest.raises(InputError, match=r"files were not sent; .*: access is refused \(AccessDenied\)") as e: push(project)
    one_line(e.value, storage)
    assert "".join(capfd.readouterr()) == ""
    storage.client("iam").delete_user_policy(UserName="reader", PolicyName="may")

def test_before_the_first_run_there_is_nothing_to_send(project: Path, storage: Storage, bucket: str) -> None:
    write_settings(project, **s3_settings(storage))
    (project / "dvc.lock").unlink()
    with pytest.raises(InputError, match=r"dvc\.lock: not there.*`dvc repro` writes one"): push(project)
    with pytest.raises(InputError, match=r"dvc\.lock: not there.*committed with the code"): pull(project)

@contextmanager
def answering(answer: bytes | None) -> Iterator[str]:
    "The address of a server that says this to everything, or takes connections and says nothing."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if answer is None: over.wait(60)
            else: self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n" + answer)
        def log_message(self, format: str, *args: object) -> None: "Nothing."
    over = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally:
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()

def test_something_else_listens_there(project: Path, storage: Storage) -> None:
    with answering(b"<html>welcome") as url:
        write_settings(project, **s3_settings(storage, RAKUTEN_REMOTE_ENDPOINT=url))
        with pytest.raises(RakutenError, match="or is no S3 server; check RAKUTEN_REMOTE_URL and RAKUTEN_REMOTE_ENDPOINT"): push(project)

def test_waiting_is_bounded(project: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remote.S3_OPTIONS["connect_timeout"] <= 10 and remote.S3_OPTIONS["read_timeout"] <= 30
    monkeypatch.setitem(remote.S3_OPTIONS, "read_timeout", 1)
    with answering(None) as url:
        write_settings(project, **s3_settings(storage, RAKUTEN_REMOTE_ENDPOINT=url))
        start = time.monotonic()
        with pytest.raises(RakutenError, match="it does not answer"): push(project)
        assert time.monotonic() - start < 40, "the silent server lets go after a minute"

# --- what is missing or damaged over there

def test_a_pull_that_lacks_files_changes_nothing(project: Path, tmp_path: Path, storage: Storage, bucket: str) -> None:
    write_settings(project, **s3_settings(storage))
    push(project)
    largest = max(storage.objects().items(), key=lambda o: o[1])[0]
    storage.client().delete_object(Bucket=BUCKET, Key=largest)
    colleague = clone(project, tmp_path / "colleague")
    write_settings(colleague, **s3_settings(storage))
    (colleague / "models").mkdir()
    (colleague / "models/weights.bin").write_bytes(b"the colleague's own")
    with pytest.raises(InputError, match=r"it lacks 1 file \(data/preprocessed/été/large.bin\) of this version.*`make data-push`"): pull(colleague)
    assert made(colleague) == {"models/weights.bin": b"the colleague's own"}
    push(project)
    shutil.rmtree(colleague / "models")
    pull(colleague)
    assert made(colleague) == made(project)

def test_a_file_damaged_over_there_is_not_taken(project: Path, tmp_path: Path, storage: Storage, bucket: str) -> None:
    write_settings(project, **s3_settings(storage))
    push(project)
    largest, size = max(storage.objects().items(), key=lambda o: o[1])
    storage.client().put_object(Bucket=BUCKET, Key=largest, Body=b"\0" * size)
    colleague = clone(project, tmp_path / "colleague")
    write_settings(colleague, **s3_settings(storage))
    with pytest.raises(InputError, match=r"large\.bin.*or has it damaged"): pull(colleague)
    assert made(colleague) == {}

def test_ones_own_file_is_not_overwritten(project: Path, storage: Storage, bucket: str) -> None:
    write_settings(project, **s3_settings(storage))
    push(project)
    (project / "models/weights.bin").unlink()
    (project / "models/weights.bin").write_bytes(b"never ran through the pipeline")
    with pytest.raises(RakutenError, match=r"1 file \(models/weights.bin\) here would be overwritten") as e: pull(project)
    one_line(e.value, storage)
    assert (project / "models/weights.bin").read_bytes() == b"never ran through the pipeline"

# --- DagsHub

def test_dagshub_is_the_storage_where_there_is_no_other(project: Path, tmp_path: Path, storage: Storage) -> None:
    storage.ask_for_credentials(False) # the path that was signed is not the one that this server sees
    storage.client().create_bucket(Bucket="dvc")
    settings = {"DAGSHUB_URL": storage.url, "DAGSHUB_USERNAME": "amelie", "DAGSHUB_TOKEN": "a-token-of-hers"}
    write_settings(project, **settings)
    assert push(project)[0].files == len(storage.objects("dvc")) > 0
    colleague = clone(project, tmp_path / "colleague")
    write_settings(colleague, **settings)
    pull(colleague)
    storage.ask_for_credentials(True)
    assert made(colleague) == made(project)

def test_a_mirror_that_is_away_is_one_warning(project: Path, storage: Storage, bucket: str, command: Tell) -> None:
    away = {"DAGSHUB_URL": f"http://127.0.0.1:{free_port()}", "DAGSHUB_USERNAME": "amelie", "DAGSHUB_TOKEN": "a-token-of-hers"}
    write_settings(project, **s3_settings(storage, **away))
    answer = command(project, "rakuten_nb.cli", "data", "push")
    assert answer.returncode == 0, answer.stderr
    assert len(storage.objects()) > 0
    assert answer.stderr.count("warning:") == 1 and "amelie/rakuten_nb.s3: it does not answer" in answer.stderr
    assert "a-token-of-hers" not in answer.stdout + answer.stderr

