"The label audit finds planted errors far above chance, handles odd catalogues, and writes what can be opened safely."
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
def found(shared: Path) -> pd.DataFrame:
    "The audit of the sample that the models of the gate learned from, gold excepted."
    made = models(shared)
    return audit_out_of_fold(load_out_of_fold(made / "honest out_of_fold"), read_catalog(made / "catalog").labelled)

def planted_in(found: pd.DataFrame) -> np.ndarray: # (n,) bool, in the order of the ranking
    "Which of the ranked labels were planted."
    return found["productid"].isin(list(planted_errors(PRODUCTS))).to_numpy()

def by_chance(hit: np.ndarray) -> float: # (n,) bool, in the order of a ranking
    "How probable it is that a random order finds as many of them as far up."
    n = int(hit.sum())
    return float(hypergeom.sf(hit[:n].sum() - 1, len(hit), n, n))

def test_planted_errors_stand_at_the_top(found: pd.DataFrame) -> None:
    hit = planted_in(found)
    n = hit.sum()
    assert n >= 10
    assert hit[:n].mean() >= 3 * hit.mean(), "precision at their number, against the base rate"
    assert by_chance(hit) < .001, "no random order does this"
    assert hit[found["suspect"]].sum() >= n / 3, "of those that cannot be seen in a text, nobody finds more"

def test_a_random_order_would_not_pass(found: pd.DataFrame) -> None:
    hit, rng = planted_in(found), np.random.default_rng(0)
    assert np.mean([by_chance(rng.permutation(hit)) < .001 for _ in range(500)]) < .01

def test_the_suggestion_is_what_the_product_is(found: pd.DataFrame) -> None:
    truth = planted_errors(PRODUCTS)
    top = found[found["suspect"] & found["productid"].isin(list(truth))]
    assert len(top) and np.mean([truth[pid] == code for pid, code in zip(top["productid"], top["suggested"], strict=True)]) >= .6

def test_nobody_is_counted_twice_or_lost(found: pd.DataFrame) -> None:
    assert found["row"].is_unique and found["row"].max() < PRODUCTS
    assert .7 * PRODUCTS < len(found) + found.attrs["left_out"] < .8 * PRODUCTS, "all but gold and its near duplicates"
    assert (found["given"] != found["suggested"]).all() and found["quality"].between(0, 1).all()

def test_a_catalogue_of_few_types_is_audited() -> None:
    y = np.array([3] * 20 + [26] * 20 + [7] * 2)
    p = np.full((len(y), 27), .001)
    p[np.arange(len(y)), y] = np.linspace(.6, .9, len(y))
    p[0, [3, 26]] = .00001, .97
    found = audit_labels(y, p / p.sum(1, keepdims=True))
    assert found["row"][0] == 0 and found["suspect"].sum() == 1 and found["suggested"][0] == CODES[26]
    assert len(found) == 40 and "; 2 products of types with too few" in audit_summary(found), "two products of a type are too few, and said"
    assert set(audit_labels(y, p, params=AuditParams(min_class_rows=2))["given"]) == {CODES[3], CODES[7], CODES[26]}

@pytest.mark.parametrize("rows", [0, 1, 9])
def test_one_type_or_none_has_no_suspects(rows: int) -> None:
    assert len(audit_labels(np.zeros(rows, int), np.full((rows, 27), 1 / 27))) == 0

def test_a_type_that_no_model_can_imagine_does_not_stop_it() -> None:
    y, p = np.arange(4).repeat(6), np.zeros((24, 27))
    p[:, 20] = 1 # all the weight on a type that nobody carries
    assert len(audit_labels(y, p)) == 24

def test_cells_are_no_formulas(tmp_path: Path) -> None:
    y, p = np.array([0] * 9 + [1] * 9), np.full((18, 27), .01)
    p[np.arange(18), y] = .7
    p[4, [0, 1]] = .00001, .9
    products = make_products(["=HYPERLINK(1)"] * 18, productid=[str(i) for i in range(18)])
    write_audit(tmp_path / "audit.csv", audit_labels(y, p, products))
    lines = pd.read_csv(tmp_path / "audit.csv", dtype=str)
    assert lines["title"].tolist() == ["'=hyperlink(1)"] and lines["productid"].tolist() == ["4"]
    assert [f.name for f in tmp_path.iterdir()] == ["audit.csv"]

def test_too_little_is_said() -> None:
    few = make_products([f"objet {i}" for i in range(20)], prdtypecode=[10, 40] * 10)
    with pytest.raises(TooLittleData): audit_catalog(Catalog(Path("few"), few, np.full(20, False)), experts="text_linear")

def test_the_command_writes_the_list(shared: Path, rakuten: Run, tmp_path: Path) -> None:
    made = models(shared)
    answer = rakuten("audit", made / "catalog", "--bundle", made / "honest", "--out", tmp_path / "audit.csv", "--limit", 3)
    assert answer.returncode == 0, answer.stderr
    lines = pd.read_csv(tmp_path / "audit.csv")
    assert f"{len(lines)} suspicious labels" in answer.stdout and "audited labels look wrong" in answer.stdout and len(lines) > 0
    answer = rakuten("audit", made / "catalog", "--out", tmp_path / "no.csv", "--bundle", made / "honest", "--experts", "text_linear")
    assert answer.returncode == 2 and "found both" in answer.stderr and not (tmp_path / "no.csv").exists()
