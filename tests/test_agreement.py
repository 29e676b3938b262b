"""A bundle predicts the same in the process that trained it, in a new process, and in the light environment.

The comparison itself is tested: `test_detects_a_change_of_cleaning_between_training_and_serving` cleans differently in
the process that predicts, and the comparison must then find a difference. A manual test also detected these changes:
HTML not removed, capitals not lowered, no NFKC."""
import csv
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Run, once
from hard_products import HOW_MANY

from rakuten_nb.models.bundle import BundleError, load_bundle

NOT_SERVED = ("tensorflow", "keras", "tf2onnx", "matplotlib", "mlflow", "dvc", "papermill")
PACKAGED = ("setup.py", "settings.ini", "README.md", "LICENSE", "MANIFEST.in", "rakuten_nb")
FILES = ("bundle.json", "trained.npz", "experts/text_linear/expert.json", "experts/text_linear/arrays.npz",
         "experts/image/expert.json", "experts/image/arrays.npz", "experts/image/backbone.onnx")

LOAD_ALONE = """
import sys, time
def refuse(event, args):
    network = "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"
    if event in network: raise OSError(f"{event}: this process has no network")
sys.addaudithook(refuse)
from rakuten_nb.models.bundle import Bundle
began = time.perf_counter()
version, seconds = Bundle.load(sys.argv[1]).version, round(time.perf_counter() - began, 3)
print(version, seconds, *sorted({m.split(".")[0] for m in sys.modules}))
"""

CLEAN_DIFFERENTLY = """
import html, sys
import rakuten_nb.data.clean as clean
original = clean.clean_text
def unescape_once(text, max_chars=1500):
    return clean.normalise(clean._tag.sub(" ", html.unescape(text))).lower()[:max_chars].rstrip()
changes = {
    "nothing": original,
    "unescapes once": unescape_once,
    "shorter": lambda text, max_chars=1500: original(text, max_chars // 2),
}
clean.clean_text = changes[sys.argv.pop(1)]
from rakuten_nb.cli import run
run()
"""

def read_predictions(path: Path) -> tuple[np.ndarray, np.ndarray]: # (n,) codes as text, (n,) confidence
    "Read predictions.csv."
    with path.open(encoding="utf-8", newline="") as f: lines = list(csv.DictReader(f))
    confidence = [float(line["confidence"] or 0) for line in lines]
    return np.array([line["prdtypecode"] for line in lines]), np.array(confidence)

def differing_rows(trained: Path, predictions: Path) -> list[int]:
    "The products whose code or confidence (by more than 1e-5) differs from that of the process that trained."
    code, confidence = read_predictions(predictions)
    with np.load(trained / "predictions.npz", allow_pickle=False) as expected:
        assert len(code) == len(expected["code"]) == HOW_MANY
        differs = (code != expected["code"].astype(str)) | (np.abs(confidence - expected["confidence"]) > 1e-5)
    return np.flatnonzero(differs).tolist()

@pytest.fixture(scope="session")
def serving(shared: Path, python: Run) -> Path: # its Python
    "A second environment with the locked light set, and the package built from a copy of its sources."
    uv = Path(sys.executable).with_name("uv")
    def make(part: Path) -> None:
        source, place = part / "source", shared / "serving-env" # an environment cannot be moved
        source.mkdir()
        for name in PACKAGED:
            if not (ROOT / name).is_dir(): shutil.copy(ROOT / name, source)
            else: shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        install = "pip", "install", "--quiet", "--python", place / "bin/python"
        for command in (("venv", "--quiet", "--clear", "--python", sys.executable, place),
                        (*install, "-r", ROOT / "requirements/serve.txt"), (*install, "--no-deps", source)):
            answer = python(*command, program=uv)
            assert answer.returncode == 0, answer.stderr
    once(shared / "serving", make)
    return shared / "serving-env/bin/python"

