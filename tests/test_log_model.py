"An existing model comes under tracking: read, mended, re-saved, checked, and nothing in it run."
import json
import os
import pickle
import shutil
import sqlite3
import zipfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, once

from rakuten_nb.taxonomy import CODES
from rakuten_nb.tracking.keras2 import (
    ModelFile,
    course_lstm,
    largest_difference,
    named_objects,
    numpy_answers,
    write_h5,
)

pytestmark = pytest.mark.services # runs the pipeline or an MLflow registry

QUESTIONS = np.random.default_rng(7).integers(0, 300, (20, 10)).astype(np.float32)
AWAY = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

# The command line several times in one process, for TensorFlow takes long to come: each with its arguments and environment.
MANY = """
import contextlib, io, json, os, sys
from rakuten_nb.cli import run
said = {}
for name, (args, env) in json.load(open(sys.argv[1])).items():
    before, sys.argv[1:], out, err, code = dict(os.environ), args, io.StringIO(), io.StringIO(), 0
    os.environ.update(env)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: run()
        except SystemExit as e: code = e.code or 0
    os.environ.clear(), os.environ.update(before)
    said[name] = (code, out.getvalue(), err.getvalue())
print(json.dumps(said))
"""
# What a process that knows nothing of this project gets when it loads a logged model in both of MLflow's ways.
ASK = """
import sys, mlflow, mlflow.keras, mlflow.pyfunc, numpy as np
uri, questions, out = sys.argv[1:]
x, function = np.load(questions), mlflow.pyfunc.load_model(uri)
np.savez(out, keras=np.asarray(mlflow.keras.load_model(uri)(x)), pyfunc=function.predict(x), example=np.asarray(function.input_example))
"""

class Canary:
    "Makes a folder when it is unpickled."

    def __init__(self, folder: Path): self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]: return os.mkdir, (str(self.folder),)

def small(**sizes: int) -> ModelFile:
    "The course's model, small enough to be made in no time."
    return course_lstm(**{"words": 300, "dims": 8, "units": 6} | sizes)

def changed(kind: str, **arguments: object) -> ModelFile:
    "A model file with other arguments in its layers of one class."
    found = small()
    for o in named_objects(found.config):
        if o["class_name"] == kind: o["config"] |= arguments
    return found

def with_lambda() -> ModelFile:
    "A model file whose last layer is a Lambda."
    found = small()
    found.config["config"]["layers"][3] |= {"class_name": "Lambda"}
    return found

# Model files that are refused: how each is made, and what is said of it.
BAD: dict[str, tuple[ModelFile | bytes, str]] = {
    "empty.h5": (b"", "an empty file"),
    "pickle.h5": (pickle.dumps(Canary(Path("canary"))), "a pickle, which is never opened"),
    "page.keras": (b"<!DOCTYPE html>", "found text"),
    "lambda.h5": (with_lambda(), "names 'Lambda'"),
    "time_major.h5": (changed("LSTM", time_major=True), "layer 'lstm' (LSTM) has time_major=True"),
    "hard_sigmoid.h5": (changed("LSTM", recurrent_activation="hard_sigmoid"), "another function in Keras 3"),
    "unknown.h5": (changed("Dense", wisdom=3), "layer 'dense' (Dense) has wisdom=3"),
    "wider.h5": (changed("Dense", units=28), "cannot be read as a Keras model"),
    "weightless.h5": (small()._replace(weights={}), "cannot be read as a Keras model"),
    "cut.h5": (b"", "cannot be read as a Keras model"), # cut from a good one
    "cut.keras": (b"", "cannot be read as a Keras model"),
}
# Arguments that are refused for what lies beside the model.
MISFITS = {
    "tokenizer of another model": (["narrow.h5", "tokenizer_config.json"], "expected word numbers below 200"),
    "mapper to other types": (["best_lstm_model.h5", "other/mapper.json"], "1 missing (2905), 1 unknown (99)"),
    "broken mapper": (["best_lstm_model.h5", "broken/mapper.json"], "is not JSON"),
    "no model": (["mapper.json"], "expected one model file"),
    "two models": (["best_lstm_model.h5", "narrow.h5"], "found best_lstm_model.h5, narrow.h5"),
    "a folder": (["best_lstm_model.h5", "other"], "found a folder"),
}

