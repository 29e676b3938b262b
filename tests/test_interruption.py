"""`train` and `predict` stopped at critical moments: an existing result stays complete, and no partial result appears.

A process runs the command line and stops when it enters a given function. It creates a file to report this, and the
test then sends the signal."""
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Run, once

from rakuten_nb.models.bundle import load_bundle

TIMEOUT = 120 # seconds until a process reaches the moment, and until it ends
Moment = tuple[str, int] # function, and at which of its calls the process stops

# Runs the command line, and stops when it enters a function for the n-th time.
PAUSING = """
import importlib, signal, sys, time
from pathlib import Path
# A shell passes an ignored SIGINT on to the processes that it starts in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
function, calls_left, ready = sys.argv.pop(1), int(sys.argv.pop(1)), Path(sys.argv.pop(1))
module, _, name = function.partition(":")
*classes, name = name.split(".")
owner = importlib.import_module(module)
for part in classes: owner = getattr(owner, part)
original = getattr(owner, name)
def pausing(*args, **kwargs):
    global calls_left
    calls_left -= 1
    if calls_left == 0:
        ready.touch()
        time.sleep(600)
    return original(*args, **kwargs)
setattr(owner, name, pausing)
from rakuten_nb.cli import run
run()
"""

TRAIN: dict[str, Moment] = {
    "reading the catalogue": ("rakuten_nb.data.catalog:bad_pictures", 1),
    "embedding pictures": ("rakuten_nb.models.embedding_cache:EmbeddingCache.put", 1),
    "training the third fold": ("rakuten_nb.models.text_linear:fit_logistic", 3),
    "half the bundle written": ("rakuten_nb.models.image:save_state", 1),
    "the bundle written, not yet moved": ("rakuten_nb.models.bundle:bundle_meta", 1),
}
PREDICT: dict[str, Moment] = {
    "loading the bundle": ("rakuten_nb.models.bundle:verify_bundle", 1),
    "predicting": ("rakuten_nb.models.bundle:Bundle.predict_chunk", 1),
    "half the file written": ("rakuten_nb.models.bundle:prediction_cells", 20),
    "the file written, not yet moved": ("pathlib:Path.replace", 1),
}
BEFORE_SWAP: Moment = ("rakuten_nb.files:exchange", 1) # the next call exchanges the new bundle and the old one
AFTER_SWAP: Moment = ("shutil:rmtree", 1) # the next call deletes the old bundle

def content(folder: Path) -> dict[str, bytes]: # relative path → bytes
    "The content of every visible file in a folder."
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if not name.startswith(".")}

def fresh_data(env: dict[str, str], folder: Path) -> dict[str, str]:
    "An environment whose cache holds the exported backbone, which takes long to create, and no embedding."
    (cache := folder / "cache").mkdir(parents=True)
    for graph in (Path(env["RAKUTEN_DATA_DIR"]) / "cache").glob("*.onnx"): shutil.copy(graph, cache)
    return env | {"RAKUTEN_DATA_DIR": str(folder)}

def stop(command: list[object], moment: Moment, sent: signal.Signals, env: dict[str, str], scratch: Path) -> int:
    "Run the command line up to a moment, send a signal, and return the exit code."
    (ready := scratch / "ready").unlink(missing_ok=True)
    output = scratch / "output"
    arguments = [sys.executable, "-c", PAUSING, *map(str, (*moment, ready, *command))]
    with output.open("w") as f:
        process = subprocess.Popen(arguments, env=env, cwd=scratch, stdout=f, stderr=f, start_new_session=True)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not ready.exists():
            running = process.poll() is None and time.monotonic() < deadline
            assert running, f"did not reach {moment}: {output.read_text()}"
            time.sleep(0.02)
        os.kill(process.pid, sent)
        return process.wait(TIMEOUT)
    finally:
        if process.poll() is None: process.kill()

