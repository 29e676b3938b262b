"Other picture networks than the default: chosen, trained on, served; and every way in which their weights cannot be had."
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
from rakuten_nb.models.applications import APPLICATIONS, WEIGHTS_URL, application_net, weights_file
from rakuten_nb.models.backbone import BACKBONES, backbone_onnx, onnx_features
from rakuten_nb.models.bundle import load_bundle
from rakuten_nb.models.image import LAYOUT_WIDTH, Embedder, ImageExpert
from rakuten_nb.models.training import read_params

SMALL = "mobilenet_v3_small" # the quickest
PICTURES = 12 # that the small catalogue keeps; VGG16 looks at each for a third of a second

def params(folder: Path, **image: Any) -> Path:
    "A params.yaml with these parameters of the image expert."
    (path := folder / "params.yaml").write_text(json.dumps({"split": {"folds": 2}, "image": {"experts": {"image": image}}}), encoding="utf-8")
    return path

@pytest.fixture(scope="session")
def few_pictures(shared: Path) -> Path:
    "Sixty products, some with a picture."
    def make(part: Path) -> None:
        make_sample(part, 60, progress=False)
        for extra in sorted((part / "image_train").iterdir())[PICTURES:]: extra.unlink()
    return once(shared / "few_pictures", make)

@pytest.fixture(scope="session")
def vgg16(shared: Path, few_pictures: Path, rakuten: Run) -> Path:
    "bundle/ with a VGG16 of random weights, trained as its users do."
    def make(part: Path) -> None:
        answer = rakuten("train", few_pictures, "--bundle", part / "bundle", "--experts", "text_linear,image",
                         "--params", params(part, backbone="vgg16", weights="none"))
        assert answer.returncode == 0, answer.stderr
        assert "Traceback" not in answer.stderr
    return once(shared / "vgg16", make)

def painted(colour: str, side: int = 224) -> np.ndarray: # (1, side, side, 3)
    "A picture of one colour, as a network is shown it."
    return np.asarray(Image.new("RGB", (side, side), colour), np.float32)[None]

# --- chosen, trained, served

def test_a_vgg16_is_trained_and_packed(vgg16: Path, few_pictures: Path) -> None:
    folder = vgg16 / "bundle/experts/image"
    made = json.loads((folder / "expert.json").read_text(encoding="utf-8"))["params"]
    assert (made["backbone"], made["weights"]) == ("vgg16", "none")
    assert 58e6 < (folder / "backbone.onnx").stat().st_size < 60e6
    bundle, products = load_bundle(vgg16 / "bundle"), read_catalog(few_pictures).products
    seen = products[products.has_picture][:2]
    features = bundle.experts["image"].embed(seen)
    assert features.shape == (2, 512 + LAYOUT_WIDTH) and np.isfinite(features).all() and (features[0] != features[1]).any()

def test_a_vgg16_is_served(vgg16: Path, few_pictures: Path, env: dict[str, str], tmp_path: Path) -> None:
    products = read_catalog(few_pictures).products
    picture = next(p for p in products.picture if p is not None)
    raw = picture if isinstance(picture, bytes) else picture.read_bytes()
    with ApiProcess(env, tmp_path / "api", vgg16 / "bundle") as api:
        api.add_users(**USERS)
        api.wait_until("/ready", {200})
        alone, both = (api.predict(api.token(), title, picture=raw) for title in ("", "Piscine ronde"))
    assert (alone.status_code, both.status_code) == (200, 200), alone.text + both.text
    assert alone.json()["experts"] == {"image": 1.0} and set(both.json()["experts"]) == {"image", "text_linear"}
    expected = load_bundle(vgg16 / "bundle").predict(products[[i for i, p in enumerate(products.picture) if p is picture]])
    assert expected.shares.shape[1] == 2

def test_colours_arrive_in_the_order_that_the_network_learned(vgg16: Path) -> None:
    import keras
    graph = (vgg16 / "bundle/experts/image/backbone.onnx").read_bytes()
    net = application_net("vgg16", "none") # drawn again, in another process than the graph was made in
    red, blue = painted("red"), painted("blue")
    for picture in (red, blue):
        expected = np.asarray(net(keras.applications.vgg16.preprocess_input(picture.copy()), training=False))
        assert np.abs(onnx_features(graph, picture) - expected).max() < 1e-4 * np.abs(expected).max()
    assert np.abs(onnx_features(graph, red) - onnx_features(graph, blue)).max() > 0.05 * np.abs(onnx_features(graph, red)).max()

