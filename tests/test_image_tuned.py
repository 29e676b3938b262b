"The fine-tuned image expert across processes: trained in one, served in another; invalid parameters."
import json
from pathlib import Path

import pytest
from conftest import Run, once

from rakuten_nb.data.sample import make_sample
from rakuten_nb.errors import InputError
from rakuten_nb.models.training import read_params

pytestmark = pytest.mark.services # TensorFlow takes seconds
NAME = "image_tuned"
SMALL = {"blocks": 0, "epochs": 2, "flips": False} # the fastest

# Predicts a third of the pictures out of fold, trains on all, saves a bundle and the predictions of its expert.
TRAIN = """
import json, sys
from functools import partial
from pathlib import Path
import numpy as np
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.data.split import Split
from rakuten_nb.models.bundle import Bundle, fingerprints, save_bundle
from rakuten_nb.models.fusion import fit_fusion
from rakuten_nb.models.training import make_expert, run_expert
products, out, name = read_catalog(Path(sys.argv[1])).labelled, Path(sys.argv[2]), sys.argv[3]
products = products[products.has_picture]
n = len(products)
test = np.arange(n) % 3 == 0
split = Split(np.arange(n), np.zeros(n, bool), np.zeros(n, bool), np.ones(n, bool), np.where(test, 0, -1))
run = run_expert(partial(make_expert, name, json.loads(sys.argv[4])), products, split, seed=3, keep_gold=True)
fusion = fit_fusion({name: run.oof[test]}, products.label[test])
known = np.unique(fingerprints(products))
bundle = Bundle({name: run.expert}, fusion, 0.5, {}, known, {name: run.inverse_temperature})
save_bundle(bundle, out / "bundle")
np.savez(out / "predictions.npz", expert=run.expert.predict_proba(products), fused=bundle.predict(products).proba)
print(sorted(set(zip(run.curves["fold"], run.curves["epoch"]))), run.curves["val_loss"].notna().tolist())
"""

# Predicts with the bundle, seven products at a time, where the training libraries cannot be imported.
SERVE = """
import sys
from pathlib import Path
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in ("tensorflow", "keras", "onnx", "tf2onnx"): return None
        raise ModuleNotFoundError(f"{name} is absent", name=name)
sys.meta_path.insert(0, Absent())
import numpy as np
from rakuten_nb.data.catalog import make_products, read_catalog
from rakuten_nb.models.bundle import load_bundle
products, folder = read_catalog(Path(sys.argv[1])).labelled, Path(sys.argv[2])
bundle, expected = load_bundle(folder / "bundle"), np.load(folder / "predictions.npz")
products, expert = products[products.has_picture], bundle.experts[sys.argv[3]]
p = np.concatenate([expert.predict_proba(products[i : i + 7]) for i in range(0, len(products), 7)])
assert p.shape == expected["expert"].shape and (p == expected["expert"]).all()
assert np.allclose(bundle.predict(products).proba, expected["fused"], atol=1e-8)
unreadable = expert.predict_proba(make_products(["", ""], picture=[b"damaged", None]))
assert np.allclose(unreadable, 1 / unreadable.shape[1])
absent = np.setdiff1d(np.arange(p.shape[1]), products.label)
assert len(absent) and p[:, absent].max() < 1 / len(products)
assert "tensorflow" not in sys.modules
print("the same bits; accuracy on training rows", (p.argmax(1) == products.label).mean())
"""

def test_serves_a_fine_tuned_expert_without_training_libraries(shared: Path, python: Run, tmp_path: Path) -> None:
    catalog = once(shared / "pictures_to_tune", lambda part: make_sample(part, 60, progress=False))
    answer = python("-c", TRAIN, catalog, tmp_path, NAME, json.dumps(SMALL))
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[('0', 1), ('0', 2), ('gold', 1), ('gold', 2)] [True, True, False, False]"
    answer = python("-c", SERVE, catalog, tmp_path, NAME)
    assert answer.stdout.startswith("the same bits"), answer.stderr
    assert float(answer.stdout.split()[-1]) > 0.5

LITES = "efficientnet_lite0, efficientnet_lite2"

@pytest.mark.parametrize(("own", "message"), [
    ({"blocks": 9}, "parameter 'blocks' of expert image_tuned: expected a whole number from 0 to 4; found 9"),
    ({"backbone": "vgg16"}, f"parameter 'backbone' of expert image_tuned: expected one of {LITES}; found 'vgg16'"),
    ({"crops": [0.5]}, "parameter 'crops' of expert image_tuned: expected a list of one to eight numbers from 1 to 4"),
    ({"weights": "none"}, "parameter 'weights' of expert image_tuned is not known; expected backbone, blocks")])
def test_reports_an_invalid_parameter_in_one_line(own: dict[str, object], message: str, tmp_path: Path) -> None:
    (path := tmp_path / "params.yaml").write_text(json.dumps({"image": {"experts": {NAME: own}}}), encoding="utf-8")
    with pytest.raises(InputError) as error: read_params(path)
    assert str(error.value).startswith(f"params.yaml: image.experts: {message}") and "\n" not in str(error.value)
