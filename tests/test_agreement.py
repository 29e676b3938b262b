"""The bundle says the same wherever it is asked: where it was trained, in a fresh process, and where nothing but the light set is installed.

That this can fail is itself tested: `test_a_change_of_cleaning_on_one_side_is_noticed` cleans differently in the process that
predicts, and the same comparison must then find a difference. Tried once by hand besides: HTML kept, capitals kept, no NFKC;
each was noticed."""
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
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"): raise OSError(f"{event}: there is no network here")
sys.addaudithook(refuse)
from rakuten_nb.models.bundle import Bundle
began = time.perf_counter()
print(Bundle.load(sys.argv[1]).version, round(time.perf_counter() - began, 3), *sorted({m.split(".")[0] for m in sys.modules}))
"""

CLEAN_ANOTHER_WAY = """
import html, sys
import rakuten_nb.data.clean as clean
ours = clean.clean_text
changes = {
    "nothing": ours,
    "unescapes once": lambda text, max_chars=1500: clean.normalise(clean._tag.sub(" ", html.unescape(text))).lower()[:max_chars].rstrip(),
    "shorter": lambda text, max_chars=1500: ours(text, max_chars // 2),
}
clean.clean_text = changes[sys.argv.pop(1)]
from rakuten_nb.cli import run
run()
"""

def answers(path: Path) -> tuple[np.ndarray, np.ndarray]: # (n,) codes as text, (n,) confidence
    "What predictions.csv says."
    with path.open(encoding="utf-8", newline="") as f: lines = list(csv.DictReader(f))
    return np.array([line["prdtypecode"] for line in lines]), np.array([float(line["confidence"] or 0) for line in lines])

def disagreements(trained: Path, predictions: Path) -> list[int]: # rows
    "The products of which the file says something else than the process that trained: another code, or a confidence 1e-5 away."
    code, confidence = answers(predictions)
    with np.load(trained / "said.npz", allow_pickle=False) as said:
        assert len(code) == len(said["code"]) == HOW_MANY
        other = (code != said["code"].astype(str)) | (np.abs(confidence - said["confidence"]) > 1e-5)
    return np.flatnonzero(other).tolist()

@pytest.fixture(scope="session")
def serving(shared: Path, python: Run) -> Path: # its Python
    "A second environment: the locked light set, and the project built from a copy of its sources."
    uv = Path(sys.executable).with_name("uv")
    def make(part: Path) -> None:
        source, place = part / "source", shared / "serving-env" # an environment cannot be moved once it is made
        source.mkdir()
        for name in PACKAGED:
            if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else: shutil.copy(ROOT / name, source)
        install = "pip", "install", "--quiet", "--python", place / "bin/python"
        for command in (("venv", "--quiet", "--clear", "--python", sys.executable, place),
                        (*install, "-r", ROOT / "requirements/serve.txt"), (*install, "--no-deps", source)):
            answer = python(*command, program=uv)
            assert answer.returncode == 0, answer.stderr
    once(shared / "serving", make)
    return shared / "serving-env/bin/python"

def test_a_fresh_process_agrees(trained: Path, hard_catalog: Path, rakuten: Run, tmp_path: Path) -> None:
    out = tmp_path / "predictions.csv"
    answer = rakuten("predict", trained / "bundle", hard_catalog, "--out", out, extra={"RAKUTEN_DATA_DIR": str(tmp_path / "data")})
    assert answer.returncode == 0, answer.stderr
    assert disagreements(trained, out) == []

def test_the_light_environment_agrees(trained: Path, hard_catalog: Path, serving: Path, python: Run, tmp_path: Path) -> None:
    out, own = tmp_path / "predictions.csv", {"PYTHONPATH": "", "RAKUTEN_DATA_DIR": str(tmp_path / "data")}
    missing = python("-c", f"import importlib.util as u; print([m for m in {NOT_SERVED} if u.find_spec(m)])", program=serving, extra=own)
    assert missing.stdout.strip() == "[]", "what only training needs is installed there"
    answer = python("predict", trained / "bundle", hard_catalog, "--out", out, program=serving.with_name("rakuten-nb"), extra=own)
    assert answer.returncode == 0, answer.stderr
    assert disagreements(trained, out) == []

def test_the_bundle_loads_without_network_and_tensorflow(bundle: Path, serving: Path, python: Run) -> None:
    answer = python("-c", LOAD_ALONE, bundle, program=serving, extra={"PYTHONPATH": ""})
    assert answer.returncode == 0, answer.stderr
    version, seconds, *modules = answer.stdout.split()
    print(f"bundle {version} loaded in {seconds} s")
    assert "rakuten_nb" in modules
    assert set(NOT_SERVED) & set(modules) == set()

@pytest.mark.parametrize("change", ["nothing", "unescapes once", "shorter"])
def test_a_change_of_cleaning_on_one_side_is_noticed(change: str, trained: Path, hard_catalog: Path, python: Run, tmp_path: Path) -> None:
    out = tmp_path / "predictions.csv"
    answer = python("-c", CLEAN_ANOTHER_WAY, change, "predict", trained / "bundle", hard_catalog, "--out", out)
    assert answer.returncode == 0, answer.stderr
    assert (disagreements(trained, out) == []) == (change == "nothing")

def test_the_bundle_holds_these_files(bundle: Path) -> None:
    assert sorted(p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()) == sorted(FILES)

@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    "A copy that may be spoiled."
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))

@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_refused_by_name(name: str, own_bundle: Path) -> None:
    raw = bytearray((own_bundle / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (own_bundle / name).write_bytes(raw)
    with pytest.raises(BundleError, match=re.escape(str(own_bundle / name))): load_bundle(own_bundle)

@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused_by_name(name: str, own_bundle: Path) -> None:
    (own_bundle / name).unlink()
    with pytest.raises(BundleError, match=re.escape(str(own_bundle / name))): load_bundle(own_bundle)

def test_an_extra_file_in_a_bundle_is_rejected_and_named(own_bundle: Path) -> None:
    (own_bundle / "experts/image/note.txt").write_text("left here", encoding="utf-8")
    with pytest.raises(BundleError, match=r"note\.txt"): load_bundle(own_bundle)

@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_the_command_line_refuses_a_changed_bundle_in_one_line(command: str, own_bundle: Path, hard_catalog: Path, rakuten: Run, tmp_path: Path) -> None:
    with (own_bundle / "experts/image/backbone.onnx").open("ab") as f: f.write(b"\0")
    before = {p.name for p in tmp_path.iterdir()}
    answer = rakuten(command, own_bundle, hard_catalog, *(("--out", tmp_path / "predictions.csv") if command == "predict" else ()))
    assert (answer.returncode, len(answer.stderr.splitlines())) == (2, 1)
    assert "backbone.onnx: differs" in answer.stderr
    assert {p.name for p in tmp_path.iterdir()} == before