def write_files(home: Path) -> list[str]:
    "Every file of these tests; the names of the companions that fit."
    write_h5(home / "best_lstm_model.h5", small())
    write_h5(home / "narrow.h5", small(words=200))
    for name, (content, _) in BAD.items():
        if isinstance(content, bytes): (home / name).write_bytes(content)
        else: write_h5(home / name, content)
    (home / "cut.h5").write_bytes((home / "best_lstm_model.h5").read_bytes()[:6000])
    words = json.dumps({f"mot{i}": i for i in range(1, 900)})
    texts = {"tokenizer_config.json": json.dumps({"class_name": "Tokenizer", "config": {"num_words": 300, "word_index": words}}),
             "mapper.json": json.dumps(dict(enumerate(CODES))), "other/mapper.json": json.dumps(dict(enumerate([*CODES[:-1], 99]))), "broken/mapper.json": "{"}
    for name, text in texts.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text, encoding="utf-8")
    for name in ("tokenizer.pickle", "mapper.pkl", "disguised.json"): (home / name).write_bytes(pickle.dumps(Canary(home / "canary")))
    return ["tokenizer_config.json", "mapper.json", "tokenizer.pickle", "mapper.pkl", "disguised.json"]

@dataclass
class Tracked:
    "What was logged to one MLflow, and what the command line said."
    home: Path # files, and the database
    said: dict[str, tuple[int, str, str]] # exit code, standard output, standard error

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        "What MLflow's database says."
        with closing(sqlite3.connect(self.home / "mlflow.db")) as db: return db.execute(query).fetchall()

    def run(self, source: str) -> str:
        "The one run that logged a file."
        [(run,)] = self.rows(f"select run_uuid from tags where key = 'source' and value = '{source}'")
        return str(run)

    def artefacts(self, source: str) -> dict[str, Path]:
        "Every file of a run and of its model, by its path within."
        run = self.run(source)
        places = self.rows(f"select artifact_uri from runs where run_uuid = '{run}'")
        places += self.rows(f"select artifact_location from logged_models where source_run_id = '{run}'")
        folders = [Path(uri.removeprefix("file://")) for (uri,) in places]
        return {p.relative_to(folder).as_posix(): p for folder in folders for p in folder.rglob("*") if p.is_file()}

def tracking(home: Path) -> dict[str, str]:
    "The environment of a process that logs there."
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}", "MLFLOW_DISABLE_TELEMETRY": "true"}