@dataclass
class Workbench:
    "Runs commands that are stopped, and the folder of their results."
    bundle: Path
    small: Path # a catalogue
    env: dict[str, str]
    place: Path # a folder for results only
    scratch: Path

    @property
    def result(self) -> Path:
        "The bundle that `train` writes."
        return self.place / "bundle"

    @property
    def predict_command(self) -> list[object]:
        "The command that writes predictions.csv."
        return ["predict", self.bundle, self.small, "--out", self.place / "predictions.csv"]

    def train_command(self, experts: str = "text_linear,image") -> list[object]:
        "The command that writes the bundle."
        return ["train", self.small, "--bundle", self.result, "--experts", experts]

    def stop(
        self, command: list[object], moment: Moment, sent: signal.Signals, env: dict[str, str] | None = None,
    ) -> int:
        "Run a command up to a moment, send a signal, and return the exit code."
        return stop(command, moment, sent, env or self.env, self.scratch)

    def check_unchanged(self, before: dict[str, bytes], sent: signal.Signals) -> None:
        "The result is unchanged. An interrupt leaves no other file, a kill at most hidden temporary ones."
        assert content(self.place) == before
        others = {p.name for p in self.place.iterdir()} - {name.split("/")[0] for name in before}
        if sent == signal.SIGINT: assert others == set()
        assert [name for name in others if not (name.startswith(".") and name.endswith((".tmp", ".old")))] == []

@pytest.fixture(scope="session")
def small(shared: Path) -> Path:
    "A catalogue of eighty labelled products, most with a picture, and eight more."
    from rakuten_nb.data.sample import make_sample
    return once(shared / "small", lambda part: make_sample(part, 80, progress=False))

@pytest.fixture
def bench(small: Path, bundle: Path, env: dict[str, str], tmp_path: Path) -> Workbench:
    "A workbench without results."
    (place := tmp_path / "place").mkdir()
    return Workbench(bundle, small, env, place, tmp_path)

@pytest.fixture
def trained_bench(bench: Workbench) -> Workbench:
    "A workbench with an earlier bundle."
    shutil.copytree(bench.bundle, bench.result)
    return bench

SIGNALS = pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
CODES = {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}

@SIGNALS
@pytest.mark.parametrize("moment", TRAIN)
def test_a_stopped_training_leaves_the_earlier_bundle(
    moment: str, sent: signal.Signals, trained_bench: Workbench, tmp_path: Path,
) -> None:
    before = content(trained_bench.place)
    own = fresh_data(trained_bench.env, tmp_path / "data")
    assert trained_bench.stop(trained_bench.train_command(), TRAIN[moment], sent, own) == CODES[sent]
    trained_bench.check_unchanged(before, sent)

@SIGNALS
@pytest.mark.parametrize("moment", PREDICT)
def test_a_stopped_prediction_leaves_the_earlier_file(moment: str, sent: signal.Signals, bench: Workbench) -> None:
    (bench.place / "predictions.csv").write_text("earlier predictions\n", encoding="utf-8")
    before = content(bench.place)
    assert bench.stop(bench.predict_command, PREDICT[moment], sent) == CODES[sent]
    bench.check_unchanged(before, sent)

@SIGNALS
def test_a_stopped_command_creates_no_result(sent: signal.Signals, bench: Workbench) -> None:
    stopped = ((bench.train_command(), TRAIN["half the bundle written"]),
               (bench.predict_command, PREDICT["half the file written"]))
    for command, moment in stopped:
        assert bench.stop(command, moment, sent) == CODES[sent]
        bench.check_unchanged({}, sent)

def test_a_run_succeeds_after_a_killed_one(bench: Workbench, rakuten: Run) -> None:
    bench.stop(bench.predict_command, PREDICT["half the file written"], signal.SIGKILL)
    answer = rakuten(*bench.predict_command)
    assert answer.returncode == 0, answer.stderr
    lines = (bench.place / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 80 + 8

def test_an_interrupt_before_the_swap_leaves_the_old_bundle(trained_bench: Workbench) -> None:
    before = content(trained_bench.place)
    assert trained_bench.stop(trained_bench.train_command("text_linear"), BEFORE_SWAP, signal.SIGINT) == 130
    trained_bench.check_unchanged(before, signal.SIGINT)

@pytest.mark.parametrize("moment", [BEFORE_SWAP, AFTER_SWAP], ids=["before", "after"])
def test_a_kill_around_the_swap_leaves_one_complete_bundle(moment: Moment, trained_bench: Workbench) -> None:
    before = content(trained_bench.result)
    trained_bench.stop(trained_bench.train_command("text_linear"), moment, signal.SIGKILL)
    assert (content(trained_bench.result) == before) == (moment == BEFORE_SWAP)
    assert load_bundle(trained_bench.result).experts

def test_sigterm_deletes_temporary_files(bench: Workbench) -> None:
    assert bench.stop(bench.train_command(), TRAIN["half the bundle written"], signal.SIGTERM) == 143
    assert list(bench.place.iterdir()) == []
