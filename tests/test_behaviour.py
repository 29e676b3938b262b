"Each behaviour test fails for a model that misbehaves in this way only."
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from gate_models import models
from PIL import Image

from rakuten_nb.data.catalog import Products, make_products, read_catalog
from rakuten_nb.data.clean import clean_text
from rakuten_nb.data.picture import decode_picture
from rakuten_nb.evaluation.behaviour import (
    CHANGES,
    BehaviourParams,
    Check,
    behaviour_checks,
    collapse_check,
    direction_check,
    invariance_checks,
    memory_check,
    sample_products,
    typical_check,
    typical_products,
)
from rakuten_nb.models.bundle import Bundle, load_bundle
from rakuten_nb.taxonomy import CODES

WORDS = {10: "roman", 1160: "carte", 1560: "chaise", 2583: "piscine"} # product type code → its typical word
CLASSES = [CODES.index(code) for code in WORDS]
TYPICAL = list(WORDS.values())
PARAMS = BehaviourParams(rows=40)

def noise_picture(size: int, seed: int) -> bytes:
    "A picture of random pixels."
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(out := io.BytesIO(), "JPEG", quality=95)
    return out.getvalue()

def make_typical(each: int, pictures: bool = False) -> Products:
    "So many products of each of the four types, titled with the word of its type."
    rows = range(each * len(TYPICAL))
    titles = [f"Été {TYPICAL[i % 4]} numéro {i} bleu" for i in rows]
    shown: list[Path | bytes | None] = [noise_picture(100, i) if pictures else None for i in rows]
    codes = [list(WORDS)[i % 4] for i in rows]
    return make_products(titles, picture=shown, productid=[str(i) for i in rows], prdtypecode=codes)

def predict_by_word(
    products: Products,
    read: Callable[[str], str] = clean_text, # how the model reads a title
) -> np.ndarray: # (n, 27)
    "Predictions of a model that knows the four words only."
    p = np.full((len(products), 27), .2 / 27)
    for i, title in enumerate(products.title):
        words = read(title).split()
        classes = [c for c, word in zip(CLASSES, TYPICAL, strict=True) if word in words]
        p[i, classes or [0]] += .8 / max(len(classes), 1)
    return p

@dataclass
class StubBundle:
    "A substitute for a bundle with given predictions and one expert for each modality."
    proba: Callable[[Products], np.ndarray] = predict_by_word
    modalities: tuple[str, ...] = ("text",)
    trained: bool = False # whether all products are training products, or none
    about: dict[str, Any] = field(
        default_factory=lambda: {"metrics": {"out_of_fold": {"fused": {"weighted_f1": .6}}}})

    @property
    def experts(self) -> dict[str, Any]:
        "Experts that see products with their modality."
        see = {"text": lambda p: p.has_text, "image": lambda p: p.has_picture}
        return {m: SimpleNamespace(modality=m, sees=see[m]) for m in self.modalities}

    def predict(self, products: Products) -> SimpleNamespace:
        "The given predictions."
        return SimpleNamespace(proba=self.proba(products))

    def was_trained_on(self, products: Products) -> np.ndarray:
        "The same for all products."
        return np.full(len(products), self.trained)

def stub(*args: Any, **kwargs: Any) -> Bundle:
    "A `StubBundle` with the type that the checks expect."
    return cast(Bundle, StubBundle(*args, **kwargs))

@pytest.fixture(scope="module")
def products() -> Products:
    "Fifteen products of each type."
    return make_typical(15)

def failed(checks: list[Check]) -> set[str]:
    "The tests with a failed check, without the part after the colon."
    return {c.check.split(":")[0] for c in checks if c.passed is False}

def read_without_accents(title: str) -> str:
    "A reader that sees nothing in a text without accents."
    return clean_text(title) if "é" in clean_text(title) else ""

def read_tags_as_words(title: str) -> str:
    "A reader that takes each tag for the first type."
    return title.lower().replace("<", "roman <")

def test_a_model_that_reads_the_words_passes(products: Products) -> None:
    checks = behaviour_checks(stub(trained=True), products, params=PARAMS)
    assert failed(checks) == set()
    assert {c.check.split(":")[0] for c in checks if c.passed is None} == {"JPEG again", "cropped"}

@pytest.mark.parametrize(("name", "read"), [
    ("upper case", str), ("no accents", read_without_accents), ("HTML", read_tags_as_words)])
