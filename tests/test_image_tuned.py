"The fine-tuned image expert where processes matter: taught in one, served in another without what trains; refused in time."
import json
from pathlib import Path

import pytest
from conftest import Run, once

from rakuten_nb.data.sample import make_sample
from rakuten_nb.errors import InputError
from rakuten_nb.models.training import read_params

pytestmark = pytest.mark.services # by the seconds that TensorFlow takes
NAME = "image_tuned"
SMALL = {"blocks": 0, "epochs": 2, "flips": False} # the quickest

# Out of fold for a third of the pictures, then taught everything, packed; and what it says before the bundle is ever read.
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
judged = np.arange(n) % 3 == 0
split = Split(np.arange(n), np.zeros(n, bool), np.zeros(n, bool), np.ones(n, bool), np.where(judged, 0, -1))
run = run_expert(partial(make_expert, name, json.loads(sys.argv[4])), products, split, seed=3, keep_gold=True)
fusion = fit_fusion({name: run.oof[judged]}, products.label[judged])
bundle = Bundle({name: run.expert}, fusion, 0.5, {}, np.unique(fingerprints(products)), {name: run.temperature})
save_bundle(bundle, out / "bundle")
np.savez(out / "said.npz", expert=run.expert.predict_proba(products), fused=bundle.predict(products).proba)
print(sorted(set(zip(run.curves["fold"], run.curves["epoch"]))), run.curves["val_loss"].notna().tolist())
"""

# What the bundle and its expert say where nothing that trains can be imported, a few products at a time.
SERVE = """
import sys
from pathlib import Path
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "keras", "onnx", "tf2onnx"): raise ModuleNotFoundError(f"{name} is not served", name=name)
sys.meta_path.insert(0, Absent())
import numpy as np
from rakuten_nb.data.catalog import make_products, read_catalog
from rakuten_nb.models.bundle import load_bundle
products, bundle, found = read_catalog(Path(sys.argv[1])).labelled, load_bundle(Path(sys.argv[2]) / "bundle"), np.load(Path(sys.argv[2]) / "said.npz")
products, expert = products[products.has_picture], bundle.experts[sys.argv[3]]
said = np.concatenate([expert.predict_proba(products[i : i + 7]) for i in range(0, len(products), 7)])
assert said.shape == found["expert"].shape and (said == found["expert"]).all()
assert np.allclose(bundle.predict(products).proba, found["fused"], atol=1e-8)
blind = expert.predict_proba(make_products(["", ""], picture=[b"damaged", None]))
assert np.allclose(blind, 1 / blind.shape[1])
never = np.setdiff1d(np.arange(said.shape[1]), products.label)
assert len(never) and said[:, never].max() < 1 / len(products)
assert "tensorflow" not in sys.modules
print("the same bits; right of its own", (said.argmax(1) == products.label).mean())
"""

def test_what_was_taught_is_served_without_what_teaches(shared: Path, python: Run, tmp_path: Path) -> None:
    catalog = once(shared / "pictures_to_tune", lambda part: make_sample(part, 60, progress=False))
    answer = python("-c", TRAIN, catalog, tmp_path, NAME, json.dumps(SMALL))
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[('0', 1), ('0', 2), ('gold', 1), ('gold', 2)] [True, True, False, False]"
    answer = python("-c", SERVE, catalog, tmp_path, NAME)
    assert answer.stdout.startswith("the same bits"), answer.stderr
    assert float(answer.stdout.split()[-1]) > 0.5

@pytest.mark.parametrize(("own", "said"), [
    ({"blocks": 9}, "parameter 'blocks' of expert image_tuned: expected a whole number from 0 to 4; found 9"),
    ({"backbone": "vgg16"}, "parameter 'backbone' of expert image_tuned: expected one of efficientnet_lite0, efficientnet_lite2; found 'vgg16'"),
    ({"crops": [0.5]}, "parameter 'crops' of expert image_tuned: expected a list of one to eight numbers from 1 to 4"),
    ({"weights": "none"}, "parameter 'weights' of expert image_tuned is not known; expected backbone, blocks")])
def test_a_parameter_that_does_not_fit_is_one_line(own: dict[str, object], said: str, tmp_path: Path) -> None:
    (path := tmp_path / "params.yaml").write_text(json.dumps({"image": {"experts": {NAME: own}}}), encoding="utf-8")
    with pytest.raises(InputError) as error: read_params(path)
    assert str(error.value).startswith(f"params.yaml: image.experts: {said}") and "\n" not in str(error.value)
