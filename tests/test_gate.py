"The gate accepts a model of correct labels, refuses one of shuffled labels, and rejects data that cannot decide."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from gate_models import SPLIT, models
from pydantic import ValidationError

from rakuten_nb.data.catalog import Catalog, read_catalog
from rakuten_nb.data.split import is_gold
from rakuten_nb.errors import InputError, TooLittleData
from rakuten_nb.evaluation.behaviour import BehaviourParams
from rakuten_nb.evaluation.gate import GateDecision, GateParams, failed_checks, floor_checks, gate
from rakuten_nb.models.bundle import Bundle, fingerprints, load_bundle
from rakuten_nb.params import read_section

# Both models pass these bounds, so that only the champion decides.
LENIENT = GateParams(weighted_f1=.3, ece=.4, behaviour=BehaviourParams(rows=40, memory=1, typical=.3))
CHAMPION = "no worse than the champion"

@pytest.fixture(scope="module")
def catalog(shared: Path) -> Catalog:
    "The training catalogue of both models, gold included."
    return read_catalog(models(shared) / "catalog")

@pytest.fixture(scope="module")
def correct(shared: Path) -> Bundle:
    "A model that was trained on correct labels."
    return load_bundle(models(shared) / "correct")

@pytest.fixture(scope="module")
def shuffled(shared: Path) -> Bundle:
    "A model that was trained with three shuffled labels in ten."
    return load_bundle(models(shared) / "shuffled")

def failed(decision: GateDecision) -> list[str]:
    "The names of the failed checks."
    return [c.check for c in failed_checks(decision.checks)]

def test_accepts_a_model_against_itself(catalog: Catalog, correct: Bundle) -> None:
    decision = gate(correct, catalog, LENIENT, SPLIT, champion=correct)
    assert decision.passed and failed(decision) == [] and decision.model == decision.champion == correct.version
    assert decision.rows["scored"] == decision.rows["gold"] > 150 and decision.rows["trained_on"] == 0

def test_refuses_shuffled_labels_only_because_of_the_champion(
    catalog: Catalog, correct: Bundle, shuffled: Bundle,
) -> None:
    assert failed(gate(shuffled, catalog, LENIENT, SPLIT, champion=correct)) == [CHAMPION]
    assert gate(shuffled, catalog, LENIENT, SPLIT, champion=shuffled).passed, "it passes where there is no better model"
    assert gate(correct, catalog, LENIENT, SPLIT, champion=shuffled).passed

def test_refuses_shuffled_labels_by_minimum_scores_alone(catalog: Catalog, correct: Bundle, shuffled: Bundle) -> None:
    params = GateParams(behaviour=BehaviourParams(rows=40))
    refused = failed(gate(shuffled, catalog, params, SPLIT))
    assert {"weighted F1 on gold", "calibration error on gold"} <= set(refused) and CHAMPION not in refused
    accepted = {"calibration error on gold", "types never recognised"}
    assert not set(failed(gate(correct, catalog, params, SPLIT))) & accepted

def test_rejects_a_model_that_was_trained_on_gold(catalog: Catalog, correct: Bundle) -> None:
    trained = replace(correct, trained=np.unique(fingerprints(catalog.labelled)), version="trained")
    with pytest.raises(InputError, match=r"model trained was trained on .* gold products.*--keep-gold"):
        gate(trained, catalog, LENIENT, SPLIT)
    with pytest.raises(InputError, match="champion trained was trained on"):
        gate(correct, catalog, LENIENT, SPLIT, champion=trained)

def test_training_products_of_one_model_are_left_out_for_both(catalog: Catalog, correct: Bundle) -> None:
    gold = catalog.labelled[is_gold(catalog.labelled, SPLIT.gold_share)]
    trained = np.unique(np.concatenate([correct.trained, fingerprints(gold[:40])]))
    decision = gate(correct, catalog, LENIENT, SPLIT, champion=replace(correct, trained=trained))
    assert decision.rows == {"gold": len(gold), "trained_on": 40, "scored": len(gold) - 40}