def test_finds_a_model_that_a_changed_text_misleads(
    name: str, read: Callable[[str], str], products: Products,
) -> None:
    misled = stub(lambda p: predict_by_word(p, read))
    assert name in failed(invariance_checks(misled, products, PARAMS))

def test_finds_a_model_that_looks_at_borders_or_noise() -> None:
    products = make_typical(5, pictures=True)
    def predict_by_number(number: Callable[[Image.Image], int]) -> Callable[[Products], np.ndarray]:
        return lambda p: np.eye(27)[[0 if s is None else number(decode_picture(s)) % 27 for s in p.picture]]
    by_size = predict_by_number(lambda image: image.width)
    by_pixel = predict_by_number(lambda image: int(np.asarray(image)[50, 50].sum()))
    assert failed(invariance_checks(stub(by_size, ("image",)), products, PARAMS)) == {"cropped"}
    assert "JPEG again" in failed(invariance_checks(stub(by_pixel, ("image",)), products, PARAMS))
    assert failed(invariance_checks(stub(modalities=("text", "image")), products, PARAMS)) == set()

def test_finds_a_change_of_confidence_without_a_change_of_prediction(products: Products) -> None:
    def less_sure_of_capitals(products: Products) -> np.ndarray:
        capitals = np.array([t.isupper() for t in products.title], bool)[:, None]
        p = predict_by_word(products)
        return np.where(capitals, .5 * p + .5 / 27, p)
    checks = {c.check: c.passed for c in invariance_checks(stub(less_sure_of_capitals), products, PARAMS)}
    assert checks["upper case: same prediction"] and not checks["upper case: confidence change"]

def test_typical_words_come_from_products_or_parameters(products: Products) -> None:
    typical = typical_products(products)
    assert dict(zip(typical["code"], typical["word"], strict=True)) == WORDS
    assert (products.label[typical["row"]] == typical["class"]).all()
    assert typical_products(products, {2583: "bassin"})["word"].tolist()[-1] == "bassin"

def test_finds_a_word_without_effect(products: Products) -> None:
    typical = typical_products(products)
    assert direction_check(stub(), products, typical, PARAMS).passed
    constant = stub(lambda p: np.full((len(p), 27), 1 / 27))
    assert direction_check(constant, products, typical, PARAMS).value == 0
    unknown_word = typical_products(products, {2583: "inconnu"})
    assert not direction_check(stub(), products, unknown_word, PARAMS).passed

def test_names_a_type_whose_typical_product_is_not_recognised(products: Products) -> None:
    read = lambda title: clean_text(title).replace("piscine", "roman")
    blind = stub(lambda p: predict_by_word(p, read))
    check = typical_check(blind, products, typical_products(products), PARAMS)
    assert check.passed is False and check.detail == "not recognised: 2583"

def test_names_a_type_that_is_never_predicted(products: Products) -> None:
    p = predict_by_word(products)
    p[products.label == CLASSES[3]] = np.eye(27)[0]
    assert collapse_check(products.label, p, PARAMS).detail == "2583"
    assert collapse_check(products.label, p, BehaviourParams(min_class_rows=99)).passed is None

@pytest.mark.parametrize(("limit", "passed"), [(.5, True), (.3, False)])
def test_limits_memorisation(limit: float, passed: bool, products: Products) -> None:
    assert memory_check(stub(trained=True), products, BehaviourParams(memory=limit)).passed is passed

@pytest.mark.parametrize("bundle", [stub(trained=False), stub(trained=True, about={})])
def test_memorisation_needs_training_products_and_metrics(bundle: Bundle, products: Products) -> None:
    assert memory_check(bundle, products, PARAMS).passed is None

def test_tests_the_same_products_in_any_order(products: Products) -> None:
    mask = np.full(len(products), True)
    backwards = sample_products(products[::-1], mask, 7)
    assert set(sample_products(products, mask, 7).productid) == set(backwards.productid)
    assert len(sample_products(products, mask, 700)) == 60

def test_a_trained_bundle_passes(shared: Path) -> None:
    made = models(shared)
    correct, products = load_bundle(made / "correct"), read_catalog(made / "catalog").labelled
    unseen = ~correct.was_trained_on(products)
    params = BehaviourParams(rows=60, memory=1)
    checks = behaviour_checks(correct, products[unseen], products[~unseen], params)
    assert failed(checks) == set() and sum(c.passed is None for c in checks) == 4

def test_each_change_has_a_default_bound() -> None:
    assert set(BehaviourParams().unchanged) == set(CHANGES)
