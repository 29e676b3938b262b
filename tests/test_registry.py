"MLflow as a user meets it: what the pipeline registers, what comes back out of the registry, and what happens when it is away."
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

import httpx
import pytest
from api_process import PASSWORD, ApiProcess, free_port
from conftest import ROOT
from pipeline_copy import RunInProject, change, executed_stages

from rakuten_nb.models.bundle import verify_bundle

MODEL = "rakuten-product-type"
Register = Callable[..., subprocess.CompletedProcess[str]]

def version_of(project: Path) -> str:
    "The version of the bundle that the pipeline has made."
    return str(verify_bundle(project / "models/bundle")["self"])[:12]

@pytest.fixture
def own(project: Path) -> Path:
    "A finished project that MLflow knows nothing of."
    for left in ("mlflow.db", "reports/registered.json"): (project / left).unlink()
    shutil.rmtree(project / "mlruns")
    return project

@pytest.fixture
def register(run_in_project: RunInProject) -> Register:
    "Runs the stage; it must end with this exit code."
    def run(project: Path, code: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
        answer = run_in_project(project, "rakuten-nb", "stage", "register", extra=extra)
        assert answer.returncode == code, answer.stdout + answer.stderr
        return answer
    return run

def listed(run_in_project: RunInProject, project: Path, **extra: str) -> dict[str, str]:
    "Version → alias, of `rakuten-nb model list`."
    answer = run_in_project(project, "rakuten-nb", "model", "list", extra={"COLUMNS": "200"} | extra)
    assert answer.returncode == 0, answer.stderr
    return {m[1]: m[2] for m in re.finditer(r"^│\s*(\d+) │ (\w*)", answer.stdout, re.M)}

@pytest.mark.services
def test_the_pipeline_ends_with_a_champion(finished_project: Path, run_in_project: RunInProject) -> None:
    project, said = finished_project / "project", (finished_project / "repro.txt").read_text(encoding="utf-8")
    assert f"model {version_of(project)}: version 1 of {MODEL}, champion" in said
    assert listed(run_in_project, project) == {"1": "champion"}
    assert "champion" in run_in_project(project, "rakuten-nb", "summary").stdout

@pytest.mark.services
def test_a_change_makes_a_challenger_an_experiment_none(own: Path, run_in_project: RunInProject, register: Register) -> None:
    register(own)
    change(own, image={"experts": {}})
    answer = run_in_project(own, "dvc", "repro", "register")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert listed(run_in_project, own) == {"2": "challenger", "1": "champion"}
    change(own, seed=1)
    subprocess.run(["git", "add", "."], cwd=own, check=True)
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "-m", "all"], cwd=own, check=True)
    answer = run_in_project(own, "dvc", "exp", "run", "-S", "seed=2")
    assert answer.returncode == 0 and "register" in executed_stages(answer.stdout), answer.stdout + answer.stderr
    assert re.search(r"experiment [0-9a-f]{12}: logged as run", answer.stdout + answer.stderr)
    assert listed(run_in_project, own) == {"2": "challenger", "1": "champion"}, "an experiment moves no alias and makes no version"
    register(own)
    assert listed(run_in_project, own) == {"3": "challenger", "2": "", "1": "champion"}, "the experiment that is kept is registered by hand"
    register(own)
    assert listed(run_in_project, own) == {"3": "challenger", "2": "", "1": "champion"}, "the same bundle again registers nothing"

@pytest.mark.services
def test_the_champion_answers_as_the_bundle_does(own: Path, run_in_project: RunInProject, register: Register) -> None:
    register(own)
    found = json.loads(run_in_project(own, "python", ROOT / "tests/ask_registry.py", own, 120).stdout)
    assert (found["rows"], found["same"]) == (120, True) and found["pictures"] > 20
    assert found["differ"] < 1e-5
    files = [p for p in (own / "mlruns").rglob("*") if p.is_file()]
    assert any(p.name == "bundle.json" for p in files)
    assert [p for p in files if p.suffix in (".pkl", ".pickle", ".joblib", ".cloudpickle") or p.read_bytes()[:1] == b"\x80"] == []

