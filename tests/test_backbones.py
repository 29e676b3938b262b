"Image networks other than the default: trained, served, and the failures of their weights."
import json
import pickle
import socket
import subprocess
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from api_process import USERS, ApiProcess
from conftest import Run, once
from PIL import Image

from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.data.picture import PictureError
from rakuten_nb.data.sample import make_sample
from rakuten_nb.errors import InputError
from rakuten_nb.models.applications import APPLICATIONS, WEIGHTS_URL, build_application, weights_file
from rakuten_nb.models.backbone import BACKBONES, backbone_onnx, onnx_features
from rakuten_nb.models.bundle import load_bundle
from rakuten_nb.models.embedding_cache import Embedder
from rakuten_nb.models.image import ImageExpert
from rakuten_nb.models.image_views import LAYOUT_WIDTH
from rakuten_nb.models.training import read_params

SMALL = "mobilenet_v3_small" # the fastest
PICTURES = 8 # in the small catalogue; VGG16 takes a third of a second for each

def params(folder: Path, **image: Any) -> Path:
    "Write a params.yaml with these parameters of the image expert."
    content = {"split": {"folds": 2}, "image": {"experts": {"image": image}}}
    (path := folder / "params.yaml").write_text(json.dumps(content), encoding="utf-8")
    return path

@pytest.fixture(scope="session")
def few_pictures(shared: Path) -> Path:
    "Sixty products, a few of them with a picture."
    def make(part: Path) -> None:
        make_sample(part, 60, progress=False)
        for extra in sorted((part / "image_train").iterdir())[PICTURES:]: extra.unlink()
    return once(shared / "few_pictures", make)

@pytest.fixture(scope="session")
def vgg16(shared: Path, few_pictures: Path, rakuten: Run) -> Path:
    "A folder with a bundle of a VGG16 with random weights, trained by the command line."
    def make(part: Path) -> None:
        answer = rakuten("train", few_pictures, "--bundle", part / "bundle", "--experts", "text_linear,image",
                         "--params", params(part, backbone="vgg16", weights="none"))
        assert answer.returncode == 0, answer.stderr
        assert "Traceback" not in answer.stderr
    return once(shared / "vgg16", make)

def painted(colour: str, side: int = 224) -> np.ndarray: # (1, side, side, 3)
    "A picture of one colour as a network input."
    return np.asarray(Image.new("RGB", (side, side), colour), np.float32)[None]

# --- train and serve

@pytest.mark.services
def test_trains_a_bundle_with_vgg16(vgg16: Path, few_pictures: Path) -> None:
    folder = vgg16 / "bundle/experts/image"
    saved = json.loads((folder / "expert.json").read_text(encoding="utf-8"))["params"]
    assert (saved["backbone"], saved["weights"]) == ("vgg16", "none")
    assert 58e6 < (folder / "backbone.onnx").stat().st_size < 60e6
    bundle, products = load_bundle(vgg16 / "bundle"), read_catalog(few_pictures).products
    seen = products[products.has_picture][:2]
    features = bundle.experts["image"].embed(seen)
    assert features.shape == (2, 512 + LAYOUT_WIDTH) and np.isfinite(features).all()
    assert (features[0] != features[1]).any()

@pytest.mark.services
def test_serves_vgg16(vgg16: Path, few_pictures: Path, env: dict[str, str], tmp_path: Path) -> None:
    products = read_catalog(few_pictures).products
    picture = next(p for p in products.picture if p is not None)
    raw = picture if isinstance(picture, bytes) else picture.read_bytes()
    with ApiProcess(env, tmp_path / "api", vgg16 / "bundle") as api:
        api.add_users(**USERS)
        api.wait_until("/ready", {200})
        alone, both = (api.predict(api.token(), title, picture=raw) for title in ("", "Piscine ronde"))
    assert (alone.status_code, both.status_code) == (200, 200), alone.text + both.text
    assert alone.json()["experts"] == {"image": 1.0} and set(both.json()["experts"]) == {"image", "text_linear"}
    rows = [i for i, p in enumerate(products.picture) if p is picture]
    assert load_bundle(vgg16 / "bundle").predict(products[rows]).shares.shape[1] == 2

@pytest.mark.services
def test_vgg16_receives_colours_in_its_own_order(vgg16: Path) -> None:
    import keras
    graph = (vgg16 / "bundle/experts/image/backbone.onnx").read_bytes()
    net = build_application("vgg16", "none") # in another process than the one that exported the graph
    red, blue = painted("red"), painted("blue")
    for picture in (red, blue):
        expected = np.asarray(net(keras.applications.vgg16.preprocess_input(picture.copy()), training=False))
        assert np.abs(onnx_features(graph, picture) - expected).max() < 1e-4 * np.abs(expected).max()
    difference = np.abs(onnx_features(graph, red) - onnx_features(graph, blue)).max()
    assert difference > 0.05 * np.abs(onnx_features(graph, red)).max()

