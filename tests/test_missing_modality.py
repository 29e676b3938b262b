"""If an expert or a modality is missing, the fused prediction is nearly as good as the remaining expert alone.

Nearly: its weighted F1 is at most .01 lower, on the products that the remaining expert sees."""
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
ByExpert = dict[str, np.ndarray]

# --- each expert of the shared bundle removed: its out-of-fold predictions

def uniform_if_unseen(probs: ByExpert, sees: ByExpert) -> ByExpert:
    "Uniform probabilities for the products that an expert does not see."
    return {e: np.where(sees[e][:, None], p, 1 / CLASSES) for e, p in probs.items()}

@pytest.fixture(scope="module")
def predictions(trained: Path) -> tuple[np.ndarray, ByExpert, ByExpert]: # labels, probabilities, visibility
    "Out-of-fold predictions of the experts of the shared bundle."
    saved = load_out_of_fold(trained / "out_of_fold")
    rows = saved.rows("out_of_fold")
    sees = {e: s[rows] & ~np.isnan(saved.probs[e][rows, 0]) for e, s in saved.sees.items()}
    return saved.y[rows], uniform_if_unseen({e: p[rows] for e, p in saved.probs.items()}, sees), sees

@pytest.mark.parametrize("complete", [False, True], ids=["fitted with gaps", "fitted without gaps"])
@pytest.mark.parametrize(("missing", "remaining"), [("text_linear", "image"), ("image", "text_linear")])
def test_without_one_expert_the_fusion_is_as_good_as_the_other(
    missing: str, remaining: str, complete: bool, predictions: tuple[np.ndarray, ByExpert, ByExpert],
) -> None:
    y, probs, sees = predictions
    fit_rows = np.all(list(sees.values()), axis=0) if complete else np.full(len(y), True)
    fit_sees = None if complete else {e: s[fit_rows] for e, s in sees.items()}
    fusion = fit_fusion({e: p[fit_rows] for e, p in probs.items()}, y[fit_rows], fit_sees)
    rows = sees[remaining]
    alone = weighted_f1(y[rows], probs[remaining][rows])
    absent = fusion.predict_proba({remaining: probs[remaining][rows]})
    unseen = fusion.predict_proba({e: p[rows] for e, p in probs.items()}, {remaining: rows[rows], missing: ~rows[rows]})
    np.testing.assert_array_equal(absent, unseen, "an absent expert equals one that sees no product")
    np.testing.assert_allclose(absent.sum(1), 1)
    assert weighted_f1(y[rows], absent) >= alone - MARGIN

# --- three experts of known quality, fitted without gaps

def synthetic_experts(n: int, rng: np.random.Generator) -> tuple[np.ndarray, ByExpert]: # labels, probabilities
    "Three experts: a good and overconfident one, a fair one, and one slightly better than guessing."
    y = rng.choice(CLASSES, n, p=(share := np.arange(1, CLASSES + 1)) / share.sum())
    def expert(signal: float, sharpness: float) -> np.ndarray:
        z = rng.normal(size=(n, CLASSES)) + signal * (np.arange(CLASSES) == y[:, None])
        p = np.exp(sharpness * z)
        return (p / p.sum(1, keepdims=True)).astype(np.float32)
    return y, {"good": expert(2.6, 4), "fair": expert(1.8, 1), "weak": expert(0.4, 0.5)}

MISSING = [("good",), ("fair",), ("weak",), ("good", "fair"), ("good", "weak"), ("fair", "weak")]

@pytest.mark.parametrize("missing", MISSING, ids=" and ".join)
def test_the_fusion_is_as_good_as_the_best_of_the_remaining_experts(missing: tuple[str, ...]) -> None:
    rng = np.random.default_rng(5)
    fit_y, fit_probs = synthetic_experts(3000, rng)
    fusion = fit_fusion(fit_probs, fit_y)
    y, probs = synthetic_experts(3000, rng)
    remaining = {e: p for e, p in probs.items() if e not in missing}
    fused = weighted_f1(y, fusion.predict_proba(remaining))
    assert fused >= max(weighted_f1(y, p) for p in remaining.values()) - MARGIN

# --- catalogues without a modality

def remove_pictures(catalog: Path) -> None:
    "Delete the picture of each product."
    for folder in catalog.glob("image_*"): shutil.rmtree(folder)

def remove_texts(catalog: Path) -> None:
    "Empty the text of each product."
    for path in catalog.glob("X_*_update.csv"):
        pd.read_csv(path, index_col=0).assign(designation="", description="").to_csv(path, lineterminator="\n")

# Removed modality → how, the remaining expert, and the number of products: those without pictures cost little.
REMOVED: dict[str, tuple[Callable[[Path], None], str, int]] = {
    "pictures": (remove_pictures, "text_linear", 3000),
    "texts": (remove_texts, "image", 300),
}

@pytest.mark.parametrize("modality", REMOVED)
def test_a_catalogue_without_a_modality_is_evaluated(modality: str, bundle: Path, rakuten: Run, tmp_path: Path) -> None:
    remove, remaining, products = REMOVED[modality]
    catalog = make_sample(tmp_path / "catalog", products, seed=5, images=remaining == "image", progress=False)
    remove(catalog)
    answer = rakuten("evaluate", bundle, catalog, "--json", tmp_path / "metrics.json")
    assert answer.returncode == 0, answer.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert list(metrics["experts"]) == [remaining]
    assert metrics["trained_on"] == 0
    assert metrics["fused"]["n"] == metrics["experts"][remaining]["n"] > products / 2
    assert metrics["fused"]["weighted_f1"] >= metrics["experts"][remaining]["weighted_f1"] - MARGIN