EXPORT = """
import sys
from pathlib import Path
from rakuten_nb.models.backbone import backbone_onnx
print(backbone_onnx(Path(sys.argv[1]), sys.argv[2], "none"))
"""

@pytest.mark.parametrize("name", [n if n == SMALL else pytest.param(n, marks=pytest.mark.heavy) for n in APPLICATIONS])
def test_a_backbone_answers_as_keras_does(name: str, python: Run, tmp_path: Path) -> None:
    answer = python("-c", EXPORT, tmp_path, name, extra={"PYTHONHASHSEED": "7"})
    assert answer.returncode == 0, answer.stderr
    assert "Traceback" not in answer.stderr, "the exporter complains"
    import keras
    graph, net, app = Path(answer.stdout.strip()).read_bytes(), application_net(name, "none"), APPLICATIONS[name]
    embedder = Embedder(graph)
    assert embedder.side == app.side == net.input_shape[1] and embedder.width == net.output_shape[1]
    noise = np.random.default_rng(3).uniform(0, 255, (2, app.side, app.side, 3)).astype(np.float32)
    family = getattr(keras.applications, app.family)
    expected = np.asarray(net(family.preprocess_input(noise.copy()), training=False))
    assert np.abs(onnx_features(graph, noise) - expected).max() < 1e-4 * np.abs(expected).max()
    (file := BytesIO()), Image.new("RGB", (400, 90), "green").save(file, "PNG")
    (shown,) = embedder.shown(file.getvalue()).items()
    assert shown[0] == f"trimmed {app.side}" and shown[1].shape == (1, app.side, app.side, 3)

def test_weights_of_a_file(python: Run, tmp_path: Path) -> None:
    from rakuten_nb.models.applications import draw_weights
    net = application_net(SMALL, "none")
    draw_weights(net, 5)
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
    Path(weights).unlink() # a bundle is whole without what it was made of
    assert ImageExpert.load(tmp_path / "saved").embedder.graph == graph.read_bytes()

@pytest.mark.parametrize("name", [n if n == "vgg16" else pytest.param(n, marks=pytest.mark.heavy) for n in APPLICATIONS])
def test_the_register_names_what_keras_would_download(name: str) -> None:
    import keras
    asked: list[Any] = []
    def instead(_: str, url: str, file_hash: str = "", **__: Any) -> None:
        asked.append((url, file_hash))
        raise InterruptedError
    app = APPLICATIONS[name]
    with patch("keras.src.utils.file_utils.get_file", instead), pytest.raises(InterruptedError):
        getattr(keras.applications, app.model)(include_top=False, input_shape=(app.side, app.side, 3))
    assert asked == [(WEIGHTS_URL + app.file, app.hash)]

# --- what cannot be had

