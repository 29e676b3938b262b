"The neural text experts where processes matter: the same bytes in each, served without what trains, logged, refused in time."
import csv
import json
from pathlib import Path

import pytest
from conftest import Run

EXPERTS = ("text_lstm", "text_ngrams")
SMALL = {"text_lstm": {"words": 500, "units": 8, "epochs": 2}, "text_ngrams": {"words": 500, "characters": 1000, "units": 8, "epochs": 2}}

# Teaches both on the first 150 products that have a text, says what they say of the rest, and writes it all down.
TEACH = """
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

# Loads them where what trains cannot be imported, and asks about products by sevens.
SERVE = """
import sys
from pathlib import Path
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "keras", "onnx", "tf2onnx"): raise ModuleNotFoundError(f"{name} is not served", name=name)
sys.meta_path.insert(0, Absent())
import numpy as np
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.models.experts import expert_class
products = read_catalog(Path(sys.argv[1])).labelled
products = products[products.has_text][150:]
for name in sys.argv[3:]:
    expert, found = expert_class(name).load(Path(sys.argv[2]) / name), np.load(Path(sys.argv[2]) / f"{name}.npy")
    said = np.concatenate([expert.predict_proba(products[i : i + 7]) for i in range(0, len(products), 7)])
    assert said.shape == found.shape and (said == found).all(), name
print("the same bits")
"""

@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, sample_catalog: Path, python: Run) -> Path:
    "Both experts, taught twice: in once/ and in again/."
    folder = tmp_path_factory.mktemp("taught")
    for name, extra in (("once", {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}), ("again", {"PYTHONHASHSEED": "4711", "OMP_NUM_THREADS": "3"})):
        answer = python("-c", TEACH, sample_catalog, folder / name, json.dumps(SMALL), extra=extra)
        assert answer.returncode == 0, answer.stderr
    return folder

@pytest.mark.services
@pytest.mark.parametrize("name", EXPERTS)
def test_two_processes_learn_the_same_bytes(name: str, taught: Path) -> None:
    for file in (f"{name}/graph.onnx", f"{name}/arrays.npz", f"{name}/expert.json", f"{name}.json", f"{name}.npy"):
        assert (taught / "once" / file).read_bytes() == (taught / "again" / file).read_bytes(), file

@pytest.mark.services
def test_they_are_served_without_what_trains(taught: Path, sample_catalog: Path, python: Run) -> None:
    answer = python("-c", SERVE, sample_catalog, taught / "once", *EXPERTS)
    assert answer.stdout.strip() == "the same bits", answer.stderr

@pytest.mark.services
def test_a_training_by_name_is_logged_and_predicts(sample_catalog: Path, rakuten: Run, tmp_path: Path) -> None:
    # The experts are named on the command line; the parameters speak of one of them only.
    (options := tmp_path / "params.yaml").write_text(json.dumps({"split": {"folds": 2}, "text": {"experts": {"text_ngrams": SMALL["text_ngrams"]}}}))
    answer = rakuten("train", sample_catalog, "--bundle", tmp_path / "bundle", "--params", options, "--experts", "text_linear,text_ngrams",
                     extra={"RAKUTEN_LOG_DIR": str(tmp_path / "logs")})
    assert answer.returncode == 0, answer.stderr
    lines = [json.loads(line) for line in (tmp_path / "logs/train_model_logger.log").read_text().splitlines()]
    folds = [(line["expert"], line["fold"]) for line in lines if line["message"] in ("fold", "fit")]
    assert folds == [(name, fold) for name in ("text_linear", "text_ngrams") for fold in ("0", "1", "gold", "final")]
    judged = [line for line in lines if line["message"] == "fold" and line["fold"].isdigit()]
    assert all(0 <= line["weighted_f1"] <= 1 and line["rows"] > 0 and line["seconds"] >= 0 for line in judged)
    epochs = [line for line in lines if line["message"] == "epoch"]
    assert [(line["fold"], line["epoch"]) for line in epochs] == [(fold, epoch) for fold in ("0", "1", "gold", "final") for epoch in (1, 2)]
    assert ["val_loss" in line for line in epochs] == [True] * 4 + [False] * 4, "gold is judged once, not validation_data"
    answer = rakuten("predict", tmp_path / "bundle", sample_catalog, "--out", tmp_path / "out.csv", "--split", "test")
    assert answer.returncode == 0, answer.stderr
    with (tmp_path / "out.csv").open(encoding="utf-8", newline="") as f: said = [row["experts"] for row in csv.DictReader(f)]
    assert any("text_linear" in who and "text_ngrams" in who for who in said)

def params_file(place: Path, expert: str, own: dict[str, object]) -> Path:
    "A params.yaml that gives one text expert these parameters."
    (path := place / "params.yaml").write_text(json.dumps({"text": {"experts": {expert: own}}}))
    return path

WRONG: dict[str, tuple[str, dict[str, object], str]] = {
    "no epoch": ("text_lstm", {"epochs": 0}, "'epochs' of expert text_lstm: expected a whole number from 1 to 1,000; found 0"),
    "one word": ("text_lstm", {"words": 1}, "'words' of expert text_lstm: expected a whole number from 3 to 1,000,000; found 1"),
    "all dropped": ("text_ngrams", {"dropout": 1.0}, "'dropout' of expert text_ngrams: expected a number from 0.0 to 0.95; found 1.0"),
    "a word": ("text_ngrams", {"batch": "all"}, "'batch' of expert text_ngrams: expected a whole number from 1 to 100,000; found 'all'"),
}

@pytest.mark.parametrize("case", WRONG)
def test_a_parameter_that_cannot_be_is_refused_before_anything_is_read(case: str, rakuten: Run, tmp_path: Path) -> None:
    expert, own, said = WRONG[case]
    answer = rakuten("train", tmp_path / "no such catalogue", "--bundle", tmp_path / "bundle", "--params", params_file(tmp_path, expert, own))
    assert (answer.returncode, answer.stderr.strip()) == (2, f"error: params.yaml: text.experts: parameter {said}")
    assert not (tmp_path / "bundle").exists()
