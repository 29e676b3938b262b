"The MLflow registry from the command line and the API: register, list, pull, serve, mirror, and errors in one line."
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_process import PASSWORD, ApiProcess, free_port
from conftest import ROOT, Run, once
from pipeline_copy import RunInProject, change, executed_stages

from rakuten_nb.models.bundle import verify_bundle

services = pytest.mark.services # needs the pipeline and MLflow, in processes

MODEL = "rakuten-product-type"
CHAMPION = f"models:/{MODEL}@champion"
NO_RETRIES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
Register = Callable[..., subprocess.CompletedProcess[str]]

def bundle_version(project: Path) -> str:
    "The version of the bundle of the pipeline."
    return str(verify_bundle(project / "models/bundle")["self"])[:12]

def database(project: Path) -> dict[str, str]:
    "The environment of a process that uses the project's MLflow database from another folder."
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}

def delete_registry(project: Path) -> None:
    "Delete MLflow's files, which contain the absolute path of the project in which they were written."
    for name in ("mlflow.db", "reports/registered.json"): (project / name).unlink()
    shutil.rmtree(project / "mlruns")

@pytest.fixture
def unregistered_project(project: Path) -> Path:
    "A copy of the finished project without its registry; a test may change it."
    delete_registry(project)
    return project

@pytest.fixture(scope="session")
def registered_project(shared: Path, finished_project: Path, register: Register) -> Path:
    "A copy of the finished project whose bundle is the champion; tests may only read it."
    home = shared / "registered_home"
    def make(part: Path) -> None:
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(finished_project / "project", home, symlinks=True)
        delete_registry(home)
        register(home)
    once(shared / "registered", make)
    return home

