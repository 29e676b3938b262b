"An honest model and one that learned from shuffled labels, as the tests of gate and behaviour judge them; made once a run."
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
    "The catalogue with this share of its labels handed round among their products."
    rng, products = np.random.default_rng(seed), catalog.products[:]
    rows = rng.permutation(np.flatnonzero(products.label >= 0))
    rows = rows[: round(share * len(rows))]
    products.label = products.label.copy()
    products.label[rows] = products.label[rng.permutation(rows)]
    return replace(catalog, products=products)

def write_models(part: Path) -> None:
    "catalog/, the bundles honest/ and misled/, neither of which knows gold, and what each said of the others; params.yaml tells who is gold."
    catalog = read_catalog(make_sample(part / "catalog", PRODUCTS, images=False, progress=False))
    for name, share in (("honest", 0), ("misled", .3)):
        bundle, out_of_fold = train(with_shuffled_labels(catalog, share), TrainParams(split=SPLIT), "text_linear", keep_gold=True)
        save_bundle(bundle, part / name)
        save_out_of_fold(out_of_fold, part / f"{name} out_of_fold")
    (part / "params.yaml").write_text(PARAMS, encoding="utf-8")

def models(shared: Path) -> Path:
    "The folder of `write_models`, written once a run."
    return once(shared / "gate_models", write_models)