EXPORT = """
import sys
from pathlib import Path
from rakuten_nb.models.backbone import backbone_onnx
print(backbone_onnx(Path(sys.argv[1]), sys.argv[2], "none"))
"""

def all_applications(fast: str) -> list[Any]:
    "Every application; all but one are heavy."
    return [name if name == fast else pytest.param(name, marks=pytest.mark.heavy) for name in APPLICATIONS]

@pytest.mark.parametrize("name", all_applications(fast=SMALL))
def test_an_exported_application_agrees_with_keras(name: str, python: Run, tmp_path: Path) -> None:
    answer = python("-c", EXPORT, tmp_path, name, extra={"PYTHONHASHSEED": "7"})
    assert answer.returncode == 0, answer.stderr
    assert "Traceback" not in answer.stderr, "the exporter prints an exception"
    import keras
    graph, net, app = Path(answer.stdout.strip()).read_bytes(), build_application(name, "none"), APPLICATIONS[name]
    embedder = Embedder(graph)
    assert embedder.side == app.side == net.input_shape[1] and embedder.width == net.output_shape[1]
    noise = np.random.default_rng(3).uniform(0, 255, (2, app.side, app.side, 3)).astype(np.float32)
    family = getattr(keras.applications, app.family)
    expected = np.asarray(net(family.preprocess_input(noise.copy()), training=False))
    assert np.abs(onnx_features(graph, noise) - expected).max() < 1e-4 * np.abs(expected).max()
    (file := BytesIO()), Image.new("RGB", (400, 90), "green").save(file, "PNG")
    (shown,) = embedder.preprocessor.compute(file.getvalue()).items()
    assert shown[0] == f"trimmed {app.side}" and shown[1].shape == (1, app.side, app.side, 3)

def test_uses_weights_from_a_file(tmp_path: Path) -> None:
    from rakuten_nb.models.applications import set_random_weights
    net = build_application(SMALL, "none")
    set_random_weights(net, 5)
    net.save_weights(tmp_path / "own.weights.h5")
    weights = str(tmp_path / "own.weights.h5")
    graph = backbone_onnx(tmp_path / "cache", SMALL, weights)
    noise = np.random.default_rng(3).uniform(0, 255, (1, 224, 224, 3)).astype(np.float32)
    expected = np.asarray(net(noise, training=False))
    assert np.abs(onnx_features(graph.read_bytes(), noise) - expected).max() < 1e-4 * np.abs(expected).max()
    expert = ImageExpert(backbone=SMALL, weights=weights, cache_dir=tmp_path / "cache")
    expert.fit(np.random.default_rng(0).normal(size=(8, 576 + LAYOUT_WIDTH)).astype(np.float32), np.arange(8) % 2)
    (tmp_path / "saved").mkdir()
    expert.save(tmp_path / "saved")
    Path(weights).unlink() # a bundle does not need it
    assert ImageExpert.load(tmp_path / "saved").embedder.graph == graph.read_bytes()

@pytest.mark.parametrize("name", all_applications(fast="vgg16"))
def test_addresses_and_hashes_are_those_of_keras(name: str) -> None:
    import keras
    calls: list[Any] = []
    def record(_: str, url: str, file_hash: str = "", **__: Any) -> None:
        calls.append((url, file_hash))
        raise InterruptedError
    app = APPLICATIONS[name]
    with patch("keras.src.utils.file_utils.get_file", record), pytest.raises(InterruptedError):
        getattr(keras.applications, app.model)(include_top=False, input_shape=(app.side, app.side, 3))
    assert calls == [(WEIGHTS_URL + app.file, app.hash)]

# --- failures