def test_products_that_no_model_sees_are_left_out(catalog: Catalog, correct: Bundle) -> None:
    products, before = catalog.products[:], gate(correct, catalog, LENIENT, SPLIT).rows["gold"]
    gold = np.flatnonzero(is_gold(products, SPLIT.gold_share) & ~catalog.is_test)[:30]
    products.title, products.description = products.title.copy(), products.description.copy()
    products.picture = products.picture.copy()
    products.title[gold] = products.description[gold] = ""
    products.picture[gold] = b"a picture, which a text model does not see"
    assert gate(correct, replace(catalog, products=products), LENIENT, SPLIT).rows["gold"] <= before - 30

def test_rejects_too_few_gold_products(catalog: Catalog, correct: Bundle) -> None:
    with pytest.raises(TooLittleData, match="at least 5,000 gold products"):
        gate(correct, catalog, GateParams(min_rows=5000), SPLIT)
    empty = replace(catalog, products=catalog.products[:0], is_test=catalog.is_test[:0])
    with pytest.raises(TooLittleData): gate(correct, empty, LENIENT, SPLIT)

def test_names_a_type_that_is_never_recognised() -> None:
    y = np.arange(27).repeat(12)
    blind = np.eye(27)[np.where(y == 23, 22, y)]
    check = floor_checks(y, blind, GateParams())[2]
    assert check.passed is False and check.detail == "2583"
    few = floor_checks(y, blind, GateParams(min_class_rows=13))[2]
    assert few.passed is None, "types with too few products are not tested"

@pytest.fixture
def params_file(tmp_path: Path) -> Path:
    "Where a test writes its parameters."
    return tmp_path / "params.yaml"

def test_reads_the_parameters_of_behaviour(params_file: Path) -> None:
    params_file.write_text("gate: {weighted_f1: 0.5, behaviour: {words: {2583: piscine}}}")
    assert read_section(params_file, "gate", GateParams).behaviour.words == {2583: "piscine"}

@pytest.mark.parametrize(("section", "error"), [
    ("{f1: 0.5}", "gate.f1: is not known; expected weighted_f1"),
    ("{weighted_f1: 7}", "gate.weighted_f1"),
    ("{weighted_f1: true}", "gate.weighted_f1"),
    ("{behaviour: {typcal: 1}}", "gate.behaviour.typcal: is not known; expected rows, unchanged"),
    ("{behaviour: {words: {99: chat}}}", "gate.behaviour.words: .*99 is not a product type"),
    ("{behaviour: {words: {2583: ''}}}", "gate.behaviour.words.2583"),
    ("{behaviour: {unchanged: {mirrored: 1}}}", "'mirrored' is not known"),
    ("{behaviour: {unchanged: {HTML: 99}}}", "gate.behaviour.unchanged.HTML: .*found '99'"),
    ("{behaviour: {unchanged: {HTML: .nan}}}", "gate.behaviour.unchanged.HTML"),
])
def test_rejects_a_wrong_parameter_and_names_it(section: str, error: str, params_file: Path) -> None:
    params_file.write_text(f"gate: {section}")
    with pytest.raises(InputError, match=error): read_section(params_file, "gate", GateParams)

def test_rejects_a_negative_tolerance() -> None:
    with pytest.raises(ValidationError): GateParams(tolerance=-1)

def test_the_command_exits_with_0_or_3(shared: Path, rakuten: Run, tmp_path: Path, params_file: Path) -> None:
    made, out = models(shared), tmp_path / "decision.json"
    sections = "gate: {weighted_f1: 0.4, ece: 0.3, behaviour: {rows: 50, memory: 1}}\naudit: {min_class_rows: 4}\n"
    params_file.write_text((made / "params.yaml").read_text() + sections)
    options = ("--champion", made / "correct", "--params", params_file, "--json", out)
    for bundle, code in (("correct", 0), ("shuffled", 3)):
        answer = rakuten("gate", made / bundle, made / "catalog", *options)
        assert answer.returncode == code, answer.stderr
        decision = json.loads(out.read_text())
        assert decision["passed"] == (code == 0) and decision["params"]["weighted_f1"] == .4
        assert decision["champion_version"] == load_bundle(made / "correct").version
        assert CHAMPION in answer.stdout
    assert "is refused" in answer.stderr and len(answer.stderr.splitlines()) == 1