@pytest.mark.services
def test_a_model_is_pulled(own: Path, run_in_project: RunInProject, register: Register, tmp_path: Path) -> None:
    register(own)
    for uri in (f"models:/{MODEL}@champion", f"models:/{MODEL}/1"):
        answer = run_in_project(own, "rakuten-nb", "model", "pull", uri, "--to", tmp_path / "pulled")
        assert answer.returncode == 0, answer.stderr
        assert verify_bundle(tmp_path / "pulled")["self"][:12] == version_of(own)
    wrong = {f"models:/{MODEL}@nobody": f"registered: models:/{MODEL}@champion", f"models:/{MODEL}/9": "@champion", "champion": "expected models:/NAME@ALIAS"}
    for uri, said in wrong.items():
        answer = run_in_project(own, "rakuten-nb", "model", "pull", uri, "--to", tmp_path / "other")
        assert (answer.returncode, answer.stderr.count("\n")) == (2, 1) and said in answer.stderr, answer.stderr
    assert not (tmp_path / "other").exists()

@pytest.mark.services
def test_mlflow_away_is_one_line_and_caught_up_with(own: Path, run_in_project: RunInProject, register: Register) -> None:
    before, nobody = version_of(own), f"http://marie:hush@127.0.0.1:{free_port()}"
    answer = register(own, 1, MLFLOW_TRACKING_URI=nobody, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    errors = [line for line in answer.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and "TrackingUnavailable: MLflow at http://127.0.0.1:" in errors[0] and "connection refused" in errors[0]
    assert "Traceback" not in answer.stdout + answer.stderr and "hush" not in answer.stdout + answer.stderr
    assert "hush" not in (own / "reports/runs/70_register.ipynb").read_text(encoding="utf-8"), "the executed notebook tells it neither"
    assert version_of(own) == before
    register(own)
    assert listed(run_in_project, own) == {"1": "champion"}

@pytest.mark.services
def test_the_api_serves_what_the_registry_holds(own: Path, run_in_project: RunInProject, register: Register, env: dict[str, str], tmp_path: Path) -> None:
    register(own)
    first = version_of(own)
    settings = {"RAKUTEN_BUNDLE": "", "RAKUTEN_MODEL_URI": f"models:/{MODEL}@champion", "MLFLOW_TRACKING_URI": f"sqlite:///{own}/mlflow.db"}
    with ApiProcess(env, tmp_path / "api", own, **settings) as api:
        api.add_users(root="admin")
        assert api.wait_until("/ready", {200}).json()["model_version"] == first
        change(own, image={"experts": {}})
        assert run_in_project(own, "dvc", "repro", "register").returncode == 0
        promote = f"with open_tracking() as m: m.MlflowClient().set_registered_model_alias('{MODEL}', 'champion', 2)"
        assert run_in_project(own, "python", "-c", f"from rakuten_nb.tracking.registry import open_tracking\n{promote}").returncode == 0
        token = api.client.post("/token", data={"username": "root", "password": PASSWORD}).json()["access_token"]
        admin = {"Authorization": f"Bearer {token}"}
        assert api.client.get("/status").json()["model_version"] == first
        request = api.client.post("/model/reload", headers=admin).json()["request"]
        until, news = time.monotonic() + 60, {"followed": []}
        while not news["followed"] and time.monotonic() < until:
            time.sleep(0.1)
            news = api.client.get("/model", headers=admin).json()
        assert news["request"] == request and [f["error"] for f in news["followed"]] == [""]
        assert api.client.get("/status").json()["model_version"] == version_of(own) != first

@pytest.mark.services
def test_serve_takes_a_model_of_the_registry(own: Path, run_in_project: RunInProject, register: Register, env: dict[str, str], tmp_path: Path) -> None:
    register(own)
    port, terminal = free_port(), tmp_path / "terminal.log"
    set_already = {"RAKUTEN_BUNDLE": str(tmp_path / "nowhere"), "SECRET_KEY": "k" * 48, "RAKUTEN_DATA_DIR": str(tmp_path / "data"),
                   "MLFLOW_TRACKING_URI": f"sqlite:///{own}/mlflow.db"}
    command = [sys.executable, "-m", "rakuten_nb.cli", "serve", "--model-uri", f"models:/{MODEL}@champion", "--port", str(port)]
    with terminal.open("wb") as out, subprocess.Popen(command, env=env | set_already, cwd=tmp_path, stdout=out, stderr=out) as process:
        try:
            until, found = time.monotonic() + 60, ""
            while not found and time.monotonic() < until:
                try: found = httpx.get(f"http://127.0.0.1:{port}/ready").json().get("model_version", "")
                except httpx.TransportError: time.sleep(0.1)
        finally: process.terminate()
    assert found == version_of(own), terminal.read_text()
    for wrong, said in (("champion", "expected models:/NAME@ALIAS"), ("models:/nobody@champion", "is not registered at")):
        answer = run_in_project(own, "rakuten-nb", "serve", "--model-uri", wrong, extra=set_already)
        assert (answer.returncode, answer.stderr.count("\n")) == (2, 1) and said in answer.stderr, answer.stderr

# --- a server

class Server:
    "A running `mlflow server` on loopback; a context that ends it."
    def __init__(self, env: dict[str, str], home: Path):
        self.port, self.env, self.home = free_port(), env, home
        self.url = f"http://127.0.0.1:{self.port}"
        home.mkdir()

    def __enter__(self) -> "Server":
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
                   "--backend-store-uri", f"sqlite:///{self.home}/server.db", "--artifacts-destination", str(self.home / "artifacts")]
        with (self.home / "terminal.log").open("ab") as out: self.process = subprocess.Popen(command, env=self.env, cwd=self.home, stdout=out, stderr=out)
        until = time.monotonic() + 90
        while time.monotonic() < until:
            try:
                if httpx.get(f"{self.url}/health").status_code == 200: return self
            except httpx.TransportError: time.sleep(0.2)
        raise AssertionError((self.home / "terminal.log").read_text())

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)