@pytest.fixture
def refusing_proxy() -> Iterator[tuple[str, list[bytes]]]:
    "A proxy on loopback that refuses every connection, and what it was asked."
    asked: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))
    def refuse() -> None:
        while True:
            try: connection, _ = listener.accept()
            except OSError: return
            with connection:
                asked.append(connection.recv(4096))
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    threading.Thread(target=refuse, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    listener.close()

def one_line(answer: "subprocess.CompletedProcess[str]") -> str:
    "What a command says that has refused."
    assert answer.returncode == 2, answer.stderr
    assert "Traceback" not in answer.stderr
    return answer.stderr.strip().splitlines()[-1]

def test_a_refused_download_says_what_to_set(few_pictures: Path, rakuten: Run, refusing_proxy: tuple[str, list[bytes]], tmp_path: Path) -> None:
    url, asked = refusing_proxy
    proxied = {"HTTPS_PROXY": url, "https_proxy": url} | {"NO_PROXY": "", "no_proxy": "", "KERAS_HOME": str(tmp_path / "keras")}
    answer = rakuten("train", few_pictures, "--bundle", tmp_path / "bundle", "--experts", "text,image",
                     "--params", params(tmp_path, backbone="vgg16", weights="imagenet"), extra=proxied)
    line = one_line(answer)
    assert "text_linear" not in answer.stderr, "asked for before anything learns"
    assert asked and asked[0].startswith(b"CONNECT storage.googleapis.com:443")
    assert "weights of vgg16 cannot be downloaded from storage.googleapis.com" in line and "403" in line
    for what in ("image.experts.image.weights", "the path of a file", "none", "backbone: efficientnet_lite0"): assert what in line
    assert [p for p in (tmp_path / "keras").rglob("*") if p.is_file()] == [] and not (tmp_path / "bundle").exists()

def test_a_file_that_holds_no_weights_is_named(few_pictures: Path, rakuten: Run, tmp_path: Path) -> None:
    (tmp_path / "own.h5").write_bytes(pickle.dumps({"a": 1}))
    answer = rakuten("train", few_pictures, "--bundle", tmp_path / "bundle", "--experts", "image",
                     "--params", params(tmp_path, backbone="vgg16", weights=str(tmp_path / "own.h5")))
    line = one_line(answer)
    assert "own.h5: expected the weights of vgg16" in line and "found a file that begins with" in line
    assert not (tmp_path / "bundle").exists()

def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    application_net(SMALL, "none").save_weights(tmp_path / "small.weights.h5")
    whole = (tmp_path / "small.weights.h5").read_bytes()
    (tmp_path / "cut.weights.h5").write_bytes(whole[: len(whole) // 2])
    for file in ("small.weights.h5", "cut.weights.h5"):
        with pytest.raises(InputError, match=f"{file}: expected the weights of vgg16") as said:
            backbone_onnx(tmp_path / "cache", "vgg16", str(tmp_path / file))
        assert "\n" not in str(said.value) and len(str(said.value)) < 600
    assert not (tmp_path / "cache").exists()

@pytest.mark.parametrize(("image", "says"), [
    ({"backbone": "vgg99"}, r"image\.experts\.image\.backbone: expected one of efficientnet_lite0, efficientnet_lite2, vgg16, .*; found 'vgg99'"),
    ({"backbone": ["vgg16"]}, r"image\.experts\.image\.backbone: expected one of .*; found \['vgg16'\]"),
    ({"weights": "none"}, r"image\.experts\.image\.weights: expected imagenet, the weights that efficientnet_lite0 comes with; found 'none'"),
    ({"backbone": "vgg16", "weights": "absent.h5"}, r"image\.experts\.image\.weights: .* an existing file; found .*absent\.h5, which is not there"),
    ({"backbone": "vgg16", "weights": "own.pkl"}, r"image\.experts\.image\.weights: expected imagenet, none, or the path of a .* found 'own\.pkl'"),
    ({"backbone": "vgg16", "weights": None}, r"image\.experts\.image\.weights: expected imagenet, none, .* found None"),
    ({"backbone": "vgg16", "weight": "none"}, r"'weight' of expert image is not known; expected backbone, weights,"),
])
def test_wrong_parameters_are_found_before_anything_is_read(image: dict[str, Any], says: str, tmp_path: Path) -> None:
    with patch("rakuten_nb.models.applications.urlopen", side_effect=AssertionError), pytest.raises(InputError, match=says):
        read_params(params(tmp_path, **image))

def test_reading_parameters_downloads_and_imports_nothing(python: Run, tmp_path: Path) -> None:
    source = "import sys; from pathlib import Path; from rakuten_nb.models.training import read_params; " \
             "[read_params(Path(p)) for p in sys.argv[1:]]; print(*{'keras', 'tensorflow'} & set(sys.modules))"
    for name in BACKBONES: (tmp_path / name).mkdir()
    asked = [params(tmp_path / name, backbone=name) for name in BACKBONES]
    answer = python("-c", source, *asked, extra={"HTTPS_PROXY": "http://127.0.0.1:9", "KERAS_HOME": str(tmp_path / "keras")})
    assert answer.returncode == 0 and answer.stdout.strip() == "", answer.stderr

def test_a_path_starts_at_the_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "settings.ini").touch()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert weights_file("models/own.h5") == tmp_path / "models/own.h5" and weights_file("/else/own.h5") == Path("/else/own.h5")

# --- how large a picture may be

def test_the_limit_of_pixels_holds_for_the_network_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file := BytesIO()), Image.new("L", (7100, 7100), 90).save(file, "PNG")
    for limit, fits in (("60000000", True), ("", False), ("1000", False)):
        monkeypatch.setenv("RAKUTEN_MAX_PIXELS", limit)
        embedder = ImageExpert.load(bundle / "experts/image").embedder
        if fits: assert np.isfinite(embedder.vector(file.getvalue())).all()
        else:
            with pytest.raises(PictureError, match="more than"): embedder.vector(file.getvalue())