@pytest.fixture
def refusing_proxy() -> Iterator[tuple[str, list[bytes]]]:
    "A proxy on loopback that refuses every connection, and its requests."
    requests: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))
    def refuse() -> None:
        while True:
            try: connection, _ = listener.accept()
            except OSError: return
            with connection:
                requests.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    threading.Thread(target=refuse, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
    listener.close()

def one_line(answer: "subprocess.CompletedProcess[str]") -> str:
    "The error of a command that exits with 2."
    assert answer.returncode == 2, answer.stderr
    assert "Traceback" not in answer.stderr
    return answer.stderr.strip().splitlines()[-1]

def test_a_refused_download_names_the_settings_to_change(
    few_pictures: Path, rakuten: Run, refusing_proxy: tuple[str, list[bytes]], tmp_path: Path,
) -> None:
    (url, requests), keras = refusing_proxy, tmp_path / "keras"
    proxied = {"HTTPS_PROXY": url, "https_proxy": url, "NO_PROXY": "", "no_proxy": "", "KERAS_HOME": str(keras)}
    answer = rakuten("train", few_pictures, "--bundle", tmp_path / "bundle", "--experts", "text,image",
                     "--params", params(tmp_path, backbone="vgg16", weights="imagenet"), extra=proxied)
    line = one_line(answer)
    assert "text_linear" not in answer.stderr, "requested before any training"
    assert requests and requests[0].startswith(b"CONNECT storage.googleapis.com:443")
    assert "weights of vgg16 cannot be downloaded from storage.googleapis.com" in line and "403" in line
    for option in ("image.experts.image.weights", "the path of a file", "none", "backbone: efficientnet_lite0"):
        assert option in line
    assert list(keras.rglob("*.h5")) == [] and not (tmp_path / "bundle").exists()

def test_names_a_file_without_weights(few_pictures: Path, rakuten: Run, tmp_path: Path) -> None:
    (tmp_path / "own.h5").write_bytes(pickle.dumps({"a": 1}))
    answer = rakuten("train", few_pictures, "--bundle", tmp_path / "bundle", "--experts", "image",
                     "--params", params(tmp_path, backbone="vgg16", weights=str(tmp_path / "own.h5")))
    line = one_line(answer)
    assert "own.h5: expected the weights of vgg16" in line and "found a file that begins with" in line
    assert not (tmp_path / "bundle").exists()

def test_refuses_weights_of_another_network(tmp_path: Path) -> None:
    build_application(SMALL, "none").save_weights(tmp_path / "small.weights.h5")
    whole = (tmp_path / "small.weights.h5").read_bytes()
    (tmp_path / "cut.weights.h5").write_bytes(whole[: len(whole) // 2])
    for file in ("small.weights.h5", "cut.weights.h5"):
        with pytest.raises(InputError, match=f"{file}: expected the weights of vgg16") as error:
            backbone_onnx(tmp_path / "cache", "vgg16", str(tmp_path / file))
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert not (tmp_path / "cache").exists()

WEIGHTS = r"image\.experts\.image\.weights: expected imagenet"
NAMES = "efficientnet_lite0, efficientnet_lite2, vgg16, .*"

@pytest.mark.parametrize(("image", "message"), [
    ({"backbone": "vgg99"}, rf"image\.experts\.image\.backbone: expected one of {NAMES}; found 'vgg99'"),
    ({"backbone": ["vgg16"]}, r"image\.experts\.image\.backbone: expected one of .*; found \['vgg16'\]"),
    ({"weights": "none"}, rf"{WEIGHTS}, the weights that efficientnet_lite0 comes with; found 'none'"),
    ({"backbone": "vgg16", "weights": "absent.h5"},
     rf"{WEIGHTS}, .* an existing file; found .*absent\.h5, which does not exist"),
    ({"backbone": "vgg16", "weights": "own.pkl"}, rf"{WEIGHTS}, none, or the path of a .* found 'own\.pkl'"),
    ({"backbone": "vgg16", "weights": None}, rf"{WEIGHTS}, none, .* found None"),
    ({"backbone": "vgg16", "weight": "none"}, r"'weight' of expert image is not known; expected backbone, weights,"),
])
def test_reports_invalid_parameters_before_reading(image: dict[str, Any], message: str, tmp_path: Path) -> None:
    download = patch("rakuten_nb.models.applications.fetch_file", side_effect=AssertionError)
    with download, pytest.raises(InputError, match=message): read_params(params(tmp_path, **image))

def test_reading_parameters_downloads_and_imports_nothing(python: Run, tmp_path: Path) -> None:
    source = "import sys; from pathlib import Path; from rakuten_nb.models.training import read_params; " \
             "[read_params(Path(p)) for p in sys.argv[1:]]; print(*{'keras', 'tensorflow'} & set(sys.modules))"
    for name in BACKBONES: (tmp_path / name).mkdir()
    files = [params(tmp_path / name, backbone=name) for name in BACKBONES]
    unreachable = {"HTTPS_PROXY": "http://127.0.0.1:9", "KERAS_HOME": str(tmp_path / "keras")}
    answer = python("-c", source, *files, extra=unreachable)
    assert answer.returncode == 0 and answer.stdout.strip() == "", answer.stderr

def test_a_relative_path_starts_at_the_projects_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "settings.ini").touch()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert weights_file("models/own.h5") == tmp_path / "models/own.h5"
    assert weights_file("/else/own.h5") == Path("/else/own.h5")

# --- picture size

def test_the_pixel_limit_applies_to_embedding(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := BytesIO()), Image.new("L", (7100, 7100), 90).save(file, "PNG")
    for limit, fits in (("60000000", True), ("", False), ("1000", False)):
        monkeypatch.setenv("RAKUTEN_MAX_PIXELS", limit)
        embedder = ImageExpert.load(bundle / "experts/image").embedder
        if fits: assert np.isfinite(embedder.vector(file.getvalue())).all()
        else:
            with pytest.raises(PictureError, match="more than"): embedder.vector(file.getvalue())
