"Each test of behaviour fails for the model that misbehaves in just that way, and for no other reason."
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
    collapsed,
    direction,
    invariance,
    memory,
    recognised,
    some,
    typical_of,
)
from rakuten_nb.models.bundle import Bundle, load_bundle
from rakuten_nb.taxonomy import CODES

WORDS = {10: "roman", 1160: "carte", 1560: "chaise", 2583: "piscine"}
CLASSES = [CODES.index(code) for code in WORDS]
TELLING = list(WORDS.values())

def picture(size: int, seed: int) -> bytes:
    "A picture of noise."
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)).save(out := io.BytesIO(), "JPEG", quality=95)
    return out.getvalue()

def products_of(each: int, pictures: bool = False) -> Products:
    "So many products of each of the four types, whose titles hold their word."
    n = each * len(TELLING)
    titles = [f"Été {TELLING[i % 4]} numéro {i} bleu" for i in range(n)]
    shown: list[Path | bytes | None] = [picture(100, i) if pictures else None for i in range(n)]
    return make_products(titles, picture=shown, productid=[str(i) for i in range(n)], prdtypecode=[list(WORDS)[i % 4] for i in range(n)])

def by_words(products: Products, read: Callable[[str], str] = clean_text) -> np.ndarray: # (n, 27)
    "What a model says that knows the four words and nothing else."
    p = np.full((len(products), 27), .2 / 27)
    for i, title in enumerate(products.title):
        said = [c for c, word in zip(CLASSES, TELLING, strict=True) if word in read(title).split()]
        p[i, said or [0]] += .8 / max(len(said), 1)
    return p

@dataclass
class Sayer:
    "Stands in for a bundle: an expert for each modality, and whatever it is told to say."
    said: Callable[[Products], np.ndarray] = by_words
    modalities: tuple[str, ...] = ("text",)
    known: bool = False
    about: dict[str, Any] = field(default_factory=lambda: {"metrics": {"out_of_fold": {"fused": {"weighted_f1": .6}}}})

    @property
    def experts(self) -> dict[str, Any]:
        "Experts that see what they need."
        see = {"text": lambda p: p.has_text, "image": lambda p: p.has_picture}
        return {m: SimpleNamespace(modality=m, sees=see[m]) for m in self.modalities}

    def predict(self, products: Products) -> SimpleNamespace:
        "What it is told to say."
        return SimpleNamespace(proba=self.said(products))

    def was_trained_on(self, products: Products) -> np.ndarray:
        "All of them, or none."
        return np.full(len(products), self.known)

def bundle(*args: Any, **kwargs: Any) -> Bundle:
    "A stand-in, as the type checker wants it."
    return cast(Bundle, Sayer(*args, **kwargs))

PARAMS = BehaviourParams(rows=40)

def failing(checks: list[Check]) -> set[str]:
    "The names of what failed."
    return {c.check.split(":")[0] for c in checks if c.passed is False}

def test_a_model_that_reads_words_passes_everything() -> None:
    checks = behaviour_checks(bundle(known=True), products_of(15), params=PARAMS)
    assert failing(checks) == set() and {c.check.split(":")[0] for c in checks if c.passed is None} == {"JPEG again", "cropped"}

@pytest.mark.parametrize(("name", "read"), [
    ("upper case", str), ("no accents", lambda t: clean_text(t) if "é" in clean_text(t) else ""), ("HTML", lambda t: t.lower().replace("<", "roman <"))])
def test_a_model_that_falls_for_another_dress_is_found(name: str, read: Callable[[str], str]) -> None:
    fooled = bundle(lambda p: by_words(p, read))
    assert name in failing(invariance(fooled, products_of(15), PARAMS))

def test_a_model_that_looks_at_borders_or_noise_is_found() -> None:
    products = products_of(5, pictures=True)
    def says(number: Callable[[Image.Image], int]) -> Callable[[Products], np.ndarray]:
        return lambda p: np.eye(27)[[0 if s is None else number(decode_picture(s)) % 27 for s in p.picture]]
    by_size, by_pixel = says(lambda image: image.width), says(lambda image: int(np.asarray(image)[50, 50].sum()))
    assert failing(invariance(bundle(by_size, ("image",)), products, PARAMS)) == {"cropped"}
    assert "JPEG again" in failing(invariance(bundle(by_pixel, ("image",)), products, PARAMS))
    assert failing(invariance(bundle(modalities=("text", "image")), products, PARAMS)) == set()

def test_a_change_that_moves_the_probability_is_found_though_the_answer_stays() -> None:
    def timid(products: Products) -> np.ndarray:
        loud = np.array([t.isupper() for t in products.title], bool)[:, None]
        return np.where(loud, .5 * by_words(products) + .5 / 27, by_words(products))
    shy = bundle(timid)
    checks = {c.check: c.passed for c in invariance(shy, products_of(15), PARAMS)}
    assert checks["upper case: same answer"] and not checks["upper case: probability moved"]

def test_telling_words_come_from_the_products_or_from_parameters() -> None:
    products = products_of(15)
    learned = typical_of(products)
    assert dict(zip(learned["code"], learned["word"], strict=True)) == WORDS
    assert (products.label[learned["row"]] == learned["class"]).all()
    assert typical_of(products, {2583: "bassin"})["word"].tolist()[-1] == "bassin"

def test_a_word_that_moves_nothing_is_found() -> None:
    products = products_of(15)
    typical = typical_of(products)
    assert direction(bundle(), products, typical, PARAMS).passed
    deaf = bundle(lambda p: np.full((len(p), 27), 1 / 27))
    assert direction(deaf, products, typical, PARAMS).found == 0
    assert not direction(bundle(), products, typical_of(products, {2583: "inconnu"}), PARAMS).passed

def test_a_type_whose_typical_product_is_missed_is_named() -> None:
    products = products_of(15)
    blind = bundle(lambda p: by_words(p, lambda t: clean_text(t).replace("piscine", "roman")))
    check = recognised(blind, products, typical_of(products), PARAMS)
    assert check.passed is False and check.words == "not recognised: 2583"

def test_a_collapsed_type_is_named() -> None:
    products = products_of(15)
    said = by_words(products)
    said[products.label == CLASSES[3]] = np.eye(27)[0]
    assert collapsed(products.label, said, PARAMS).words == "2583"
    assert collapsed(products.label, said, BehaviourParams(min_class_rows=99)).passed is None

def test_what_is_learned_by_heart_is_told_from_what_is_understood() -> None:
    products = products_of(15)
    for limit, passed in ((.5, True), (.3, False)): assert memory(bundle(known=True), products, BehaviourParams(memory=limit)).passed is passed
    for unknown in (bundle(known=False), bundle(known=True, about={})): assert memory(unknown, products, PARAMS).passed is None

def test_the_same_products_are_asked_in_any_order() -> None:
    products = products_of(15)
    mask = np.full(len(products), True)
    assert set(some(products, mask, 7).productid) == set(some(products[::-1], mask, 7).productid) and len(some(products, mask, 700)) == 60

def test_a_bundle_behaves(shared: Path) -> None:
    made = models(shared)
    honest, products = load_bundle(made / "honest"), read_catalog(made / "catalog").labelled
    unseen = ~honest.was_trained_on(products)
    checks = behaviour_checks(honest, products[unseen], products[~unseen], BehaviourParams(rows=60, memory=1))
    assert failing(checks) == set() and sum(c.passed is None for c in checks) == 4

def test_every_change_has_a_floor_by_default() -> None:
    assert set(BehaviourParams().unchanged) == set(CHANGES)
