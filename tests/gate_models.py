"A model of correct labels and one of shuffled labels, trained once for the tests of gate, behaviour and audit."
from dataclasses import replace
from pathlib import Path

import numpy as np
from conftest import once

from rakuten_nb.data.catalog import Catalog, read_catalog
from rakuten_nb.data.sample import make_sample
from rakuten_nb.models.bundle import save_bundle
from rakuten_nb.models.training import SplitParams, TrainParams, train
from rakuten_nb.models.workspace import save_out_of_fold

PRODUCTS = 900
SPLIT = SplitParams(folds=2, gold_share=.25)
PARAMS = f"split:\n  folds: {SPLIT.folds}\n  gold_share: {SPLIT.gold_share}\n"

def with_shuffled_labels(catalog: Catalog, share: float, seed: int = 0) -> Catalog:
    "The catalogue with this share of its labels exchanged among their products."
    rng, products = np.random.default_rng(seed), catalog.products[:]
    rows = rng.permutation(np.flatnonzero(products.label >= 0))
    rows = rows[: round(share * len(rows))]
    products.label = products.label.copy()
    products.label[rows] = products.label[rng.permutation(rows)]
    return replace(catalog, products=products)

def write_models(part: Path) -> None:
    "Write the catalogue, both bundles without gold, their out-of-fold predictions, and params.yaml."
    catalog = read_catalog(make_sample(part / "catalog", PRODUCTS, images=False, progress=False))
    for name, share in (("correct", 0), ("shuffled", .3)):
        labelled = with_shuffled_labels(catalog, share)
        bundle, out_of_fold = train(labelled, TrainParams(split=SPLIT), "text_linear", keep_gold=True)
        save_bundle(bundle, part / name)
        save_out_of_fold(out_of_fold, part / f"{name} out_of_fold")
    (part / "params.yaml").write_text(PARAMS, encoding="utf-8")

def models(shared: Path) -> Path:
    "The folder of `write_models`, written once in a test run."
    return once(shared / "gate_models", write_models)
