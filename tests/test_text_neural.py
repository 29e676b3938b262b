"The neural text experts across processes: same bytes, serving without training libraries, logs, early errors."
import csv
import json
from pathlib import Path

import pytest
from conftest import Run

EXPERTS = ("text_lstm", "text_ngrams")
SMALL = {"text_lstm": {"words": 500, "units": 8, "epochs": 2},
         "text_ngrams": {"words": 500, "characters": 1000, "units": 8, "epochs": 2}}

# Trains both on the first 150 products with a text, and saves them, their history, and their predictions for the rest.
TRAIN = """
import json, sys
from pathlib import Path
import numpy as np
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.models.training import make_expert
catalog, out, params = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
products = read_catalog(catalog).labelled
products = products[products.has_text]
for name, own in params.items():
    (folder := out / name).mkdir(parents=True)
    expert = make_expert(name, own)
    expert.fit(expert.embed(products[:150]), products.label[:150], seed=3)
    expert.save(folder)
    (out / f"{name}.json").write_text(json.dumps(expert.history))
    np.save(out / f"{name}.npy", expert.predict_proba(products[150:]))
"""

# Loads both in a process without the training libraries, and predicts seven products at a time.
SERVE = """
import sys
from pathlib import Path
class Absent:
    def find_spec(self, name, path=None, target=None):
        absent = name.split(".")[0] in ("tensorflow", "keras", "onnx", "tf2onnx")
        if absent: raise ModuleNotFoundError(f"{name} is not served", name=name)
sys.meta_path.insert(0, Absent())
import numpy as np
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.models.experts import expert_class
products = read_catalog(Path(sys.argv[1])).labelled
products = products[products.has_text][150:]
for name in sys.argv[3:]:
    expert, expected = expert_class(name).load(Path(sys.argv[2]) / name), np.load(Path(sys.argv[2]) / f"{name}.npy")
    p = np.concatenate([expert.predict_proba(products[i : i + 7]) for i in range(0, len(products), 7)])
    assert p.shape == expected.shape and (p == expected).all(), name
print("the same bits")
"""

@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, sample_catalog: Path, python: Run) -> Path:
    "Both experts, trained twice: in once/ and in again/."
    folder = tmp_path_factory.mktemp("fitted")
    environments = {"once": {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
                    "again": {"PYTHONHASHSEED": "4711", "OMP_NUM_THREADS": "3"}}
    for name, extra in environments.items():
        answer = python("-c", TRAIN, sample_catalog, folder / name, json.dumps(SMALL), extra=extra)
        assert answer.returncode == 0, answer.stderr
    return folder

@pytest.mark.services
@pytest.mark.parametrize("name", EXPERTS)
def test_two_processes_train_the_same_bytes(name: str, fitted: Path) -> None:
    for file in (f"{name}/graph.onnx", f"{name}/arrays.npz", f"{name}/expert.json", f"{name}.json", f"{name}.npy"):
        assert (fitted / "once" / file).read_bytes() == (fitted / "again" / file).read_bytes(), file

@pytest.mark.services
def test_the_experts_are_served_without_training_libraries(fitted: Path, sample_catalog: Path, python: Run) -> None:
    answer = python("-c", SERVE, sample_catalog, fitted / "once", *EXPERTS)
    assert answer.stdout.strip() == "the same bits", answer.stderr

@pytest.mark.services
def test_experts_of_the_command_line_are_trained_and_logged(sample_catalog: Path, rakuten: Run, tmp_path: Path) -> None:
    # The command line names two experts; the parameters list one of them only.
    params = {"split": {"folds": 2}, "text": {"experts": {"text_ngrams": SMALL["text_ngrams"]}}}
    (options := tmp_path / "params.yaml").write_text(json.dumps(params))
    answer = rakuten("train", sample_catalog, "--bundle", tmp_path / "bundle", "--params", options,
                     "--experts", "text_linear,text_ngrams",
                     extra={"RAKUTEN_LOG_DIR": str(tmp_path / "logs")})
    assert answer.returncode == 0, answer.stderr
    lines = [json.loads(line) for line in (tmp_path / "logs/train_model_logger.log").read_text().splitlines()]
    folds = [(line["expert"], line["fold"]) for line in lines if line["message"] in ("fold", "fit")]
    assert folds == [(name, fold) for name in ("text_linear", "text_ngrams") for fold in ("0", "1", "gold", "final")]
    scored = [line for line in lines if line["message"] == "fold" and line["fold"].isdigit()]
    assert all(0 <= line["weighted_f1"] <= 1 and line["rows"] > 0 and line["seconds"] >= 0 for line in scored)
    epochs = [line for line in lines if line["message"] == "epoch"]
    expected = [(fold, epoch) for fold in ("0", "1", "gold", "final") for epoch in (1, 2)]
    assert [(line["fold"], line["epoch"]) for line in epochs] == expected
    assert ["val_loss" in line for line in epochs] == [True] * 4 + [False] * 4, "the holdout is not validation data"
    answer = rakuten("predict", tmp_path / "bundle", sample_catalog, "--out", tmp_path / "out.csv", "--split", "test")
    assert answer.returncode == 0, answer.stderr
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as f:
        experts = [row["experts"] for row in csv.DictReader(f)]
    assert any("text_linear" in names and "text_ngrams" in names for names in experts)

def params_file(place: Path, expert: str, own: dict[str, object]) -> Path:
    "A params.yaml with these parameters for one text expert."
    (path := place / "params.yaml").write_text(json.dumps({"text": {"experts": {expert: own}}}))
    return path

WRONG: dict[str, tuple[str, dict[str, object], str]] = {
    "no epoch": ("text_lstm", {"epochs": 0},
                 "'epochs' of expert text_lstm: expected a whole number from 1 to 1,000; found 0"),
    "one word": ("text_lstm", {"words": 1},
                 "'words' of expert text_lstm: expected a whole number from 3 to 1,000,000; found 1"),
    "all dropped": ("text_ngrams", {"dropout": 1.0},
                    "'dropout' of expert text_ngrams: expected a number from 0.0 to 0.95; found 1.0"),
    "not a number": ("text_ngrams", {"batch": "all"},
                     "'batch' of expert text_ngrams: expected a whole number from 1 to 100,000; found 'all'"),
}

@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_parameter_is_rejected_before_the_catalogue_is_read(case: str, rakuten: Run, tmp_path: Path) -> None:
    expert, own, message = WRONG[case]
    options = params_file(tmp_path, expert, own)
    answer = rakuten("train", tmp_path / "no such catalogue", "--bundle", tmp_path / "bundle", "--params", options)
    assert (answer.returncode, answer.stderr.strip()) == (2, f"error: params.yaml: text.experts: parameter {message}")
    assert not (tmp_path / "bundle").exists()