@pytest.fixture(scope="session")
def register(run_in_project: RunInProject) -> Register:
    "Runs the stage `register` and asserts its exit code."
    def run(project: Path, code: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
        result = run_in_project(project, "rakuten-nb", "stage", "register", extra=extra)
        assert result.returncode == code, result.stdout + result.stderr
        return result
    return run

def listed_aliases(run_in_project: RunInProject, project: Path, **extra: str) -> dict[str, str]:
    "Version → alias, as `rakuten-nb model list` prints them."
    result = run_in_project(project, "rakuten-nb", "model", "list", extra={"COLUMNS": "200"} | extra)
    assert result.returncode == 0, result.stderr
    return {m[1]: m[2] for m in re.finditer(r"^│\s*(\d+) │ (\w*)", result.stdout, re.M)}

def run_pipeline(run_in_project: RunInProject, project: Path, *command: str) -> str:
    "The output of a DVC command, which succeeds."
    result = run_in_project(project, "dvc", *command)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr

def check_error(result: subprocess.CompletedProcess[str], message: str) -> None:
    "Assert that a command failed with exit code 2 and one line that contains the message."
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and message in result.stderr, result.stderr

# --- aliases and versions

@services
def test_the_pipeline_registers_a_champion(finished_project: Path, run_in_project: RunInProject) -> None:
    project, output = finished_project / "project", (finished_project / "repro.txt").read_text(encoding="utf-8")
    assert f"model {bundle_version(project)}: version 1 of {MODEL}, champion" in output
    assert listed_aliases(run_in_project, project) == {"1": "champion"}
    assert "champion" in run_in_project(project, "rakuten-nb", "summary").stdout

def commit_all(project: Path) -> None:
    "Commit the project, because DVC runs an experiment on a commit."
    author = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    subprocess.run(["git", "add", "."], cwd=project, check=True)
    subprocess.run(["git", *author, "commit", "--quiet", "-m", "all"], cwd=project, check=True)

@services
def test_a_change_becomes_challenger_and_an_experiment_gets_no_version(
    unregistered_project: Path, run_in_project: RunInProject, register: Register,
) -> None:
    project = unregistered_project
    register(project)
    change(project, image={"experts": {}})
    run_pipeline(run_in_project, project, "repro", "register")
    assert listed_aliases(run_in_project, project) == {"2": "challenger", "1": "champion"}
    change(project, seed=1)
    commit_all(project)
    output = run_pipeline(run_in_project, project, "exp", "run", "-S", "seed=2")
    assert "register" in executed_stages(output), output
    assert re.search(r"experiment [0-9a-f]{12}: logged as run", output)
    aliases = listed_aliases(run_in_project, project)
    assert aliases == {"2": "challenger", "1": "champion"}, "an experiment creates no version and moves no alias"
    register(project)
    aliases = listed_aliases(run_in_project, project)
    assert aliases == {"3": "challenger", "2": "", "1": "champion"}, "the stage registers an applied experiment"
    register(project)
    aliases = listed_aliases(run_in_project, project)
    assert aliases == {"3": "challenger", "2": "", "1": "champion"}, "the same bundle is registered once"

# --- the registered model

@services
def test_the_champion_predicts_as_the_bundle_does(registered_project: Path, run_in_project: RunInProject) -> None:
    result = run_in_project(registered_project, "python", ROOT / "tests/ask_registry.py", registered_project, 120)
    comparison = json.loads(result.stdout)
    assert (comparison["rows"], comparison["same_codes"]) == (120, True) and comparison["pictures"] > 20
    assert comparison["largest_difference"] < 1e-5

@services
def test_the_logged_files_contain_no_pickle(registered_project: Path) -> None:
    files = [p for p in (registered_project / "mlruns").rglob("*") if p.is_file()]
    assert any(p.name == "bundle.json" for p in files)
    suffixes = (".pkl", ".pickle", ".joblib", ".cloudpickle")
    assert [p for p in files if p.suffix in suffixes or p.read_bytes()[:1] == b"\x80"] == []

@services
def test_pulls_the_bundle_by_alias_and_by_version(
    registered_project: Path, run_in_project: RunInProject, tmp_path: Path,
) -> None:
    for uri in (CHAMPION, f"models:/{MODEL}/1"):
        result = run_in_project(registered_project, "rakuten-nb", "model", "pull", uri, "--to", tmp_path / "pulled")
        assert result.returncode == 0, result.stderr
        assert verify_bundle(tmp_path / "pulled")["self"][:12] == bundle_version(registered_project)

@services
def test_pull_rejects_an_unknown_model_with_one_line(
    registered_project: Path, run_in_project: RunInProject, tmp_path: Path,
) -> None:
    errors = {f"models:/{MODEL}@missing": f"registered: {CHAMPION}", f"models:/{MODEL}/9": "@champion"}
    for uri, message in errors.items():
        pull = ("model", "pull", uri, "--to", tmp_path / "other")
        check_error(run_in_project(registered_project, "rakuten-nb", *pull), message)
    assert not (tmp_path / "other").exists()

MALFORMED = ["model pull champion --to pulled", pytest.param("serve --model-uri champion", marks=services)]

@pytest.mark.parametrize("command", MALFORMED)
def test_rejects_a_malformed_model_uri_with_one_line(command: str, rakuten: Run, shared: Path) -> None:
    settings = {"RAKUTEN_BUNDLE": str(shared / "nowhere"), "SECRET_KEY": "k" * 48}
    check_error(rakuten(*command.split(), extra=settings), "expected models:/NAME@ALIAS")
    assert not (shared / "pulled").exists()

# --- serve a registered model

def wait_until_followed(api: ApiProcess, admin: dict[str, str], request: str) -> None:
    "Wait until every process of the API has handled a reload request, without an error."
    until = time.monotonic() + 60
    status: dict[str, Any] = {"followed": []}
    while not status["followed"] and time.monotonic() < until:
        time.sleep(0.1)
        status = api.client.get("/model", headers=admin).json()
    assert status["request"] == request and [f["error"] for f in status["followed"]] == [""]

@services
def test_the_api_serves_the_champion_and_reloads_it_on_request(
    unregistered_project: Path, run_in_project: RunInProject, register: Register, env: dict[str, str], tmp_path: Path,
) -> None:
    project = unregistered_project
    register(project)
    first = bundle_version(project)
    settings = {"RAKUTEN_BUNDLE": "", "RAKUTEN_MODEL_URI": CHAMPION} | database(project)
    with ApiProcess(env, tmp_path / "api", project, **settings) as api:
        api.add_users(root="admin")
        assert api.wait_until("/ready", {200}).json()["model_version"] == first
        change(project, image={"experts": {}})
        run_pipeline(run_in_project, project, "repro", "register")
        promote = ("from rakuten_nb.tracking.registry import open_tracking\n"
                   f"with open_tracking() as m: m.MlflowClient().set_registered_model_alias('{MODEL}', 'champion', 2)")
        assert run_in_project(project, "python", "-c", promote).returncode == 0
        token = api.client.post("/token", data={"username": "root", "password": PASSWORD}).json()["access_token"]
        admin = {"Authorization": f"Bearer {token}"}
        assert api.client.get("/status").json()["model_version"] == first
        wait_until_followed(api, admin, api.client.post("/model/reload", headers=admin).json()["request"])
        assert api.client.get("/status").json()["model_version"] == bundle_version(project) != first

def served_version(port: int, seconds: float = 60) -> str:
    "The model version of a service that is starting; empty if it does not answer in time."
    until, version = time.monotonic() + seconds, ""
    while not version and time.monotonic() < until:
        try: version = httpx.get(f"http://127.0.0.1:{port}/ready").json().get("model_version", "")
        except httpx.TransportError: time.sleep(0.1)
    return version

@services
def test_serve_accepts_a_registered_model(
    registered_project: Path, run_in_project: RunInProject, env: dict[str, str], tmp_path: Path,
) -> None:
    port, terminal = free_port(), tmp_path / "terminal.log"
    settings = {"RAKUTEN_BUNDLE": str(tmp_path / "nowhere"), "SECRET_KEY": "k" * 48,
                "RAKUTEN_DATA_DIR": str(tmp_path / "data")} | database(registered_project)
    command = [sys.executable, "-m", "rakuten_nb.cli", "serve", "--model-uri", CHAMPION, "--port", str(port)]
    with (terminal.open("wb") as out,
          subprocess.Popen(command, env=env | settings, cwd=tmp_path, stdout=out, stderr=out) as process):
        try: version = served_version(port)
        finally: process.terminate()
    assert version == bundle_version(registered_project), terminal.read_text()
    serve = ("serve", "--model-uri", "models:/missing@champion")
    check_error(run_in_project(registered_project, "rakuten-nb", *serve, extra=settings), "is not registered at")

# --- a tracking server

class Server:
    "A running `mlflow server` on the loopback address, as a context manager."
    def __init__(self, env: dict[str, str], home: Path):
        self.port, self.env, self.home = free_port(), env, home
        self.url, self.terminal = f"http://127.0.0.1:{self.port}", home / "terminal.log"
        home.mkdir()

    def __enter__(self) -> "Server":
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port),
                   "--workers", "1", "--backend-store-uri", f"sqlite:///{self.home}/server.db",
                   "--artifacts-destination", str(self.home / "artifacts")]
        with self.terminal.open("ab") as out:
            self.process = subprocess.Popen(command, env=self.env, cwd=self.home, stdout=out, stderr=out)
        until = time.monotonic() + 90
        while time.monotonic() < until:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200: return self
            except httpx.TransportError: time.sleep(0.2)
        raise AssertionError(self.terminal.read_text())

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

