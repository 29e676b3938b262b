"`rakuten-nb log-model` checks a legacy model, converts it, logs it to MLflow, and never runs code from a file."
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
    numpy_outputs,
    write_h5,
)

services = pytest.mark.services # needs processes with TensorFlow and MLflow; the other tests start neither

TITLES = np.random.default_rng(7).integers(0, 300, (20, 10)).astype(np.float32) # numbers of words
UNREACHABLE = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}

# Runs many command lines in one process, because TensorFlow starts slowly; each has its arguments and environment.
MANY = """
import contextlib, io, json, os, sys
from rakuten_nb.cli import run
results = {}
for name, (args, env) in json.load(open(sys.argv[1])).items():
    before, sys.argv[1:], out, err, code = dict(os.environ), args, io.StringIO(), io.StringIO(), 0
    os.environ.update(env)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: run()
        except SystemExit as e: code = e.code or 0
    os.environ.clear(), os.environ.update(before)
    results[name] = (code, out.getvalue(), err.getvalue())
print(json.dumps(results))
"""
# Loads a logged model in both of MLflow's ways, without this project, and predicts.
PREDICT = """
import sys, mlflow, mlflow.keras, mlflow.pyfunc, numpy as np
uri, titles, out = sys.argv[1:]
x, function = np.load(titles), mlflow.pyfunc.load_model(uri)
keras = np.asarray(mlflow.keras.load_model(uri)(x))
np.savez(out, keras=keras, pyfunc=function.predict(x), example=np.asarray(function.input_example))
"""

class Canary:
    "Makes a folder when it is unpickled."

    def __init__(self, folder: Path): self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]: return os.mkdir, (str(self.folder),)

def small(**sizes: int) -> ModelFile:
    "The course's model, with few words and units."
    return course_lstm(**{"words": 300, "dims": 8, "units": 6} | sizes)

def changed(kind: str, **arguments: object) -> ModelFile:
    "A model file with other arguments in all layers of one class."
    saved = small()
    for o in named_objects(saved.config):
        if o["class_name"] == kind: o["config"] |= arguments
    return saved

def with_lambda() -> ModelFile:
    "A model file whose last layer is a Lambda."
    saved = small()
    saved.config["config"]["layers"][3] |= {"class_name": "Lambda"}
    return saved

UNREADABLE = "cannot be read ("
# Files that are no model: the content, and a part of the error.
NO_MODEL: dict[str, tuple[bytes, str]] = {
    "empty.h5": (b"", "an empty file"),
    "pickle.h5": (pickle.dumps(Canary(Path("canary"))), "a pickle, which is never opened"),
    "page.keras": (b"<!DOCTYPE html>", "found text"),
    "cut.h5": (b"", UNREADABLE), # the first half of a model, written later
}
# Refused models: the content, and a part of the error.
BAD: dict[str, tuple[ModelFile | bytes, str]] = {
    "lambda.h5": (with_lambda(), "found 'Lambda'"),
    "time_major.h5": (changed("LSTM", time_major=True), "layer 'lstm' (LSTM): expected time_major=False"),
    "hard_sigmoid.h5": (changed("LSTM", recurrent_activation="hard_sigmoid"), "x/6 + 0.5 in Keras 3"),
    "unknown.h5": (changed("Dense", wisdom=3), "expected arguments that Keras 2 or 3 defines; found wisdom=3"),
    "wider.h5": (changed("Dense", units=28), UNREADABLE),
    "weightless.h5": (small()._replace(weights={}), UNREADABLE),
    "cut.keras": (b"", UNREADABLE), # the first half of an archive, written later
}
# Refused combinations of files: the arguments, and a part of the error.
OTHER_TOKENIZER = (["narrow.h5", "tokenizer_config.json"], "expected word numbers below 200")
MISMATCHES = {
    "mapper to other types": (["best_lstm_model.h5", "other/mapper.json"], "1 missing (2905), 1 unknown (99)"),
    "broken mapper": (["best_lstm_model.h5", "broken/mapper.json"], "expected JSON"),
    "no model": (["mapper.json"], "expected one model file"),
    "two models": (["best_lstm_model.h5", "narrow.h5"], "found best_lstm_model.h5, narrow.h5"),
    "a folder": (["best_lstm_model.h5", "other"], "found a folder"),
}
COMPANIONS = ["tokenizer_config.json", "mapper.json", "tokenizer.pickle", "mapper.pkl", "disguised.json"]