@pytest.fixture(scope="session")
def tracked(shared: Path, rakuten: Run, python: Run) -> Tracked:
    "The course's model with companions, its re-saved form alone, and all that is refused; made once a run."
    home = shared / "log_model_home"
    def make(part: Path) -> None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        fitting = write_files(home)
        first = rakuten("log-model", home / "best_lstm_model.h5", *(home / name for name in fitting), extra=tracking(home))
        assert first.returncode == 0, first.stderr
        archive = Tracked(home, {}).artefacts("best_lstm_model.h5")["data/model.keras"].read_bytes()
        (home / "again.keras").write_bytes(archive)
        (home / "cut.keras").write_bytes(archive[: len(archive) // 2])
        calls = {name: (["log-model", str(home / name)], {}) for name in [*BAD, "again.keras"]}
        calls |= {name: (["log-model", *(str(home / f) for f in files)], {}) for name, (files, _) in MISFITS.items()}
        (part / "calls.json").write_text(json.dumps(calls | {"away": (["log-model", str(home / "narrow.h5")], AWAY)}), encoding="utf-8")
        others = python("-c", MANY, part / "calls.json", extra=tracking(home))
        assert others.returncode == 0, others.stderr
        said = json.loads(others.stdout.splitlines()[-1]) | {"course": (first.returncode, first.stdout, first.stderr)}
        (part / "said.json").write_text(json.dumps(said), encoding="utf-8")
    return Tracked(home, json.loads((once(shared / "log_model", make) / "said.json").read_text(encoding="utf-8")))

# --- what goes well

def test_says_what_it_mended_and_how_the_answers_compare(tracked: Tracked) -> None:
    _, out, err = tracked.said["course"]
    expected = ("Keras 2.15.0", "time_major=False left out", "input_length=10 left out", "is now called batch_shape",
                "largest difference of the re-saved model", "plain arithmetic",
                "tokenizer.pickle: pickle, kept as bytes, never opened", "mapper_order taxonomy", "models:/")
    assert [words for words in expected if words not in " ".join(out.split())] == [] and err == ""

def test_the_run_is_whole(tracked: Tracked) -> None:
    run = tracked.run("best_lstm_model.h5")
    said = lambda table: dict(tracked.rows(f"select key, value from {table} where run_uuid = '{run}'"))
    params, tags, metrics = said("params"), said("tags"), said("metrics")
    assert tracked.rows(f"select status from runs where run_uuid = '{run}'") == [("FINISHED",)]
    assert params["vocabulary"] == "300" and params["positions"] == "10" and params["classes"] == "27" and params["tokenizer_num_words"] == "300"
    assert tags["keras_version"] == "2.15.0" and "time_major" in tags["remarks"] and len(tags["source_sha256"]) == 64
    assert metrics["resaved_difference"] <= 1e-6 and metrics["numpy_difference"] <= 1e-5

def test_files_are_kept_as_they_came(tracked: Tracked) -> None:
    found = tracked.artefacts("best_lstm_model.h5")
    assert found["original/best_lstm_model.h5"].read_bytes() == (tracked.home / "best_lstm_model.h5").read_bytes()
    companions = {name.removeprefix("companions/"): p.read_bytes() for name, p in found.items() if name.startswith("companions/")}
    assert companions.keys() == {"tokenizer_config.json", "mapper.json", "tokenizer.pickle", "mapper.pkl", "disguised.json"}
    assert all((tracked.home / name).read_bytes() == raw for name, raw in companions.items())

def test_no_pickle_was_opened(tracked: Tracked, tmp_path: Path) -> None:
    assert not (tracked.home / "canary").exists() and not (tracked.home.parent / "canary").exists()
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary"))) # noqa: S301 # it would have been seen
    assert (tmp_path / "canary").exists()

def test_no_pickle_was_made(tracked: Tracked) -> None:
    made = {name: p for name, p in tracked.artefacts("best_lstm_model.h5").items() if not name.startswith(("companions/", "original/"))}
    assert "data/model.keras" in made and "input_example.json" in made
    assert [name for name, p in made.items() if p.suffix in (".pkl", ".pickle") or p.read_bytes()[:1] == b"\x80"] == []
    with zipfile.ZipFile(made["data/model.keras"]) as z: assert set(z.namelist()) == {"metadata.json", "config.json", "model.weights.h5"}

def test_the_logged_model_answers_as_the_file_does(tracked: Tracked, python: Run, tmp_path: Path) -> None:
    uri = next(word for word in tracked.said["course"][1].split() if word.startswith("models:/"))
    np.save(tmp_path / "questions.npy", QUESTIONS)
    answer = python("-c", ASK, uri, tmp_path / "questions.npy", tmp_path / "answers.npz", extra=tracking(tracked.home))
    assert answer.returncode == 0, answer.stderr
    expected = numpy_answers(small(), QUESTIONS)
    assert expected is not None
    with np.load(tmp_path / "answers.npz") as found:
        assert found["example"].shape == (2, 10)
        for way in ("keras", "pyfunc"): assert found[way].shape == (20, 27) and largest_difference([found[way]], [expected]) <= 1e-6

def test_a_keras_archive_alone(tracked: Tracked) -> None:
    code, out, err = tracked.said["again.keras"]
    assert code == 0 and "nothing had to be mended" in out, err
    assert "data/model.keras" in tracked.artefacts("again.keras")

# --- what is refused

def one_line(said: tuple[int, str, str], code: int = 2) -> str:
    "The one line of a command that refused."
    assert said[0] == code and said[2].startswith("error: ") and said[2].count("\n") == 1, said
    return said[2]

@pytest.mark.parametrize("name", BAD)
def test_a_bad_model_is_one_line(name: str, tracked: Tracked) -> None:
    said = one_line(tracked.said[name])
    assert name in said and BAD[name][1] in said

@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_one_line(name: str, tracked: Tracked) -> None:
    assert MISFITS[name][1] in one_line(tracked.said[name]).replace(f"{tracked.home}/", "")

def test_mlflow_away_is_one_line(tracked: Tracked) -> None:
    assert "127.0.0.1:9: connection refused" in one_line(tracked.said["away"], code=1)

def test_what_is_refused_leaves_no_run(tracked: Tracked) -> None:
    found = tracked.rows("select status, value from runs join tags using (run_uuid) where key = 'source'")
    assert sorted(found) == [("FINISHED", "again.keras"), ("FINISHED", "best_lstm_model.h5")]
    assert tracked.rows("select count(*) from runs") == [(2,)]
