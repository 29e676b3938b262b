"""`train` and `predict` stopped at awkward moments: what lay there before lies there still, whole, and nothing half is left.

The moments are real ones of a real run: the process runs the command line, stops on entering a function that is named,
says so by making a file, and is then sent the signal."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Run, once

from rakuten_nb.models.bundle import load_bundle

PATIENCE = 120 # seconds in which a process must get to the moment, or leave

PAUSING = """
import importlib, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler) # a shell hands on an ignored one to what it starts in the background
where, call, ready = sys.argv.pop(1), int(sys.argv.pop(1)), Path(sys.argv.pop(1))
module, _, name = where.partition(":")
*owner, name = name.split(".")
holder = importlib.import_module(module)
for part in owner: holder = getattr(holder, part)
work = getattr(holder, name)
def pausing(*args, **kwargs):
    global call
    call -= 1
    if call == 0:
        ready.touch()
        time.sleep(600)
    return work(*args, **kwargs)
setattr(holder, name, pausing)
from rakuten_nb.cli import run
run()
"""

TRAIN = { # moment → the function that is entered, for the how many-th time
    "reading": ("rakuten_nb.data.catalog:bad_pictures", 1),
    "embedding pictures": ("rakuten_nb.models.embedding_cache:EmbeddingCache.put", 1),
    "learning the third fold": ("rakuten_nb.models.text_linear:fit_logistic", 3),
    "half the bundle written": ("rakuten_nb.models.image:save_state", 1),
    "the bundle written, not yet in place": ("rakuten_nb.models.bundle:bundle_meta", 1),
}
PREDICT = {
    "loading": ("rakuten_nb.models.bundle:verify_bundle", 1),
    "predicting": ("rakuten_nb.models.bundle:Bundle.predict_chunk", 1),
    "half the file written": ("rakuten_nb.models.bundle:prediction_cells", 20),
    "the file written, not yet in place": ("pathlib:Path.replace", 1),
}
SWAPPING = ("rakuten_nb.files:exchange", 1) # the new bundle is about to change places with the old one
SWAPPED = ("shutil:rmtree", 1) # it has, and the old one is about to be removed

@pytest.fixture(scope="session")
def small(shared: Path) -> Path:
    "Eighty labelled products, most with a picture, and eight more."
    from rakuten_nb.data.sample import make_sample
    return once(shared / "small", lambda part: make_sample(part, 80, progress=False))

@pytest.fixture
def place(tmp_path: Path) -> Path:
    "Where the result is going to lie, alone in its folder."
    (folder := tmp_path / "place").mkdir()
    return folder

def content(folder: Path) -> dict[str, bytes]: # relative path → bytes
    "Every file of a folder that is not hidden."
    files = (p for p in folder.rglob("*") if p.is_file())
    return {name: p.read_bytes() for p in files if not (name := p.relative_to(folder).as_posix()).startswith(".")}

def fresh_data(env: dict[str, str], folder: Path) -> dict[str, str]:
    "An environment whose cache holds the exported backbone, which takes long, and no embedding."
    (cache := folder / "cache").mkdir(parents=True)
    for graph in (Path(env["RAKUTEN_DATA_DIR"]) / "cache").glob("*.onnx"): shutil.copy(graph, cache)
    return env | {"RAKUTEN_DATA_DIR": str(folder)}

def stop(typed: list[object], moment: tuple[str, int], sent: signal.Signals, env: dict[str, str], scratch: Path) -> int: # exit code
    "Run the command line to the moment, send the signal, and wait for the end."
    ready = scratch / "ready"
    arguments = [sys.executable, "-c", PAUSING, *map(str, (*moment, ready, *typed))]
    with (scratch / "said").open("w") as said:
        process = subprocess.Popen(arguments, env=env, cwd=scratch, stdout=said, stderr=said, start_new_session=True)
    try:
        until = time.monotonic() + PATIENCE
        while not ready.exists():
            assert process.poll() is None and time.monotonic() < until, f"never got to {moment}: {(scratch / 'said').read_text()}"
            time.sleep(0.02)
        os.kill(process.pid, sent)
        return process.wait(PATIENCE)
    finally:
        if process.poll() is None: process.kill()

def check_left_over(folder: Path, before: dict[str, bytes], sent: signal.Signals) -> None:
    "What lay there lies there still; an interrupt leaves nothing, a kill at most something hidden and temporary."
    assert content(folder) == before
    beside = {p.name for p in folder.iterdir()} - {name.split("/")[0] for name in before}
    if sent == signal.SIGINT: assert beside == set()
    assert [name for name in beside if not (name.startswith(".") and name.endswith((".tmp", ".old")))] == []

SIGNALS = pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
CODES = {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}

@SIGNALS
@pytest.mark.parametrize("moment", TRAIN)
def test_train_stopped(moment: str, sent: signal.Signals, small: Path, bundle: Path, env: dict[str, str], place: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, place / "bundle")
    before = content(place)
    own = fresh_data(env, tmp_path / "data")
    assert stop(["train", small, "--bundle", place / "bundle", "--experts", "text_linear,image"], TRAIN[moment], sent, own, tmp_path) == CODES[sent]
    check_left_over(place, before, sent)

@SIGNALS
@pytest.mark.parametrize("moment", PREDICT)
def test_predict_stopped(moment: str, sent: signal.Signals, small: Path, bundle: Path, env: dict[str, str], place: Path, tmp_path: Path) -> None:
    (place / "predictions.csv").write_text("what was said before\n", encoding="utf-8")
    before = content(place)
    assert stop(["predict", bundle, small, "--out", place / "predictions.csv"], PREDICT[moment], sent, env, tmp_path) == CODES[sent]
    check_left_over(place, before, sent)

@SIGNALS
def test_nothing_appears_where_nothing_was(sent: signal.Signals, small: Path, bundle: Path, env: dict[str, str], place: Path, tmp_path: Path) -> None:
    for typed, moment in ((["train", small, "--bundle", place / "bundle", "--experts", "text_linear,image"], TRAIN["half the bundle written"]),
                          (["predict", bundle, small, "--out", place / "predictions.csv"], PREDICT["half the file written"])):
        (tmp_path / "ready").unlink(missing_ok=True)
        assert stop(typed, moment, sent, env, tmp_path) == CODES[sent]
        check_left_over(place, {}, sent)

def test_what_a_kill_left_is_in_nobodys_way(small: Path, bundle: Path, env: dict[str, str], rakuten: Run, place: Path, tmp_path: Path) -> None:
    typed = "predict", bundle, small, "--out", place / "predictions.csv"
    stop([*typed], PREDICT["half the file written"], signal.SIGKILL, env, tmp_path)
    answer = rakuten(*typed)
    assert answer.returncode == 0, answer.stderr
    assert len((place / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 1 + 80 + 8

def test_an_interrupt_between_old_and_new_brings_the_old_back(small: Path, bundle: Path, env: dict[str, str], place: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, place / "bundle")
    before = content(place)
    assert stop(["train", small, "--bundle", place / "bundle", "--experts", "text_linear"], SWAPPING, signal.SIGINT, env, tmp_path) == 130
    check_left_over(place, before, signal.SIGINT)

@pytest.mark.parametrize("moment", [SWAPPING, SWAPPED], ids=["before", "after"])
def test_a_kill_between_old_and_new_keeps_one_of_them(moment: tuple[str, int], small: Path, bundle: Path, env: dict[str, str], place: Path,
                                                      tmp_path: Path) -> None:
    shutil.copytree(bundle, place / "bundle")
    before = content(place / "bundle")
    stop(["train", small, "--bundle", place / "bundle", "--experts", "text_linear"], moment, signal.SIGKILL, env, tmp_path)
    assert (content(place / "bundle") == before) == (moment == SWAPPING)
    assert load_bundle(place / "bundle").experts

def test_a_request_to_end_is_tidied_up_after(small: Path, bundle: Path, env: dict[str, str], place: Path, tmp_path: Path) -> None:
    typed = ["train", small, "--bundle", place / "bundle", "--experts", "text_linear,image"]
    assert stop(typed, TRAIN["half the bundle written"], signal.SIGTERM, env, tmp_path) == 143
    assert list(place.iterdir()) == []
