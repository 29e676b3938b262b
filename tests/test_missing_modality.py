"""Whatever is missing, the fused answer is about as good as what is left gives alone.

"About": weighted F1 at most .01 below, on the rows that are left to judge."""
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Run

from rakuten_nb.data.sample import make_sample
from rakuten_nb.metrics import weighted_f1
from rakuten_nb.models.fusion import fit_fusion
from rakuten_nb.models.workspace import load_out_of_fold

MARGIN = 0.01
CLASSES = 27
Probs = dict[str, np.ndarray]

def without(probs: Probs, gone: str) -> Probs:
    "The probabilities of the other experts."
    return {e: p for e, p in probs.items() if e != gone}

def uniform_if_blind(probs: Probs, sees: Probs) -> Probs:
    "Nothing said where nothing was seen."
    return {e: np.where(sees[e][:, None], p, 1 / CLASSES) for e, p in probs.items()}

# --- each expert removed, on what was said out of fold

@pytest.fixture(scope="module")
def said(trained: Path) -> tuple[np.ndarray, Probs, Probs]: # y, probabilities, who sees
    "Out-of-fold probabilities of the experts of the shared bundle."
    j = load_out_of_fold(trained / "out_of_fold")
    rows = j.rows("out_of_fold")
    sees = {e: s[rows] & ~np.isnan(j.probs[e][rows, 0]) for e, s in j.sees.items()}
    return j.y[rows], uniform_if_blind({e: p[rows] for e, p in j.probs.items()}, sees), sees

@pytest.mark.parametrize("complete", [False, True], ids=["fitted with gaps", "fitted without gaps"])
@pytest.mark.parametrize(("gone", "left"), [("text_linear", "image"), ("image", "text_linear")])
def test_one_expert_removed(gone: str, left: str, complete: bool, said: tuple[np.ndarray, Probs, Probs]) -> None:
    y, probs, sees = said
    everybody = np.all(list(sees.values()), axis=0)
    fit = everybody if complete else np.full(len(y), True)
    fusion = fit_fusion({e: p[fit] for e, p in probs.items()}, y[fit], None if complete else {e: s[fit] for e, s in sees.items()})
    rows = sees[left]
    alone = weighted_f1(y[rows], probs[left][rows])
    absent = fusion.predict_proba({left: probs[left][rows]})
    unseen = fusion.predict_proba({e: p[rows] for e, p in probs.items()}, {left: rows[rows], gone: ~rows[rows]})
    np.testing.assert_array_equal(absent, unseen, "absent, and there but seeing nothing, are the same")
    np.testing.assert_allclose(absent.sum(1), 1)
    assert weighted_f1(y[rows], absent) >= alone - MARGIN

# --- three experts of known quality, fitted where none was missing

def made_up(n: int, rng: np.random.Generator) -> tuple[np.ndarray, Probs]: # y, probabilities
    "Three experts, one good and overconfident, one fair, one hardly better than guessing."
    y = rng.choice(CLASSES, n, p=(share := np.arange(1, CLASSES + 1)) / share.sum())
    def expert(signal: float, sharpness: float) -> np.ndarray:
        z = rng.normal(size=(n, CLASSES)) + signal * (np.arange(CLASSES) == y[:, None])
        p = np.exp(sharpness * z)
        return (p / p.sum(1, keepdims=True)).astype(np.float32)
    return y, {"good": expert(2.6, 4), "fair": expert(1.8, 1), "weak": expert(0.4, 0.5)}

@pytest.mark.parametrize("gone", [("good",), ("fair",), ("weak",), ("good", "fair"), ("good", "weak"), ("fair", "weak")], ids=" and ".join)
def test_experts_removed_from_three_that_were_never_missing(gone: tuple[str, ...]) -> None:
    rng = np.random.default_rng(5)
    y, probs = made_up(3000, rng)
    new_y, new = made_up(3000, rng)
    left = {e: p for e, p in new.items() if e not in gone}
    fused = weighted_f1(new_y, fit_fusion(probs, y).predict_proba(left))
    assert fused >= max(weighted_f1(new_y, p) for p in left.values()) - MARGIN

# --- catalogues stripped of a modality

def strip_pictures(catalog: Path) -> None:
    "No product has a picture."
    for folder in catalog.glob("image_*"): shutil.rmtree(folder)

def strip_texts(catalog: Path) -> None:
    "No product has a text."
    for path in catalog.glob("X_*_update.csv"):
        pd.read_csv(path, index_col=0).assign(designation="", description="").to_csv(path, lineterminator="\n")

# name → how it is stripped, who is left, and how many products the bundle has not learned from (without pictures they are cheap)
STRIPPED: dict[str, tuple[Callable[[Path], None], str, int]] = {"no pictures": (strip_pictures, "text_linear", 3000), "no texts": (strip_texts, "image", 300)}

@pytest.mark.parametrize("how", STRIPPED)
def test_a_stripped_catalogue(how: str, bundle: Path, rakuten: Run, tmp_path: Path) -> None:
    strip, left, products = STRIPPED[how]
    catalog = make_sample(tmp_path / "catalog", products, seed=5, images=left == "image", progress=False)
    strip(catalog)
    answer = rakuten("evaluate", bundle, catalog, "--json", tmp_path / "figures.json")
    assert answer.returncode == 0, answer.stderr
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert list(figures["experts"]) == [left]
    assert figures["trained_on"] == 0
    assert figures["fused"]["n"] == figures["experts"][left]["n"] > products / 2
    assert figures["fused"]["weighted_f1"] >= figures["experts"][left]["weighted_f1"] - MARGIN
