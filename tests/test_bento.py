"A Bento built by `bentoml build` and served by `bentoml serve` behaves like the API."
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from api_process import KEY, USERS, ApiProcess, children_of
from conftest import ROOT
from PIL import Image

from rakuten_nb.data.catalog import Products, read_catalog
from rakuten_nb.data.picture import picture_bytes
from rakuten_nb.models.bundle import load_bundle
from rakuten_nb.serving.bento.build import BENTOFILE, build_bento, copy_sources

pytestmark = pytest.mark.services

BENTOML = Path(sys.executable).with_name("bentoml")
VERSION = "0.1.0+packed" # of the package in the Bento, to distinguish it from the installed one

def alive(pid: int) -> bool:
    "True while a process runs."
    with suppress(OSError): return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False

class BentoProcess(ApiProcess):
    "A served Bento; its bundle is inside the Bento, so `bundle` has no effect."
    served: tuple[int, ...] = ()

    def start(self, wait: bool = True) -> "BentoProcess":
        "Start `bentoml serve` in a folder without files of the project."
        command = [BENTOML, "serve", self.env["TAG"], "--port", str(self.port)]
        with (self.home / "terminal.log").open("ab") as terminal:
            self.process = subprocess.Popen(command, env=self.env, cwd=self.home, stdout=terminal, stderr=terminal)
        if wait:
            self.wait_until("/health", {200})
            self.served = tuple(children_of(self.process.pid))
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        for pid in filter(alive, self.served): os.kill(pid, signal.SIGKILL) # only after a failed test

@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]) -> dict[str, str]:
    "The environment of BentoML: a store of its own, no telemetry, no package of this tree."
    own = {"BENTOML_HOME": str(tmp_path_factory.mktemp("bentoml")), "BENTOML_DO_NOT_TRACK": "True"}
    inherited = {k: v for k, v in env.items() if k not in ("PYTHONPATH", "SECRET_KEY") and not k.startswith("BENTOML_")}
    return inherited | own

@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, home: dict[str, str], bundle: Path) -> tuple[str, Path]:
    "The tag and the folder of a Bento, built in a project whose `.env` contains a key."
    project = tmp_path_factory.mktemp("project")
    copy_sources(ROOT, bundle, project)
    (project / ".env").write_text(f"SECRET_KEY={KEY}\n", encoding="utf-8")
    init = project / "rakuten_nb" / "__init__.py"
    init.write_text(f'{init.read_text(encoding="utf-8")}\n__version__ = "{VERSION}"\n', encoding="utf-8")
    command = [BENTOML, "build", "-f", BENTOFILE, "-o", "tag"]
    run = subprocess.run(command, cwd=project, env=home, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    tag = next(line for line in run.stdout.splitlines() if line.startswith("__tag__:")).removeprefix("__tag__:")
    return tag, Path(home["BENTOML_HOME"]) / "bentos" / tag.replace(":", "/")

@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, home: dict[str, str], packed: tuple[str, Path],
) -> Iterator[BentoProcess]:
    "The served Bento with three users; the settings name another model, which has no effect."
    settings = {"TAG": packed[0], "RAKUTEN_MODEL_URI": "models:/none@champion"}
    with BentoProcess(home, tmp_path_factory.mktemp("served"), Path("nowhere"), **settings) as running:
        running.add_users(**USERS)
        yield running

@pytest.fixture(scope="module")
def marie(served: BentoProcess) -> dict[str, str]:
    "The header of a user."
    return served.token("marie")

def problem(response: httpx.Response, status: int) -> dict[str, Any]:
    "The problem document of a response."
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json", response.text
    document: dict[str, Any] = response.json()
    assert document["request_id"] == response.headers["x-request-id"]
    return document

def without_id(document: dict[str, Any]) -> dict[str, Any]:
    "A response without its request id."
    return {name: value for name, value in document.items() if name != "request_id"}

def refusal(home: dict[str, str], folder: Path, bento: str, **settings: str) -> str:
    "The one line with which `bentoml serve` refuses to start in a folder."
    folder.mkdir()
    command = [BENTOML, "serve", bento, "--port", "1"]
    options: dict[str, Any] = {"env": home | settings, "cwd": folder, "capture_output": True, "text": True}
    run = subprocess.run(command, timeout=60, check=False, **options)
    assert run.returncode == 1 and len(run.stderr.strip().splitlines()) == 1, run.stderr
    return run.stderr

# --- the same responses

def test_predicts_and_explains_as_the_bundle_and_the_api(
    served: BentoProcess, api: ApiProcess, marie: dict[str, str], sample_catalog: Path, bundle: Path,
) -> None:
    version = served.client.get("/status").json()["version"]
    assert version == VERSION, "the package of the Bento, not the installed one"
    products: Products = read_catalog(sample_catalog).products[:12]
    expected, token = load_bundle(bundle).predict(products), api.token()
    both = ((served, marie), (api, token))
    bento_model, api_model = (process.client.get("/model", headers=header).json() for process, header in both)
    assert bento_model["metrics"] == api_model["metrics"]
    for i, own in enumerate(expected):
        raw = None if products.picture[i] is None else picture_bytes(products.picture[i])
        product = products.title[i], products.description[i], raw
        of_bento, of_api = (process.predict(header, *product, explain="true").json() for process, header in both)
        first = of_bento["predictions"][0]
        assert first["label"] == own.prdtypecode and abs(first["confidence"] - own.confidence) < 1e-5
        assert without_id(of_bento) == without_id(of_api), "the same JSON, with the explanation"