def write_models(home: Path) -> None:
    "The course's model, one with fewer words, and the refused model files."
    write_h5(home / "best_lstm_model.h5", small())
    write_h5(home / "narrow.h5", small(words=200))
    for name, (content, _) in (NO_MODEL | BAD).items():
        if isinstance(content, bytes): (home / name).write_bytes(content)
        else: write_h5(home / name, content)
    (home / "cut.h5").write_bytes((home / "best_lstm_model.h5").read_bytes()[:6000])

def write_companions(home: Path) -> None:
    "The companions of the course's model, and mappers that do not match it."
    words = json.dumps({f"mot{i}": i for i in range(1, 900)})
    tokenizer = {"class_name": "Tokenizer", "config": {"num_words": 300, "word_index": words}}
    texts = {"tokenizer_config.json": json.dumps(tokenizer), "mapper.json": json.dumps(dict(enumerate(CODES))),
             "other/mapper.json": json.dumps(dict(enumerate([*CODES[:-1], 99]))), "broken/mapper.json": "{"}
    for name, text in texts.items():
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_text(text, encoding="utf-8")
    canary = pickle.dumps(Canary(home / "canary"))
    for name in ("tokenizer.pickle", "mapper.pkl", "disguised.json"): (home / name).write_bytes(canary)

Result = tuple[int, str, str] # exit code, standard output, standard error

@dataclass
class Tracked:
    "The content of an MLflow store, and the results of the commands that wrote to it."
    home: Path # files, and the database
    results: dict[str, Result] # by name

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        "Rows of MLflow's database."
        with closing(sqlite3.connect(self.home / "mlflow.db")) as db: return db.execute(query).fetchall()

    def run(self, source: str) -> str:
        "The only run that logged a file."
        [(run,)] = self.rows(f"select run_uuid from tags where key = 'source' and value = '{source}'")
        return str(run)

    def values(self, table: str, source: str) -> dict[str, Any]:
        "The params, tags or metrics of the run that logged a file."
        return dict(self.rows(f"select key, value from {table} where run_uuid = '{self.run(source)}'"))

    def artifacts(self, source: str) -> dict[str, Path]:
        "The files of a run and of its model, by relative path."
        run = self.run(source)
        folders = self.rows(f"select artifact_uri from runs where run_uuid = '{run}'")
        folders += self.rows(f"select artifact_location from logged_models where source_run_id = '{run}'")
        paths = [Path(uri.removeprefix("file://")) for (uri,) in folders]
        return {p.relative_to(folder).as_posix(): p for folder in paths for p in folder.rglob("*") if p.is_file()}

def tracking(home: Path) -> dict[str, str]:
    "The environment of a process that logs to a store."
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}", "MLFLOW_DISABLE_TELEMETRY": "true"}