@pytest.fixture
def server(env: dict[str, str], tmp_path: Path) -> Iterator[Server]:
    "An MLflow server with nothing in it."
    with Server(env, tmp_path / "server") as running: yield running

@pytest.fixture
def dagshub(server: Server) -> Iterator[tuple[str, list[str]]]:
    "The server as DagsHub shows it, below /marie/rakuten_nb.mlflow, to who has the token; and who asked."
    asked: list[str] = []
    class Forward(BaseHTTPRequestHandler):
        def _forward(self) -> None:
            asked.append(self.headers.get("Authorization", ""))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {"Content-Type": self.headers.get("Content-Type", "application/json")}
            behind = server.url + self.path.removeprefix("/marie/rakuten_nb.mlflow")
            answer = httpx.request(self.command, behind, content=body, headers=headers, timeout=60)
            self.send_response(answer.status_code)
            self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
            self.send_header("Content-Length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)
        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _forward
        def log_message(self, *_: object) -> None: pass
    front = ThreadingHTTPServer(("127.0.0.1", 0), Forward)
    threading.Thread(target=front.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{front.server_port}", asked
    front.shutdown()

@pytest.mark.services
def test_a_server_keeps_and_gives_the_model(own: Path, run_in_project: RunInProject, register: Register, server: Server, tmp_path: Path) -> None:
    where = {"MLFLOW_TRACKING_URI": server.url}
    register(own, **where)
    register(own, **where)
    assert listed(run_in_project, own, **where) == {"1": "champion"} and not (own / "mlflow.db").exists()
    answer = run_in_project(own, "rakuten-nb", "model", "pull", f"models:/{MODEL}@champion", "--to", tmp_path / "pulled", extra=where)
    assert answer.returncode == 0 and verify_bundle(tmp_path / "pulled")["self"][:12] == version_of(own)

@pytest.mark.services
def test_a_server_that_hangs_is_given_up(own: Path, register: Register) -> None:
    impatient = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        answer = register(own, 1, MLFLOW_TRACKING_URI=f"http://127.0.0.1:{silent.getsockname()[1]}", **impatient)
    assert "it took too long" in answer.stderr and "Traceback" not in answer.stderr

@pytest.mark.services
def test_runs_are_mirrored_on_dagshub(own: Path, register: Register, dagshub: tuple[str, list[str]], server: Server) -> None:
    url, asked = dagshub
    settings = {"DAGSHUB_USERNAME": "marie", "DAGSHUB_TOKEN": "a-token", "DAGSHUB_URL": url}
    answer = register(own, **settings)
    assert f"mirrored at {url}/marie/rakuten_nb.mlflow" in answer.stderr and (own / "mlflow.db").is_file()
    assert set(asked) == {httpx.BasicAuth("marie", "a-token")._auth_header}
    script = ("import mlflow; rs = mlflow.search_runs(search_all_experiments=True, output_format='list'); c = mlflow.MlflowClient(); "
              "print(len(rs), [f.path for f in c.list_artifacts(rs[0].info.run_id)], rs[0].data.tags['bundle'][:12], len(c.search_registered_models()))")
    there = server.env | {"MLFLOW_TRACKING_URI": server.url}
    seen = subprocess.run([sys.executable, "-c", script], env=there, capture_output=True, text=True, check=True).stdout
    assert seen.startswith("1 [") and "'bundle'" in seen and version_of(own) in seen and seen.strip().endswith("0")
    away = register(own, **settings | {"DAGSHUB_URL": f"http://127.0.0.1:{free_port()}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})
    assert "warning: not mirrored: MLflow at http://127.0.0.1:" in away.stderr and "a-token" not in away.stderr
