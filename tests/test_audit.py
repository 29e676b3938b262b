"The label audit finds planted errors far above chance, handles unusual catalogues, and writes safe cells."
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Run
from gate_models import PRODUCTS, models
from scipy.stats import hypergeom

from rakuten_nb.data.catalog import Catalog, make_products, read_catalog
from rakuten_nb.data.sample import planted_errors
from rakuten_nb.errors import TooLittleData
from rakuten_nb.evaluation.audit import (
    AuditParams,
    audit_catalog,
    audit_labels,
    audit_out_of_fold,
    audit_summary,
    write_audit,
)
from rakuten_nb.models.workspace import load_out_of_fold
from rakuten_nb.taxonomy import CODES

@pytest.fixture(scope="module")
def labels(shared: Path) -> pd.DataFrame:
    "The audit of the sample on which the models of the gate were trained, without gold."
    made = models(shared)
    return audit_out_of_fold(load_out_of_fold(made / "correct out_of_fold"), read_catalog(made / "catalog").labelled)

def planted_rows(labels: pd.DataFrame) -> np.ndarray: # (n,) bool, in the order of the ranking
    "Which of the ranked labels are planted errors."
    return labels["productid"].isin(list(planted_errors(PRODUCTS))).to_numpy()

def chance(planted: np.ndarray) -> float: # (n,) bool, in the order of a ranking
    "The probability that a random order has at least as many planted errors at the top."
    n = int(planted.sum())
    return float(hypergeom.sf(planted[:n].sum() - 1, len(planted), n, n))

def test_planted_errors_are_at_the_top(labels: pd.DataFrame) -> None:
    planted = planted_rows(labels)
    n = planted.sum()
    assert n >= 10
    assert planted[:n].mean() >= 3 * planted.mean(), "precision in the first n labels, against the base rate"
    assert chance(planted) < .001, "a random order has fewer"
    assert planted[labels["suspect"]].sum() >= n / 3, "the others do not show in the text"

def test_a_random_order_fails_the_same_test(labels: pd.DataFrame) -> None:
    planted, rng = planted_rows(labels), np.random.default_rng(0)
    assert np.mean([chance(rng.permutation(planted)) < .001 for _ in range(500)]) < .01

def test_suggests_the_true_type(labels: pd.DataFrame) -> None:
    truth = planted_errors(PRODUCTS)
    top = labels[labels["suspect"] & labels["productid"].isin(list(truth))]
    right = [truth[pid] == code for pid, code in zip(top["productid"], top["suggested"], strict=True)]
    assert len(top) and np.mean(right) >= .6

def test_each_product_is_counted_once(labels: pd.DataFrame) -> None:
    assert labels["row"].is_unique and labels["row"].max() < PRODUCTS
    counted = len(labels) + labels.attrs["left_out"]
    assert .7 * PRODUCTS < counted < .8 * PRODUCTS, "all but gold and its near duplicates"
    assert (labels["given"] != labels["suggested"]).all() and labels["quality"].between(0, 1).all()

def test_audits_a_catalogue_of_few_types() -> None:
    y = np.array([3] * 20 + [26] * 20 + [7] * 2)
    p = np.full((len(y), 27), .001)
    p[np.arange(len(y)), y] = np.linspace(.6, .9, len(y))
    p[0, [3, 26]] = .00001, .97
    labels = audit_labels(y, p / p.sum(1, keepdims=True))
    assert labels["row"][0] == 0 and labels["suspect"].sum() == 1 and labels["suggested"][0] == CODES[26]
    assert len(labels) == 40 and "; 2 products of types with too few" in audit_summary(labels)
    assert set(audit_labels(y, p, params=AuditParams(min_class_rows=2))["given"]) == {CODES[3], CODES[7], CODES[26]}

@pytest.mark.parametrize("rows", [0, 1, 9])
def test_one_type_has_no_suspects(rows: int) -> None:
    assert len(audit_labels(np.zeros(rows, int), np.full((rows, 27), 1 / 27))) == 0

def test_audits_labels_to_which_the_model_gives_no_probability() -> None:
    y, p = np.arange(4).repeat(6), np.zeros((24, 27))
    p[:, 20] = 1 # all probability is on a type that no product has
    assert len(audit_labels(y, p)) == 24

def test_written_cells_are_not_formulas(tmp_path: Path) -> None:
    y, p = np.array([0] * 9 + [1] * 9), np.full((18, 27), .01)
    p[np.arange(18), y] = .7
    p[4, [0, 1]] = .00001, .9
    products = make_products(["=HYPERLINK(1)"] * 18, productid=[str(i) for i in range(18)])
    write_audit(tmp_path / "audit.csv", audit_labels(y, p, products))
    lines = pd.read_csv(tmp_path / "audit.csv", dtype=str)
    assert lines["title"].tolist() == ["'=hyperlink(1)"] and lines["productid"].tolist() == ["4"]
    assert [f.name for f in tmp_path.iterdir()] == ["audit.csv"]

def test_rejects_a_catalogue_that_is_too_small() -> None:
    few = make_products([f"objet {i}" for i in range(20)], prdtypecode=[10, 40] * 10)
    with pytest.raises(TooLittleData):
        audit_catalog(Catalog(Path("few"), few, np.full(20, False)), experts="text_linear")

def test_the_command_writes_the_suspect_labels(shared: Path, rakuten: Run, tmp_path: Path) -> None:
    made, out = models(shared), tmp_path / "audit.csv"
    answer = rakuten("audit", made / "catalog", "--bundle", made / "correct", "--out", out, "--limit", 3)
    assert answer.returncode == 0, answer.stderr
    lines = pd.read_csv(out)
    assert f"{len(lines)} suspicious labels" in answer.stdout and "audited labels look wrong" in answer.stdout
    assert len(lines) > 0

def test_the_command_rejects_bundle_and_experts_together(shared: Path, rakuten: Run, tmp_path: Path) -> None:
    made, out = models(shared), tmp_path / "no.csv"
    options = ("--bundle", made / "correct", "--experts", "text_linear")
    answer = rakuten("audit", made / "catalog", "--out", out, *options)
    assert answer.returncode == 2 and "found both" in answer.stderr and not out.exists()