def log_course(home: Path, rakuten: Run) -> Result:
    "Log the course's model; write the archive that it was converted to, and half of it."
    files = [home / name for name in ("best_lstm_model.h5", *COMPANIONS)]
    result = rakuten("log-model", *files, extra=tracking(home))
    assert result.returncode == 0, result.stderr
    archive = Tracked(home, {}).artifacts("best_lstm_model.h5")["data/model.keras"].read_bytes()
    (home / "again.keras").write_bytes(archive)
    (home / "cut.keras").write_bytes(archive[: len(archive) // 2])
    return result.returncode, result.stdout, result.stderr

def other_calls(home: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    "The arguments and the environment of the other commands that need TensorFlow, by name."
    files = {name: [name] for name in [*BAD, "again.keras"]} | {"other tokenizer": OTHER_TOKENIZER[0]}
    files["unreachable"] = ["narrow.h5"]
    command = lambda names: ["log-model", *(str(home / name) for name in names)]
    return {name: (command(names), UNREACHABLE if name == "unreachable" else {}) for name, names in files.items()}

@pytest.fixture(scope="session")
def model_files(shared: Path) -> Path:
    "A folder of the models, the companions, and the files that are no model."
    def make(part: Path) -> None:
        write_models(part)
        write_companions(part)
    return once(shared / "model_files", make)

@pytest.fixture(scope="session")
def tracked(shared: Path, rakuten: Run, python: Run) -> Tracked:
    "The course's model with its companions, its converted form, and the refused models; logged once in a test run."
    home = shared / "log_model_home"
    def make(part: Path) -> None:
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        write_models(home)
        write_companions(home)
        course = log_course(home, rakuten)
        (part / "calls.json").write_text(json.dumps(other_calls(home)), encoding="utf-8")
        others = python("-c", MANY, part / "calls.json", extra=tracking(home))
        assert others.returncode == 0, others.stderr
        results = json.loads(others.stdout.splitlines()[-1]) | {"course": course}
        (part / "results.json").write_text(json.dumps(results), encoding="utf-8")
    results = (once(shared / "log_model", make) / "results.json").read_text(encoding="utf-8")
    return Tracked(home, json.loads(results))

# --- accepted models

@services
def test_prints_the_changes_and_the_differences(tracked: Tracked) -> None:
    _, out, err = tracked.results["course"]
    expected = ("Keras 2.15.0", "time_major=False left out", "input_length=10 left out", "renamed to batch_shape",
                "largest difference of the re-saved model", "computed with numpy",
                "tokenizer.pickle: pickle, stored without opening it", "mapper_order taxonomy", "models:/")
    assert [part for part in expected if part not in " ".join(out.split())] == [] and err == ""

@services
def test_the_run_is_finished_and_has_parameters_tags_and_metrics(tracked: Tracked) -> None:
    name = "best_lstm_model.h5"
    assert tracked.rows(f"select status from runs where run_uuid = '{tracked.run(name)}'") == [("FINISHED",)]
    params, tags, metrics = (tracked.values(table, name) for table in ("params", "tags", "metrics"))
    assert params["vocabulary"] == "300" and params["positions"] == "10" and params["classes"] == "27"
    assert params["tokenizer_num_words"] == "300"
    assert tags["keras_version"] == "2.15.0" and "time_major" in tags["remarks"] and len(tags["source_sha256"]) == 64
    assert metrics["resaved_difference"] <= 1e-6 and metrics["numpy_difference"] <= 1e-5

@services
def test_the_original_files_are_stored_unchanged(tracked: Tracked) -> None:
    files = {name: path.read_bytes() for name, path in tracked.artifacts("best_lstm_model.h5").items()}
    assert files["original/best_lstm_model.h5"] == (tracked.home / "best_lstm_model.h5").read_bytes()
    assert {name for name in files if name.startswith("companions/")} == {f"companions/{name}" for name in COMPANIONS}
    assert all((tracked.home / name).read_bytes() == files[f"companions/{name}"] for name in COMPANIONS)

@services
def test_no_pickle_is_opened(tracked: Tracked, tmp_path: Path) -> None:
    assert not (tracked.home / "canary").exists() and not (tracked.home.parent / "canary").exists()
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary"))) # noqa: S301 # shows that the canary works
    assert (tmp_path / "canary").exists()

@services
def test_no_pickle_is_written(tracked: Tracked) -> None:
    given = ("companions/", "original/")
    written = {name: p for name, p in tracked.artifacts("best_lstm_model.h5").items() if not name.startswith(given)}
    assert "data/model.keras" in written and "input_example.json" in written
    is_pickle = lambda p: p.suffix in (".pkl", ".pickle") or p.read_bytes()[:1] == b"\x80"
    assert [name for name, p in written.items() if is_pickle(p)] == []
    with zipfile.ZipFile(written["data/model.keras"]) as z:
        assert set(z.namelist()) == {"metadata.json", "config.json", "model.weights.h5"}

@services
def test_the_logged_model_predicts_as_numpy_does(tracked: Tracked, python: Run, tmp_path: Path) -> None:
    uri = next(word for word in tracked.results["course"][1].split() if word.startswith("models:/"))
    titles, outputs = tmp_path / "titles.npy", tmp_path / "outputs.npz"
    np.save(titles, TITLES)
    result = python("-c", PREDICT, uri, titles, outputs, extra=tracking(tracked.home))
    assert result.returncode == 0, result.stderr
    expected = numpy_outputs(small(), TITLES)
    assert expected is not None
    with np.load(outputs) as arrays:
        assert arrays["example"].shape == (2, 10)
        for way in ("keras", "pyfunc"):
            assert arrays[way].shape == (20, 27) and largest_difference([arrays[way]], [expected]) <= 1e-6

@services
def test_a_keras_3_archive_without_companions_is_logged_unchanged(tracked: Tracked) -> None:
    code, out, err = tracked.results["again.keras"]
    assert code == 0 and "no changes to the configuration" in out, err
    assert "data/model.keras" in tracked.artifacts("again.keras")

# --- refused files

def error_line(result: Result, code: int = 2) -> str:
    "The error of a command, which is one line."
    assert result[0] == code and result[2].startswith("error: ") and result[2].count("\n") == 1, result
    return result[2]

def refused(rakuten: Run, folder: Path, *names: str) -> str:
    "The error for files of a folder, which are refused before MLflow creates its database."
    result = rakuten("log-model", *(folder / name for name in names), extra=tracking(folder))
    assert not (folder / "mlflow.db").exists()
    return error_line((result.returncode, result.stdout, result.stderr))

def check_parts(error: str) -> None:
    "Assert that an error has the form `NAME: expected …; found …; what to do`."
    expected, found, *remedy = error.split("; ")
    assert ": expected " in expected and found.startswith("found ") and remedy, "expected …; found …; what to do"

@pytest.mark.parametrize("name", NO_MODEL)
def test_rejects_a_file_that_is_no_model(name: str, model_files: Path, rakuten: Run) -> None:
    error = refused(rakuten, model_files, name)
    assert name in error and NO_MODEL[name][1] in error
    check_parts(error)
    assert not (model_files.parent / "canary").exists(), "the pickle is not opened"

@pytest.mark.parametrize("name", MISMATCHES)
def test_rejects_files_that_do_not_match(name: str, model_files: Path, rakuten: Run) -> None:
    names, message = MISMATCHES[name]
    assert message in refused(rakuten, model_files, *names).replace(f"{model_files}/", "")

@services
def test_rejects_the_tokenizer_of_another_model(tracked: Tracked) -> None:
    assert OTHER_TOKENIZER[1] in error_line(tracked.results["other tokenizer"])

@services
@pytest.mark.parametrize("name", BAD)
def test_rejects_a_bad_model_with_one_line(name: str, tracked: Tracked) -> None:
    error = error_line(tracked.results[name])
    assert name in error and BAD[name][1] in error
    check_parts(error)

@services
def test_an_unreachable_mlflow_is_one_line(tracked: Tracked) -> None:
    assert "127.0.0.1:9: connection refused" in error_line(tracked.results["unreachable"], code=1)

@services
def test_refused_files_leave_no_run(tracked: Tracked) -> None:
    runs = tracked.rows("select status, value from runs join tags using (run_uuid) where key = 'source'")
    assert sorted(runs) == [("FINISHED", "again.keras"), ("FINISHED", "best_lstm_model.h5")]
    assert tracked.rows("select count(*) from runs") == [(2,)]
