"A Bento as an operator has it: built by `bentoml build`, served by `bentoml serve`, and the same as the API."
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
from rakuten_nb.serving.bento.build import BENTOFILE, build_bento, lay_out

pytestmark = pytest.mark.services

BENTOML = Path(sys.executable).with_name("bentoml")
VERSION = "0.1.0+packed" # what the package in the Bento calls itself, so that it is told from the one that is installed

def alive(pid: int) -> bool:
    "Whether a process runs still."
    with suppress(OSError): return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False

class BentoProcess(ApiProcess):
    "A Bento that is served; `bundle` is the Bento's folder, which it may name where an API names a bundle."
    served: tuple[int, ...] = ()

    def start(self, wait: bool = True) -> "BentoProcess":
        "Start it as `bentoml serve` does, in a folder where nothing of the project is."
        command = [BENTOML, "serve", self.env["TAG"], "--port", str(self.port)]
        with (self.home / "terminal.log").open("ab") as terminal:
            self.process = subprocess.Popen(command, env=self.env, cwd=self.home, stdout=terminal, stderr=terminal)
        if wait:
            self.wait_until("/health", {200})
            self.served = tuple(children_of(self.process.pid))
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        for pid in filter(alive, self.served): os.kill(pid, signal.SIGKILL) # there are some only where a test has failed

@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]) -> dict[str, str]:
    "The environment of BentoML: a store of its own, no telemetry, no package but the installed one and the Bento's."
    own = {"BENTOML_HOME": str(tmp_path_factory.mktemp("bentoml")), "BENTOML_DO_NOT_TRACK": "True"}
    return {k: v for k, v in env.items() if k not in ("PYTHONPATH", "SECRET_KEY") and not k.startswith("BENTOML_")} | own

@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, home: dict[str, str], bundle: Path) -> tuple[str, Path]:
    "The tag of a Bento and its folder, built in a project whose `.env` holds the key."
    project = tmp_path_factory.mktemp("project")
    lay_out(ROOT, bundle, project)
    (project / ".env").write_text(f"SECRET_KEY={KEY}\n", encoding="utf-8")
    init = project / "rakuten_nb" / "__init__.py"
    init.write_text(f'{init.read_text(encoding="utf-8")}\n__version__ = "{VERSION}"\n', encoding="utf-8")
    answer = subprocess.run([BENTOML, "build", "-f", BENTOFILE, "-o", "tag"], cwd=project, env=home, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    tag = next(line for line in answer.stdout.splitlines() if line.startswith("__tag__:")).removeprefix("__tag__:")
    return tag, Path(home["BENTOML_HOME"]) / "bentos" / tag.replace(":", "/")

@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, home: dict[str, str], packed: tuple[str, Path]) -> Iterator[BentoProcess]:
    "The Bento at work, with a user, a reviewer and an admin; the settings name another bundle, and that does not count."
    with BentoProcess(home, tmp_path_factory.mktemp("served"), Path("nowhere"), TAG=packed[0], RAKUTEN_MODEL_URI="models:/none@champion") as running:
        running.add_users(**USERS)
        yield running

@pytest.fixture(scope="module")
def marie(served: BentoProcess) -> dict[str, str]:
    "The header of an ordinary user."
    return served.token("marie")

def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    "The document of an answer that says no."
    assert answer.status_code == status and answer.headers["content-type"] == "application/problem+json", answer.text
    document: dict[str, Any] = answer.json()
    assert document["request_id"] == answer.headers["x-request-id"]
    return document

def refusal(home: dict[str, str], where: Path, what: str, **settings: str) -> str:
    "The one line with which `bentoml serve` ends."
    where.mkdir()
    answer = subprocess.run([BENTOML, "serve", what, "--port", "1"], env=home | settings, cwd=where, capture_output=True, text=True, timeout=60, check=False)
    assert answer.returncode == 1 and len(answer.stderr.strip().splitlines()) == 1, answer.stderr
    return answer.stderr

# --- the same answers

def test_it_answers_as_the_bundle_and_the_api_do(served: BentoProcess, api: ApiProcess, marie: dict[str, str], sample_catalog: Path, bundle: Path) -> None:
    assert served.client.get("/status").json()["version"] == VERSION, "the package of the Bento, not the installed one"
    products: Products = read_catalog(sample_catalog).products[:12]
    expected, token = load_bundle(bundle).predict(products), api.token()
    assert served.client.get("/model", headers=marie).json()["metrics"] == api.client.get("/model", headers=token).json()["metrics"]
    for i, own in enumerate(expected):
        raw = None if products.picture[i] is None else picture_bytes(products.picture[i])
        asked = products.title[i], products.description[i], raw
        said, other = (one.predict(header, *asked, explain="true").json() for one, header in ((served, marie), (api, token)))
        first = said["predictions"][0]
        assert first["label"] == own.prdtypecode and abs(first["confidence"] - own.confidence) < 1e-5
        for answer in (said, other): answer.pop("request_id")
        assert said == other, "the same JSON, explanation and all"