def test_a_new_process_predicts_the_same(trained: Path, hard_catalog: Path, rakuten: Run, tmp_path: Path) -> None:
    out = tmp_path / "predictions.csv"
    own = {"RAKUTEN_DATA_DIR": str(tmp_path / "data")}
    answer = rakuten("predict", trained / "bundle", hard_catalog, "--out", out, extra=own)
    assert answer.returncode == 0, answer.stderr
    assert differing_rows(trained, out) == []

def test_the_light_environment_predicts_the_same(
    trained: Path, hard_catalog: Path, serving: Path, python: Run, tmp_path: Path,
) -> None:
    out, own = tmp_path / "predictions.csv", {"PYTHONPATH": "", "RAKUTEN_DATA_DIR": str(tmp_path / "data")}
    program = f"import importlib.util as u; print([m for m in {NOT_SERVED} if u.find_spec(m)])"
    installed = python("-c", program, program=serving, extra=own)
    assert installed.stdout.strip() == "[]", "the light environment contains training packages"
    command = serving.with_name("rakuten-nb")
    answer = python("predict", trained / "bundle", hard_catalog, "--out", out, program=command, extra=own)
    assert answer.returncode == 0, answer.stderr
    assert differing_rows(trained, out) == []

def test_the_bundle_loads_without_network_and_tensorflow(bundle: Path, serving: Path, python: Run) -> None:
    answer = python("-c", LOAD_ALONE, bundle, program=serving, extra={"PYTHONPATH": ""})
    assert answer.returncode == 0, answer.stderr
    version, seconds, *modules = answer.stdout.split()
    print(f"bundle {version} loaded in {seconds} s")
    assert "rakuten_nb" in modules
    assert set(NOT_SERVED) & set(modules) == set()

@pytest.mark.parametrize("change", ["nothing", "unescapes once", "shorter"])
def test_detects_a_change_of_cleaning_between_training_and_serving(
    change: str, trained: Path, hard_catalog: Path, python: Run, tmp_path: Path,
) -> None:
    out = tmp_path / "predictions.csv"
    answer = python("-c", CLEAN_DIFFERENTLY, change, "predict", trained / "bundle", hard_catalog, "--out", out)
    assert answer.returncode == 0, answer.stderr
    assert (differing_rows(trained, out) == []) == (change == "nothing")

def test_the_bundle_holds_these_files(bundle: Path) -> None:
    files = [p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()]
    assert sorted(files) == sorted(FILES)

@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    "A copy of the bundle that a test may damage."
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))

@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_rejected_and_the_file_named(name: str, own_bundle: Path) -> None:
    raw = bytearray((own_bundle / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (own_bundle / name).write_bytes(raw)
    with pytest.raises(BundleError, match=re.escape(str(own_bundle / name))): load_bundle(own_bundle)

@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_rejected_and_named(name: str, own_bundle: Path) -> None:
    (own_bundle / name).unlink()
    with pytest.raises(BundleError, match=re.escape(str(own_bundle / name))): load_bundle(own_bundle)

def test_an_extra_file_in_a_bundle_is_rejected_and_named(own_bundle: Path) -> None:
    (own_bundle / "experts/image/note.txt").write_text("left here", encoding="utf-8")
    with pytest.raises(BundleError, match=r"note\.txt"): load_bundle(own_bundle)

@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_the_command_line_rejects_a_changed_bundle_in_one_line(
    command: str, own_bundle: Path, hard_catalog: Path, rakuten: Run, tmp_path: Path,
) -> None:
    with (own_bundle / "experts/image/backbone.onnx").open("ab") as f: f.write(b"\0")
    before = {p.name for p in tmp_path.iterdir()}
    options = ("--out", tmp_path / "predictions.csv") if command == "predict" else ()
    answer = rakuten(command, own_bundle, hard_catalog, *options)
    assert (answer.returncode, len(answer.stderr.splitlines())) == (2, 1)
    assert "backbone.onnx: differs" in answer.stderr
    assert {p.name for p in tmp_path.iterdir()} == before
