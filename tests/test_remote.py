"""Data and models are pushed to a remote storage and pulled again, against an S3 server on loopback.

A small DVC project runs once; each test uses a copy. The server requires credentials, as a real one does."""
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
from conftest import Run, once
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
OUTPUTS = ("data/preprocessed", "models", "metrics") # folders that the pipeline writes

# --- an S3 server

def without_folder(app: Callable[..., Any]) -> Callable[..., Any]:
    "The same application, which also answers below /OWNER/REPOSITORY.s3, as DagsHub does."
    def at_the_root(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if ".s3/" in environ["PATH_INFO"]:
            paths = (name for name in ("PATH_INFO", "RAW_URI", "REQUEST_URI") if name in environ)
            environ |= {name: environ[name].partition(".s3")[2] for name in paths}
        return app(environ, start_response)
    return at_the_root

@dataclass
class Storage:
    "A running S3 server, used with its owner's credentials."
    port: int
    owner: dict[str, str]

    @property
    def url(self) -> str:
        "The address of the server."
        return f"http://127.0.0.1:{self.port}"

    def client(self, service: str = "s3") -> Any:
        "A client with the owner's credentials."
        key, secret = self.owner["AWS_ACCESS_KEY_ID"], self.owner["AWS_SECRET_ACCESS_KEY"]
        return boto3.client(service, endpoint_url=self.url, region_name="us-east-1",
                            aws_access_key_id=key, aws_secret_access_key=secret)

    def user(self, name: str, *actions: str) -> dict[str, str]:
        "Add a user with these permissions, and return the user's credentials as settings."
        iam = self.client("iam")
        iam.create_user(UserName=name)
        statement = {"Effect": "Allow", "Action": list(actions), "Resource": "*"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        iam.put_user_policy(UserName=name, PolicyName="may", PolicyDocument=document)
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}

    def objects(self, bucket: str = BUCKET) -> dict[str, int]: # name → bytes
        "The stored objects."
        return {o["Key"]: o["Size"] for o in self.client().list_objects_v2(Bucket=bucket).get("Contents", [])}

    def largest(self) -> tuple[str, int]: # name, bytes
        "The largest stored object."
        return max(self.objects().items(), key=lambda o: o[1])

    def delete(self, *names: str) -> None:
        "Delete objects."
        for name in names: self.client().delete_object(Bucket=BUCKET, Key=name)

    def require_credentials(self, required: bool) -> None:
        "Set whether a request without valid credentials is refused."
        moto.settings.INITIAL_NO_AUTH_ACTION_COUNT = 0 if required else float("inf")

@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    "An S3 server with an owner and no bucket."
    app = without_folder(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    running = Storage(server.server_port, {"AWS_ACCESS_KEY_ID": "unknown", "AWS_SECRET_ACCESS_KEY": "unknown"})
    running.owner = running.user("owner", "*")
    running.require_credentials(True)
    yield running
    running.require_credentials(False)
    server.shutdown()
    thread.join()

@pytest.fixture
def bucket(storage: Storage) -> Iterator[str]:
    "An empty bucket."
    s3 = storage.client()
    s3.create_bucket(Bucket=BUCKET)
    yield BUCKET
    storage.delete(*storage.objects())
    s3.delete_bucket(Bucket=BUCKET)

# --- a project

@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "An environment without credentials and proxies, and with a site cache of DVC for this test."
    for name in list(os.environ):
        private = name.startswith(("AWS_", "DAGSHUB_", "RAKUTEN_REMOTE"))
        if private or name.lower() in ("http_proxy", "https_proxy", "all_proxy"): monkeypatch.delenv(name)
    (empty := tmp_path / "empty").touch()
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"): monkeypatch.setenv(name, str(empty))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))

@pytest.fixture(scope="module")
def small_project(shared: Path, env: dict[str, str]) -> Path:
    "A small DVC project whose pipeline has run."
    def make(part: Path) -> None:
        files = {"dvc.yaml": PIPELINE, "prepare.py": PREPARE, "settings.ini": "", ".dvcignore": ""}
        for name, text in files.items(): (part / name).write_text(text, encoding="utf-8")
        (part / ".dvc").mkdir()
        (part / ".dvc/config").write_text("[core]\n    analytics = false\n    no_scm = true\n")
        own = env | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}
        subprocess.run([sys.executable, "-m", "dvc", "repro"], cwd=part, env=own, check=True, capture_output=True)
    return once(shared / "small_project", make)

@pytest.fixture
def project(small_project: Path, tmp_path: Path) -> Path:
    "A copy of the small project."
    return Path(shutil.copytree(small_project, tmp_path / "project", symlinks=True))

def clone(project: Path, to: Path) -> Path:
    "A copy of the files that git would track, dvc.lock included."
    ignore = shutil.ignore_patterns("data", "models", "metrics", "cache", "tmp", ".env")
    return Path(shutil.copytree(project, to, symlinks=True, ignore=ignore))

def outputs(project: Path) -> dict[str, bytes]: # relative path → content
    "The files that the pipeline wrote."
    files = (p for folder in OUTPUTS for p in (project / folder).rglob("*") if p.is_file())
    return {p.relative_to(project).as_posix(): p.read_bytes() for p in files}

def write_settings(project: Path, **settings: str) -> None:
    "Write the project's .env."
    (project / ".env").write_text("".join(f"{k}={v}\n" for k, v in settings.items()), encoding="utf-8")

def s3_settings(storage: Storage, **changed: str) -> dict[str, str]:
    "The settings that lead to the bucket."
    address = {"RAKUTEN_REMOTE_URL": f"s3://{BUCKET}/{FOLDER}", "RAKUTEN_REMOTE_ENDPOINT": storage.url}
    return address | storage.owner | changed

def push(project: Path) -> list[remote.Transfer]:
    "Push in this process, with the settings of the project's .env."
    return remote.push(project, read_settings(project / ".env"))

def pull(project: Path) -> remote.Transfer:
    "Pull in this process, with the settings of the project's .env."
    return remote.pull(project, read_settings(project / ".env"))

@pytest.fixture
def run_module(env: dict[str, str]) -> Run:
    "Runs a Python module as a command in a project."
    def run(project: Path, module: str, *words: str) -> subprocess.CompletedProcess[str]:
        of_test = {k: v for k, v in os.environ.items() if k.startswith(("AWS_", "DVC_"))}
        private = {k for k in env if k.startswith(("AWS_", "DAGSHUB_")) or k.lower().endswith("_proxy")}
        own = {k: v for k, v in env.items() if k not in private} | of_test
        command = [sys.executable, "-m", module, *words]
        return subprocess.run(command, cwd=project, env=own, capture_output=True, text=True, check=False)
    return run

# --- push and pull

def test_a_clone_pulls_what_was_pushed_and_stores_no_secret(
    project: Path, tmp_path: Path, storage: Storage, bucket: str, run_module: Run,
) -> None:
    write_settings(project, **s3_settings(storage))
    pushed = run_module(project, "rakuten_nb.cli", "data", "push")
    assert pushed.returncode == 0, pushed.stderr
    colleague = clone(project, tmp_path / "colleague")
    write_settings(colleague, **s3_settings(storage))
    (colleague / "nbs").mkdir()
    pulled = run_module(colleague / "nbs", "rakuten_nb.cli", "data", "pull") # any folder of the project will do
    assert pulled.returncode == 0, pulled.stderr
    assert outputs(colleague) == outputs(project) and len(outputs(project)) == 16
    assert "up to date" in run_module(colleague, "dvc", "status").stdout
    output = pushed.stdout + pushed.stderr + pulled.stdout + pulled.stderr
    files = (p for folder in (project, colleague, tmp_path / "site") for p in folder.rglob("*") if p.is_file())
    written = [p.read_bytes() for p in files if p.name != ".env"]
    for secret in storage.owner.values():
        assert secret not in output
        assert not any(secret.encode() in content for content in written), "a secret was written to a file"

def test_a_pull_restores_an_emptied_cache(project: Path, storage: Storage, bucket: str) -> None:
    write_settings(project, **s3_settings(storage))
    before = outputs(project)
    n_objects = len(set(before.values())) + 1 # each content once, and the list of the folder
    assert [t.files for t in push(project)] == [n_objects]
    assert [t.files for t in push(project)] == [0], "nothing is sent twice"
    for folder in (".dvc/cache", *OUTPUTS): shutil.rmtree(project / folder)
    assert pull(project).files == n_objects
    assert outputs(project) == before
    assert pull(project).files == 0

def test_a_push_sends_missing_files_only(project: Path, storage: Storage, bucket: str) -> None:
    write_settings(project, **s3_settings(storage))
    push(project)
    largest, _ = storage.largest()
    list_of_folder = next(name for name in storage.objects() if name.endswith(".dir"))
    storage.delete(largest, list_of_folder)
    assert [t.files for t in push(project)] == [2]

# --- refusals

def check_message(error: BaseException, storage: Storage) -> str: # the message
    "Assert that an error is one line without a secret."
    message = str(error)
    assert "\n" not in message and "Traceback" not in message
    assert not any(value in message for value in storage.owner.values())
    return message

ABSENT_SERVER = f"http://127.0.0.1:{free_port()}"
REFUSED: dict[str, tuple[dict[str, str], int, tuple[str, ...]]] = { # changed settings, exit code, words of the message
    "wrong secret": ({"AWS_SECRET_ACCESS_KEY": "wrong"}, 2, ("SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY")),
    "unknown key": ({"AWS_ACCESS_KEY_ID": "AKIAUNKNOWN"}, 2, ("InvalidAccessKeyId", "AWS_ACCESS_KEY_ID")),
    "half a key": ({"AWS_SECRET_ACCESS_KEY": ""}, 2, ("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", "only one")),
    "no key": ({"AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY_ID": ""}, 2, ("no key to it", "AWS_ACCESS_KEY_ID")),
    "missing bucket": ({"RAKUTEN_REMOTE_URL": "s3://elsewhere/data"}, 2,
                       ("no bucket 'elsewhere'", "RAKUTEN_REMOTE_URL")),
    "invalid bucket name": ({"RAKUTEN_REMOTE_URL": "s3://Not_A/data"}, 2, ("'Not_A'", "RAKUTEN_REMOTE_URL")),
    "absent server": ({"RAKUTEN_REMOTE_ENDPOINT": ABSENT_SERVER}, 1, ("does not answer", "RAKUTEN_REMOTE_ENDPOINT")),
    "invalid address": ({"RAKUTEN_REMOTE_ENDPOINT": "minio"}, 2, ("RAKUTEN_REMOTE_ENDPOINT",)),
    "another protocol": ({"RAKUTEN_REMOTE_URL": "gs://rakuten/data"}, 2,
                         ("RAKUTEN_REMOTE_URL", "s3://bucket/folder", "gs://rakuten/data")),
    "no storage": ({"RAKUTEN_REMOTE_URL": ""}, 2, ("RAKUTEN_REMOTE_URL", ".env")),
    "missing directory": ({"RAKUTEN_REMOTE_URL": "disk/rakuten"}, 2, ("disk/rakuten", "no such directory")),
}

@pytest.mark.parametrize("case", REFUSED)
def test_refuses_wrong_settings_in_one_line(
    case: str, project: Path, storage: Storage, bucket: str, capfd: pytest.CaptureFixture[str],
) -> None:
    changed, code, words = REFUSED[case]
    write_settings(project, **s3_settings(storage, **changed))
    before = outputs(project)
    for move in (push, pull):
        with pytest.raises(RakutenError) as e: move(project)
        message = check_message(e.value, storage)
        assert e.value.exit_code == code
        for word in words: assert word in message
    assert outputs(project) == before and storage.objects() == {}
    assert "".join(capfd.readouterr()) == "", "DVC writes nothing beside the message"

def test_the_command_line_refuses_a_wrong_secret_in_one_line(
    project: Path, storage: Storage, bucket: str, run_module: Run,
) -> None:
    write_settings(project, **s3_settings(storage, AWS_SECRET_ACCESS_KEY="wrong"))
    answer = run_module(project, "rakuten_nb.cli", "data", "push")
    assert (answer.returncode, answer.stdout, len(answer.stderr.splitlines())) == (2, "", 1), answer.stderr
    assert answer.stderr.startswith("error: s3://rakuten/data at http://127.0.0.1")

def test_a_push_without_write_permission_is_refused(
    project: Path, storage: Storage, bucket: str, capfd: pytest.CaptureFixture[str],
) -> None:
    reader = storage.user("reader", "s3:ListBucket", "s3:GetObject", "s3:HeadObject")
    write_settings(project, **s3_settings(storage, **reader))
    refused = r"files were not sent; .*: access is refused \(AccessDenied\)"
    with pytest.raises(InputError, match=refused) as e: push(project)
    check_message(e.value, storage)
    assert "".join(capfd.readouterr()) == ""
    storage.client("iam").delete_user_policy(UserName="reader", PolicyName="may")

def test_push_and_pull_need_a_lock_file(project: Path, storage: Storage, bucket: str) -> None:
    write_settings(project, **s3_settings(storage))
    (project / "dvc.lock").unlink()
    with pytest.raises(InputError, match=r"dvc\.lock: not there.*`dvc repro` writes one"): push(project)
    with pytest.raises(InputError, match=r"dvc\.lock: not there.*committed with the code"): pull(project)

@contextmanager
def http_server(body: bytes | None) -> Iterator[str]: # its address
    "A server that sends this body to every request, or without one accepts connections and does not respond."
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if body is None: closing.wait(60)
            else: self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n" + body)
        def log_message(self, format: str, *args: object) -> None: "Log nothing."
    closing = threading.Event()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally:
        closing.set()
        server.shutdown()
        thread.join()
        server.server_close()

def test_refuses_a_server_that_is_no_s3_storage(project: Path, storage: Storage) -> None:
    refused = "or is no S3 server; check RAKUTEN_REMOTE_URL and RAKUTEN_REMOTE_ENDPOINT"
    with http_server(b"<html>welcome") as url:
        write_settings(project, **s3_settings(storage, RAKUTEN_REMOTE_ENDPOINT=url))
        with pytest.raises(RakutenError, match=refused): push(project)

def test_stops_waiting_for_a_server_that_does_not_respond(
    project: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert remote.S3_OPTIONS["connect_timeout"] <= 10 and remote.S3_OPTIONS["read_timeout"] <= 30
    monkeypatch.setitem(remote.S3_OPTIONS, "read_timeout", 1)
    with http_server(None) as url:
        write_settings(project, **s3_settings(storage, RAKUTEN_REMOTE_ENDPOINT=url))
        start = time.monotonic()
        with pytest.raises(RakutenError, match="it does not answer"): push(project)
        assert time.monotonic() - start < 40, "the silent server closes the connection after a minute"

# --- missing and damaged files

def test_a_pull_from_an_incomplete_storage_changes_nothing(
    project: Path, tmp_path: Path, storage: Storage, bucket: str,
) -> None:
    write_settings(project, **s3_settings(storage))
    push(project)
    largest, _ = storage.largest()
    storage.delete(largest)
    colleague = clone(project, tmp_path / "colleague")
    write_settings(colleague, **s3_settings(storage))
    (colleague / "models").mkdir()
    (colleague / "models/weights.bin").write_bytes(b"the colleague's own")
    incomplete = r"it lacks 1 file \(data/preprocessed/été/large.bin\) of this version.*`make data-push`"
    with pytest.raises(InputError, match=incomplete): pull(colleague)
    assert outputs(colleague) == {"models/weights.bin": b"the colleague's own"}
    push(project)
    shutil.rmtree(colleague / "models")
    pull(colleague)
    assert outputs(colleague) == outputs(project)

def test_a_pull_rejects_a_damaged_file(project: Path, tmp_path: Path, storage: Storage, bucket: str) -> None:
    write_settings(project, **s3_settings(storage))
    push(project)
    largest, size = storage.largest()
    storage.client().put_object(Bucket=BUCKET, Key=largest, Body=b"\0" * size)
    colleague = clone(project, tmp_path / "colleague")
    write_settings(colleague, **s3_settings(storage))
    with pytest.raises(InputError, match=r"large\.bin.*or has it damaged"): pull(colleague)
    assert outputs(colleague) == {}

def test_a_pull_does_not_overwrite_a_changed_file(project: Path, storage: Storage, bucket: str) -> None:
    write_settings(project, **s3_settings(storage))
    push(project)
    weights = project / "models/weights.bin"
    weights.unlink()
    weights.write_bytes(b"not written by the pipeline")
    refused = r"1 file \(models/weights.bin\) here would be overwritten"
    with pytest.raises(RakutenError, match=refused) as e: pull(project)
    check_message(e.value, storage)
    assert weights.read_bytes() == b"not written by the pipeline"

# --- DagsHub

def test_dagshub_is_the_storage_if_no_other_is_set(project: Path, tmp_path: Path, storage: Storage) -> None:
    storage.require_credentials(False) # requests are signed for a path that this server does not see
    storage.client().create_bucket(Bucket="dvc")
    settings = {"DAGSHUB_URL": storage.url, "DAGSHUB_USERNAME": "amelie", "DAGSHUB_TOKEN": "a-token-of-hers"}
    write_settings(project, **settings)
    assert push(project)[0].files == len(storage.objects("dvc")) > 0
    colleague = clone(project, tmp_path / "colleague")
    write_settings(colleague, **settings)
    pull(colleague)
    storage.require_credentials(True)
    assert outputs(colleague) == outputs(project)

def test_an_unavailable_mirror_causes_one_warning(
    project: Path, storage: Storage, bucket: str, run_module: Run,
) -> None:
    mirror = {"DAGSHUB_URL": f"http://127.0.0.1:{free_port()}", "DAGSHUB_USERNAME": "amelie",
              "DAGSHUB_TOKEN": "a-token-of-hers"}
    write_settings(project, **s3_settings(storage, **mirror))
    answer = run_module(project, "rakuten_nb.cli", "data", "push")
    assert answer.returncode == 0, answer.stderr
    assert len(storage.objects()) > 0
    assert answer.stderr.count("warning:") == 1 and "amelie/rakuten_nb.s3: it does not answer" in answer.stderr
    assert "a-token-of-hers" not in answer.stdout + answer.stderr