def test_refuses_with_the_problem_documents_of_the_api(
    served: BentoProcess, api: ApiProcess, marie: dict[str, str],
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2200, 2200, 3), np.uint8)
    Image.fromarray(noise).save(large := BytesIO(), "PNG")
    token = api.token()
    for status, ask in {
        401: lambda one, header: one.client.post("/predict", data={"designation": "Jeu"}),
        403: lambda one, header: one.client.post("/model/reload", headers=header),
        404: lambda one, header: one.client.get("/nothing"),
        405: lambda one, header: one.client.put("/predict"),
        413: lambda one, header: one.predict(header, "Jeu", picture=large.getvalue()),
        415: lambda one, header: one.client.post("/predict", json={"designation": "Jeu"}, headers=header),
        422: lambda one, header: one.predict(header, "Jeu", picture=b"Bonjour"),
    }.items():
        of_bento, of_api = (ask(process, header) for process, header in ((served, marie), (api, token)))
        assert without_id(problem(of_bento, status)) == without_id(problem(of_api, status))
        assert of_bento.headers.keys() - {"date"} == of_api.headers.keys() - {"date", "server"}

def test_every_address_is_the_api_except_the_probes(served: BentoProcess, api: ApiProcess) -> None:
    for path in ("/livez", "/healthz", "/readyz"):
        response = served.client.get(path)
        assert response.status_code == 200 and response.text.strip() == ""
    for path in ("/", "/docs.json", "/schema.json", "/static_content/swagger-ui.css", "/assets/x", "/task/status"):
        problem(served.client.get(path), 404)
    assert served.client.get("/openapi.json").json()["paths"] == api.client.get("/openapi.json").json()["paths"]
    metrics = served.client.get("/metrics").text
    assert "rakuten_model_info" in metrics and "bentoml" not in metrics
    assert "Warning" not in served.terminal(), served.terminal()

def test_limits_requests_and_ends_cleanly(tmp_path: Path, home: dict[str, str], packed: tuple[str, Path]) -> None:
    settings = {"TAG": str(packed[1]), "RAKUTEN_RATE_LIMIT_PREDICT": "3/minute"} # the folder instead of the tag
    with BentoProcess(home, tmp_path / "own", Path("nowhere"), **settings) as own:
        own.add_users(marie="user")
        header = own.token("marie")
        responses = [own.predict(header, f"Jeu {n}") for n in range(5)]
        assert [r.status_code for r in responses] == [200] * 3 + [429] * 2
        assert [r.headers["ratelimit-remaining"] for r in responses[:3]] == ["2", "1", "0"]
        assert problem(responses[-1], 429) and 1 <= int(responses[-1].headers["retry-after"]) <= 60
        assert own.process and len(own.served) == 1, "one process serves"
        assert not (packed[1] / "src" / "data").exists(), "nothing is written into the Bento"
        assert (own.home / "data" / "rakuten.sqlite").exists()
        began = time.monotonic()
        assert own.stop(signal.SIGTERM) == 0 and time.monotonic() - began < 15
        assert not any(map(alive, own.served)), "no process remains"

def test_listens_on_no_other_port(served: BentoProcess) -> None:
    assert served.process
    sockets: set[str] = set()
    for pid in (served.process.pid, *served.served):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError): sockets.add(str(fd.readlink()))
    tables = [table for name in ("tcp", "tcp6") if (table := Path(f"/proc/net/{name}")).exists()]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    listening = [row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    assert {int(row[1].rpartition(":")[2], 16) for row in listening} == {served.port}

# --- refused starts

def test_refuses_to_start_without_a_key(tmp_path: Path, home: dict[str, str], packed: tuple[str, Path]) -> None:
    assert "SECRET_KEY: expected 32 random bytes or more" in refusal(home, tmp_path / "there", packed[0])

def test_refuses_to_serve_a_changed_bundle(tmp_path: Path, home: dict[str, str], packed: tuple[str, Path]) -> None:
    copy = Path(shutil.copytree(packed[1], tmp_path / "bento"))
    graph = next((copy / "src" / "models" / "bundle").rglob("*.onnx"))
    raw = bytearray(graph.read_bytes())
    raw[len(raw) // 2] ^= 1
    graph.write_bytes(raw)
    line = refusal(home, tmp_path / "there", str(copy), SECRET_KEY=KEY)
    assert graph.relative_to(copy).as_posix() in line and "differs from what was saved" in line

# --- content

def test_packs_no_secret_and_no_pickle(packed: tuple[str, Path]) -> None:
    files = [p for p in packed[1].rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert len(files) > 50 and not any(KEY.encode() in p.read_bytes() for p in files)
    forbidden = (".pkl", ".pickle", ".joblib", ".sqlite")
    assert [p.name for p in files if p.name.startswith(".env") or p.suffix in forbidden] == []

def test_the_command_packs_what_bentoml_build_packs(
    home: dict[str, str], packed: tuple[str, Path], bundle: Path,
) -> None:
    with pytest.MonkeyPatch.context() as m:
        m.setenv("BENTOML_HOME", home["BENTOML_HOME"])
        assert build_bento(bundle, "mine", ROOT) == "rakuten-nb:mine"
    def contents(folder: Path) -> set[str]:
        files = (p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        return {p.relative_to(folder).as_posix() for p in files}
    assert contents(packed[1].with_name("mine")) == contents(packed[1])