@pytest.fixture
def server(env: dict[str, str], tmp_path: Path) -> Iterator[Server]:
    "An empty MLflow server."
    with Server(env, tmp_path / "server") as running: yield running

@services
def test_registers_lists_and_pulls_from_a_server(
    unregistered_project: Path, run_in_project: RunInProject, register: Register, server: Server, tmp_path: Path,
) -> None:
    project, tracking = unregistered_project, {"MLFLOW_TRACKING_URI": server.url}
    register(project, **tracking)
    register(project, **tracking)
    assert listed_aliases(run_in_project, project, **tracking) == {"1": "champion"}
    assert not (project / "mlflow.db").exists()
    pull = ("model", "pull", CHAMPION, "--to", tmp_path / "pulled")
    result = run_in_project(project, "rakuten-nb", *pull, extra=tracking)
    assert result.returncode == 0 and verify_bundle(tmp_path / "pulled")["self"][:12] == bundle_version(project)

@services
def test_an_unreachable_server_is_one_line_and_a_later_call_registers(
    unregistered_project: Path, run_in_project: RunInProject, register: Register,
) -> None:
    project = unregistered_project
    before, unreachable = bundle_version(project), f"http://marie:hush@127.0.0.1:{free_port()}"
    result = register(project, 1, MLFLOW_TRACKING_URI=unreachable, **NO_RETRIES)
    output = result.stdout + result.stderr
    [error] = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert "TrackingUnavailable: MLflow at http://127.0.0.1:" in error and "connection refused" in error
    assert "Traceback" not in output and "hush" not in output
    executed = (project / "reports/runs/70_register.ipynb").read_text(encoding="utf-8")
    assert "hush" not in executed, "the executed notebook contains no password"
    assert bundle_version(project) == before
    register(project)
    assert listed_aliases(run_in_project, project) == {"1": "champion"}

