"The gate lets an honest model through, refuses one that learned from shuffled labels, and says what it cannot judge."
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
from rakuten_nb.evaluation.gate import GateDecision, GateParams, floors, gate
from rakuten_nb.models.bundle import Bundle, fingerprints, load_bundle
from rakuten_nb.params import read_section

LENIENT = GateParams(weighted_f1=.3, ece=.4, behaviour=BehaviourParams(rows=40, memory=1, typical=.3)) # what both models reach: only the champion decides
CHAMPION = "no worse than the champion"

@pytest.fixture(scope="module")
def catalog(shared: Path) -> Catalog:
    "What both models learned from, gold excepted."
    return read_catalog(models(shared) / "catalog")

@pytest.fixture(scope="module")
def honest(shared: Path) -> Bundle:
    "A model that learned from the labels as they are."
    return load_bundle(models(shared) / "honest")

@pytest.fixture(scope="module")
def misled(shared: Path) -> Bundle:
    "A model that learned from three shuffled labels in ten."
    return load_bundle(models(shared) / "misled")

def failed(verdict: GateDecision) -> list[str]:
    "What it failed."
    return [c.check for c in verdict.checks if c.passed is False]

def test_an_honest_model_passes_against_itself(catalog: Catalog, honest: Bundle) -> None:
    verdict = gate(honest, catalog, LENIENT, SPLIT, champion=honest)
    assert verdict.passed and failed(verdict) == [] and verdict.model == verdict.champion == honest.version
    assert verdict.rows["judged"] == verdict.rows["gold"] > 150 and verdict.rows["known"] == 0

def test_shuffled_labels_are_refused_by_the_champion_alone(catalog: Catalog, honest: Bundle, misled: Bundle) -> None:
    assert failed(gate(misled, catalog, LENIENT, SPLIT, champion=honest)) == [CHAMPION]
    assert gate(misled, catalog, LENIENT, SPLIT, champion=misled).passed, "not because of what it is, but because there is a better one"
    assert gate(honest, catalog, LENIENT, SPLIT, champion=misled).passed

def test_shuffled_labels_are_refused_by_the_floors_alone(catalog: Catalog, honest: Bundle, misled: Bundle) -> None:
    params = GateParams(behaviour=BehaviourParams(rows=40))
    refused = failed(gate(misled, catalog, params, SPLIT))
    assert {"weighted F1 on gold", "calibration error on gold"} <= set(refused) and CHAMPION not in refused
    assert not set(failed(gate(honest, catalog, params, SPLIT))) & {"calibration error on gold", "types never recognised"}

def test_a_model_that_learned_gold_has_nothing_to_show(catalog: Catalog, honest: Bundle) -> None:
    knowing = replace(honest, trained=np.unique(fingerprints(catalog.labelled)), version="knowing")
    with pytest.raises(InputError, match=r"model knowing has learned from .* gold products.*--keep-gold"): gate(knowing, catalog, LENIENT, SPLIT)
    with pytest.raises(InputError, match="champion knowing has learned"): gate(honest, catalog, LENIENT, SPLIT, champion=knowing)

def test_what_one_of_them_knows_is_left_out_for_both(catalog: Catalog, honest: Bundle) -> None:
    gold = catalog.labelled[is_gold(catalog.labelled, SPLIT.gold_share)]
    knowing = replace(honest, trained=np.unique(np.concatenate([honest.trained, fingerprints(gold[:40])])))
    verdict = gate(honest, catalog, LENIENT, SPLIT, champion=knowing)
    assert verdict.rows == {"gold": len(gold), "known": 40, "judged": len(gold) - 40}

def test_what_nobody_sees_is_no_question(catalog: Catalog, honest: Bundle) -> None:
    products, before = catalog.products[:], gate(honest, catalog, LENIENT, SPLIT).rows["gold"]
    gold = np.flatnonzero(is_gold(products, SPLIT.gold_share) & ~catalog.is_test)[:30]
    products.title, products.description, products.picture = products.title.copy(), products.description.copy(), products.picture.copy()
    products.title[gold] = products.description[gold] = ""
    products.picture[gold] = b"a picture that a text model does not look at"
    assert gate(honest, replace(catalog, products=products), LENIENT, SPLIT).rows["gold"] <= before - 30

def test_too_few_gold_products_are_no_judgement(catalog: Catalog, honest: Bundle) -> None:
    with pytest.raises(TooLittleData, match="at least 5,000 gold products"): gate(honest, catalog, GateParams(min_rows=5000), SPLIT)
    with pytest.raises(TooLittleData): gate(honest, replace(catalog, products=catalog.products[:0], is_test=catalog.is_test[:0]), LENIENT, SPLIT)

def test_a_type_that_is_never_recognised_is_named() -> None:
    y = np.arange(27).repeat(12)
    blind = np.eye(27)[np.where(y == 23, 22, y)]
    check = floors(y, blind, GateParams())[2]
    assert check.passed is False and check.words == "2583"
    assert floors(y, blind, GateParams(min_class_rows=13))[2].passed is None, "of so few products nothing is asked"

def test_unknown_parameters_are_refused(tmp_path: Path) -> None:
    (params := tmp_path / "params.yaml").write_text("gate: {weighted_f1: 0.5, behaviour: {words: {2583: piscine}}}")
    assert read_section(params, "gate", GateParams).behaviour.words == {2583: "piscine"}
    for section, said in (("{f1: 0.5}", "gate.f1: is not known; expected weighted_f1"), ("{weighted_f1: 7}", "gate.weighted_f1"),
                          ("{behaviour: {words: {99: chat}}}", "gate.behaviour.words: .*99 is no product type"),
                          ("{behaviour: {unchanged: {mirrored: 1}}}", "'mirrored' is not known"),
                          ("{behaviour: {unchanged: {HTML: 99}}}", "gate.behaviour.unchanged.HTML: .*found '99'"),
                          ("{behaviour: {unchanged: {HTML: .nan}}}", "gate.behaviour.unchanged.HTML"),
                          ("{behaviour: {words: {2583: ''}}}", "gate.behaviour.words.2583"), ("{weighted_f1: true}", "gate.weighted_f1"),
                          ("{behaviour: {typcal: 1}}", "gate.behaviour.typcal: is not known; expected rows, unchanged")):
        params.write_text(f"gate: {section}")
        with pytest.raises(InputError, match=said): read_section(params, "gate", GateParams)
    with pytest.raises(ValidationError): GateParams(tolerance=-1)

def test_the_command_answers_by_its_exit_code(shared: Path, rakuten: Run, tmp_path: Path) -> None:
    made, out = models(shared), tmp_path / "verdict.json"
    wanted = "gate: {weighted_f1: 0.4, ece: 0.3, behaviour: {rows: 50, memory: 1}}\naudit: {min_class_rows: 4}\n"
    (params := tmp_path / "params.yaml").write_text((made / "params.yaml").read_text() + wanted)
    for bundle, code in (("honest", 0), ("misled", 3)):
        answer = rakuten("gate", made / bundle, made / "catalog", "--champion", made / "honest", "--params", params, "--json", out)
        assert answer.returncode == code, answer.stderr
        verdict = json.loads(out.read_text())
        assert verdict["passed"] == (code == 0) and verdict["params"]["weighted_f1"] == .4
        assert verdict["champion_version"] == load_bundle(made / "honest").version
        assert CHAMPION in answer.stdout
    assert "is refused" in answer.stderr and len(answer.stderr.splitlines()) == 1