def test_it_says_no_as_the_api_does(served: BentoProcess, api: ApiProcess, marie: dict[str, str]) -> None:
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
        ours, theirs = (ask(one, header) for one, header in ((served, marie), (api, token)))
        said, other = problem(ours, status), problem(theirs, status)
        assert {k: v for k, v in said.items() if k != "request_id"} == {k: v for k, v in other.items() if k != "request_id"}
        assert ours.headers.keys() - {"date"} == theirs.headers.keys() - {"date", "server"}, "the same headers, but for the server's name"

def test_every_address_is_the_apis_but_three(served: BentoProcess, api: ApiProcess) -> None:
    for path in ("/livez", "/healthz", "/readyz"):
        answer = served.client.get(path)
        assert answer.status_code == 200 and answer.text.strip() == "", "they tell nothing"
    for path in ("/", "/docs.json", "/schema.json", "/static_content/swagger-ui.css", "/assets/x", "/task/status"): problem(served.client.get(path), 404)
    assert served.client.get("/openapi.json").json()["paths"] == api.client.get("/openapi.json").json()["paths"]
    told = served.client.get("/metrics").text
    assert "rakuten_model_info" in told and "bentoml" not in told
    assert "Warning" not in served.terminal(), served.terminal()

def test_the_limit_is_the_apis(tmp_path: Path, home: dict[str, str], packed: tuple[str, Path]) -> None:
    with BentoProcess(home, tmp_path / "own", Path("nowhere"), TAG=str(packed[1]), RAKUTEN_RATE_LIMIT_PREDICT="3/minute") as own: # by its folder, too
        own.add_users(marie="user")
        header = own.token("marie")
        answers = [own.predict(header, f"Jeu {n}") for n in range(5)]
        assert [a.status_code for a in answers] == [200] * 3 + [429] * 2
        assert [a.headers["ratelimit-remaining"] for a in answers[:3]] == ["2", "1", "0"]
        assert problem(answers[-1], 429) and 1 <= int(answers[-1].headers["retry-after"]) <= 60
        assert own.process and len(own.served) == 1, "one process serves"
        assert not (packed[1] / "src" / "data").exists() and (own.home / "data" / "rakuten.sqlite").exists(), "what it keeps lies outside the Bento"
        began = time.monotonic()
        assert own.stop(signal.SIGTERM) == 0 and time.monotonic() - began < 15
        assert not any(map(alive, own.served)), "it leaves nobody behind"

def test_nobody_else_may_give_orders(served: BentoProcess) -> None:
    assert served.process
    ours: set[str] = set()
    for pid in (served.process.pid, *served.served):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError): ours.add(str(fd.readlink()))
    rows = [line.split() for name in ("tcp", "tcp6") if (table := Path(f"/proc/net/{name}")).exists() for line in table.read_text().splitlines()[1:]]
    listens = {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in ours}
    assert listens == {served.port}

# --- what it does not serve

def test_without_a_key_it_refuses_in_one_line(tmp_path: Path, home: dict[str, str], packed: tuple[str, Path]) -> None:
    assert "SECRET_KEY: expected 32 random bytes or more" in refusal(home, tmp_path / "there", packed[0])

def test_a_bundle_that_was_tampered_with_is_not_served(tmp_path: Path, home: dict[str, str], packed: tuple[str, Path]) -> None:
    copy = Path(shutil.copytree(packed[1], tmp_path / "bento"))
    graph = next((copy / "src" / "models" / "bundle").rglob("*.onnx"))
    raw = bytearray(graph.read_bytes())
    raw[len(raw) // 2] ^= 1
    graph.write_bytes(raw)
    said = refusal(home, tmp_path / "there", str(copy), SECRET_KEY=KEY)
    assert graph.relative_to(copy).as_posix() in said and "differs from what was saved" in said

# --- what is in it

def test_no_secret_and_no_pickle_is_packed(packed: tuple[str, Path]) -> None:
    files = [p for p in packed[1].rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert len(files) > 50 and not any(KEY.encode() in p.read_bytes() for p in files)
    assert [p.name for p in files if p.name.startswith(".env") or p.suffix in (".pkl", ".pickle", ".joblib", ".sqlite")] == []

def test_the_command_builds_what_bentoml_build_does(home: dict[str, str], packed: tuple[str, Path], bundle: Path) -> None:
    with pytest.MonkeyPatch.context() as m:
        m.setenv("BENTOML_HOME", home["BENTOML_HOME"])
        assert build_bento(bundle, "mine", ROOT) == "rakuten-nb:mine"
    contents = lambda folder: {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert contents(packed[1].with_name("mine")) == contents(packed[1])