@services
def test_a_server_that_does_not_respond_times_out(unregistered_project: Path, register: Register) -> None:
    limits = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = register(unregistered_project, 1, MLFLOW_TRACKING_URI=uri, **limits)
    assert "it took too long" in result.stderr and "Traceback" not in result.stderr

# --- a mirror on DagsHub

@pytest.fixture
def dagshub(server: Server) -> Iterator[tuple[str, list[str]]]:
    "The address of a proxy that shows the server below /marie/rakuten_nb.mlflow, and the credentials it received."
    credentials: list[str] = []
    class Forward(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            credentials.append(self.headers.get("Authorization", ""))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
            url = server.url + self.path.removeprefix("/marie/rakuten_nb.mlflow")
            response = httpx.request(self.command, url, content=body, headers=headers, timeout=60)
            self.send_response(response.status_code)
            self.send_header("Content-Type", response.headers.get("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content)
        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward
        def log_message(self, *_: object) -> None: pass
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Forward)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_port}", credentials
    proxy.shutdown()

# Prints the content of a tracking server: runs, files and bundle of the first run, registered models.
CONTENT = """
import json, mlflow
runs, client = mlflow.search_runs(search_all_experiments=True, output_format="list"), mlflow.MlflowClient()
files = [f.path for f in client.list_artifacts(runs[0].info.run_id)]
print(json.dumps([len(runs), files, runs[0].data.tags["bundle"][:12], len(client.search_registered_models())]))
"""

@services
def test_mirrors_a_run_on_dagshub(
    unregistered_project: Path, register: Register, dagshub: tuple[str, list[str]], server: Server,
) -> None:
    url, credentials = dagshub
    settings = {"DAGSHUB_USERNAME": "marie", "DAGSHUB_TOKEN": "a-token", "DAGSHUB_URL": url}
    result = register(unregistered_project, **settings)
    assert f"mirrored at {url}/marie/rakuten_nb.mlflow" in result.stderr
    assert (unregistered_project / "mlflow.db").is_file()
    assert set(credentials) == {httpx.BasicAuth("marie", "a-token")._auth_header}
    command, mirror = [sys.executable, "-c", CONTENT], server.env | {"MLFLOW_TRACKING_URI": server.url}
    output = subprocess.run(command, env=mirror, capture_output=True, text=True, check=True).stdout
    runs, files, version, models = json.loads(output)
    assert runs == 1 and "bundle" in files and version == bundle_version(unregistered_project) and models == 0

@services
def test_an_unreachable_dagshub_is_a_warning(project: Path, register: Register) -> None:
    unreachable = f"http://127.0.0.1:{free_port()}"
    settings = {"DAGSHUB_USERNAME": "marie", "DAGSHUB_TOKEN": "a-token", "DAGSHUB_URL": unreachable}
    result = register(project, **settings, **NO_RETRIES)
    assert "warning: not mirrored: MLflow at http://127.0.0.1:" in result.stderr and "a-token" not in result.stderr
