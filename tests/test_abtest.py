"Assignment is sticky and fair, estimates state their uncertainty, and an experiment ends as its rule says."
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from rakuten_nb.data.catalog import Product
from rakuten_nb.errors import InputError
from rakuten_nb.evaluation.abtest import (
    AbtestParams,
    CanaryEvidence,
    GuardrailParams,
    ShadowEvidence,
    VariantHealth,
    confidence_sequence,
    decide,
    mean_bounds,
    proportion_bounds,
    violated_guardrails,
)
from rakuten_nb.evaluation.assignment import (
    answer_key,
    assigned_challenger,
    drawn_disagreement,
    in_audit,
    label_probability,
    product_key,
    uniform,
)
from rakuten_nb.evaluation.estimates import audit_accuracy, audit_estimate, estimated_accuracy, estimated_by_type
from rakuten_nb.metrics import calibration_reference
from rakuten_nb.models.training import read_params
from rakuten_nb.params import read_section
from rakuten_nb.store.products import product_columns

KEYS = [f"id:{3_000_000 + i}" for i in range(100_000)]
PARAMS = AbtestParams()
HEALTHY = VariantHealth(2000, 2, 300, .05)
HEALTH = {"champion": HEALTHY, "challenger": HEALTHY}

# --- assignment

def drawn(experiment: str, share: float) -> np.ndarray:
    "Which of the keys the challenger of an experiment answers."
    return np.array([assigned_challenger(experiment, key, share) for key in KEYS])

def chi_square(a: np.ndarray, b: np.ndarray) -> float:
    "Chi-square statistic of two draws over the same keys."
    observed = np.array([[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]])
    expected = observed.sum(1, keepdims=True) * observed.sum(0) / observed.sum()
    return float(((observed - expected)**2 / expected).sum())

def test_a_tenth_of_the_products_is_a_tenth() -> None:
    assert .097 <= drawn("exp-1", .1).mean() <= .103
    assert drawn("exp-1", 1).all() and not drawn("exp-1", 0).any()

def test_the_assignment_of_a_product_never_changes() -> None:
    # A change of these figures moves products between the variants of running experiments.
    assert uniform("variant:exp-1", "id:3804725264") == 0.5595474186078475
    first = drawn("exp-1", .1)
    assert (first == drawn("exp-1", .1)).all() and drawn("exp-1", .2)[first].all()

def test_experiments_audit_and_disagreements_are_drawn_independently() -> None:
    first = drawn("exp-1", .1)
    others = (drawn("exp-2", .1), np.array([drawn_disagreement("exp-1", key, .1) for key in KEYS]),
              np.array([in_audit(answer_key("r", key), .1) for key in KEYS]))
    assert [round(chi_square(first, other), 1) for other in others if chi_square(first, other) > 6.63] == []

@pytest.mark.parametrize("key", ["", " ", "\0", "\udcff", "é" * 100_000])
def test_any_text_is_a_key(key: str) -> None:
    assert 0 <= uniform("s", key) < 1 and 0 <= uniform(key, "k") < 1 and uniform("s", key) != uniform("t", key)

def test_the_largest_hash_is_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Largest:
        def digest(self) -> bytes: return b"\xff" * 32
    monkeypatch.setattr("rakuten_nb.evaluation.assignment.hashlib.sha256", lambda _: Largest())
    assert uniform("s", "k") < 1

@pytest.mark.parametrize("product", [
    Product("Livre", "état neuf", b"a picture"), Product("a\0b"), Product(), Product("\udcff")])
def test_a_product_without_id_has_the_content_hash_of_the_store(product: Product, tmp_path: Path) -> None:
    stored = product_columns(tmp_path, product, datetime.now(UTC))["content"]
    assert product_key(product) == f"content:{stored}"

def test_a_product_with_an_id_is_its_id() -> None:
    assert product_key(Product("Livre", productid="12")) == product_key(Product("Poupée", productid="12")) == "id:12"

def test_the_probability_of_a_label_is_that_of_either_draw() -> None:
    either = [in_audit(answer_key("r", k), .1) or drawn_disagreement("e", k, .25) for k in KEYS]
    assert abs(np.mean(either) - label_probability(.1, .25)) < .005

# --- estimates

def audits(accuracy: float, labels: int, runs: int = 300) -> np.ndarray: # (runs, 2): holds, width
    "Audits of a calibrated model."
    rng, rows = np.random.default_rng(labels), []
    for _ in range(runs):
        confidence = rng.beta(2 * accuracy, 2 * (1 - accuracy), 2000)
        right = rng.random(labels) < confidence[:labels]
        e = audit_accuracy(right, confidence[:labels], confidence)
        plain = audit_accuracy(right, np.zeros(labels), np.zeros(2000)) # without information: Wilson's interval
        assert None not in (e.low, e.high, plain.low, plain.high)
        rows.append([e.low <= accuracy <= e.high, (e.high - e.low) / (plain.high - plain.low)]) # type: ignore[operator]
    return np.array(rows)

@pytest.mark.parametrize("accuracy", [.7, .9])
@pytest.mark.parametrize("labels", [30, 150])
def test_the_interval_of_an_audit_holds_and_is_narrower_than_wilsons(accuracy: float, labels: int) -> None:
    holds, width = audits(accuracy, labels).mean(0)
    assert holds >= .93 and width < .9

def test_an_audit_never_claims_certainty() -> None:
    for right in (np.ones(1), np.ones(30), np.zeros(30)):
        e = audit_accuracy(right, np.full(len(right), .9), np.full(500, .9))
        assert e.low is not None and e.high is not None and e.high - e.low > .1 and 0 <= e.low <= e.high <= 1
    assert audit_accuracy([], [], np.full(500, .9)).value is None # type: ignore[arg-type]

def test_an_audit_follows_the_confidence_of_the_other_answers() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(400)
    right = rng.random(400) < confidence
    low, high = (audit_estimate(right, confidence, 100_000, mean).value for mean in (.3, .7))
    assert low is not None and high is not None and abs(low - .3) < .06 and abs(high - .7) < .06

def overconfident(n: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]: # labels (n,), probabilities (n, 3)
    "Rows whose confidence exceeds the accuracy by ten points."
    rng = np.random.default_rng(seed)
    top = rng.uniform(.5, .99, n)
    pred = rng.integers(3, size=n)
    p = np.where(np.eye(3, dtype=bool)[pred], top[:, None], ((1 - top) / 2)[:, None])
    return np.where(rng.random(n) < top - .1, pred, (pred + 1) % 3), p

def test_the_estimate_without_labels_corrects_an_overconfident_model() -> None:
    y, p = overconfident()
    reference = json.loads(json.dumps(calibration_reference(y, p, [10, 40, 50], np.arange(len(y)) >= 3000)))
    window, q = overconfident(1000, 1)
    high = q.max(1) > .8 # a shift: confident answers only
    e = estimated_accuracy(q.max(1)[high], np.array([10, 40, 50])[q.argmax(1)][high], reference)
    truth = (q.argmax(1) == window)[high].mean()
    assert e is not None and e.value is not None and e.low is not None and e.high is not None
    assert abs(e.value - truth) < .03 and q.max(1)[high].mean() - truth > .07 and e.low < truth < e.high

def test_the_holdout_of_a_reference_moves_the_estimate() -> None:
    y, p = overconfident()
    worse = np.where((np.arange(len(y)) >= 2000) & (np.arange(len(y)) % 5 == 0), (p.argmax(1) + 1) % 3, y)
    plain, apart = (calibration_reference(rows, p, [10, 40, 50], np.arange(len(y)) >= 2000) for rows in (y, worse))
    a, b = (estimated_accuracy(p.max(1), None, reference) for reference in (plain, apart))
    assert a and b and a.value is not None and b.value is not None and .08 < a.value - b.value < .15

def test_a_bundle_without_a_reference_has_no_estimate() -> None:
    assert estimated_accuracy(np.full(9, .8), None, None) is None
    assert estimated_by_type(np.full(9, .8), np.full(9, 10), None) == {}

# --- intervals at all looks

def test_a_confidence_sequence_only_shrinks_and_holds_its_mean() -> None:
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(60):
        low, high = confidence_sequence((rng.random(300) < .7).astype(float))
        assert (np.diff(low) >= 0).all() and (np.diff(high) <= 0).all()
        missed += bool(low[-1] > .7 or high[-1] < .7)
    assert missed <= 4 # 5 % expected at most; above 4 of 60 with probability below 20 %

def test_the_interval_of_a_difference_depends_on_counts_alone() -> None:
    d = [1] * 40 + [0] * 20 + [-1] * 10
    assert mean_bounds(d) == mean_bounds(d[::-1]) and mean_bounds(d)[0] > 0
    assert mean_bounds([]) == (-1, 1) == mean_bounds(np.zeros(0))

def test_a_proportion_without_trials_is_unknown() -> None:
    assert proportion_bounds(0, 0) == (0, 1) and proportion_bounds(0, 5000)[1] < .005
    low, high = proportion_bounds(120, 1000)
    assert .08 < low < .12 < high < .17

# --- the rule

BETTER, WORSE = [1, 1, 0, -1] * 60, [-1, -1, 0, 1] * 60

@pytest.mark.parametrize(("evidence", "age", "decision", "reason"), [
    (ShadowEvidence(8000, 960, BETTER), 5, "promote", "is better: accuracy difference +3.0% (+0.7% to"),
    (ShadowEvidence(8000, 960, WORSE), 5, "stop", "is worse: accuracy difference -3.0%"),
    (ShadowEvidence(8000, 0, []), 5, "inconclusive", "smaller than 0.5%"),
    (ShadowEvidence(900, 110, BETTER[:20]), 5, "continue", "20 labels of 110 disagreements in 900 products"),
    (ShadowEvidence(900, 110, BETTER[:20]), 28, "inconclusive", "no decision in 28 days"),
    (ShadowEvidence(900, 110, [1] * 40), 5, "continue", "is better, but so far 40 of 50 labels"),
    (ShadowEvidence(0, 0, []), 0, "continue", "difference unknown"),
    (CanaryEvidence([True, True, False] * 900, [True] * 300), 5, "promote", "300 labels of the challenger, 2,700 of"),
    (CanaryEvidence([True] * 2700, [True, False] * 150), 5, "stop", "is worse"),
    (CanaryEvidence([], []), 5, "continue", "difference unknown")])
def test_the_rule_decides(evidence: Any, age: float, decision: str, reason: str) -> None:
    answer = decide(PARAMS, evidence, HEALTH, age)
    assert (answer.decision, "\n" in answer.reason) == (decision, False) and reason in answer.reason
    assert json.loads(json.dumps(answer.to_json())) == answer.to_json() and answer.figures["guardrails"] == []

@pytest.mark.parametrize("products", [1, 100, 1000, 3000, 100_000, 10**7])
def test_an_identical_challenger_is_never_promoted(products: int) -> None:
    decision = decide(PARAMS, ShadowEvidence(products, 0, []), HEALTH, 1).decision
    assert decision == ("inconclusive" if products >= 3000 else "continue")

def test_a_challenger_better_by_less_than_the_margin_is_not_promoted() -> None:
    evidence = ShadowEvidence(80_000, 9600, BETTER * 10)
    assert decide(PARAMS, evidence, HEALTH, 5).decision == "promote"
    assert decide(AbtestParams(margin=.06), evidence, HEALTH, 5).decision == "inconclusive"
    assert decide(AbtestParams(margin=.03), evidence, HEALTH, 5).decision == "continue"

def test_a_violated_guardrail_stops_a_better_challenger() -> None:
    slow = HEALTH | {"challenger": VariantHealth(2000, 2, 300, .5)}
    answer = decide(PARAMS, ShadowEvidence(8000, 960, BETTER), slow, 5)
    assert answer.decision == "stop"
    assert answer.reason.startswith("guardrail violated: latency: 95th percentile 0.500 s")
    assert answer.figures["guardrails"] == violated_guardrails(PARAMS.guardrails, slow["challenger"], HEALTHY)

def test_a_promotion_waits_for_answers_that_the_guardrails_need() -> None:
    answer = decide(PARAMS, ShadowEvidence(8000, 960, BETTER), {"champion": HEALTHY}, 5)
    assert answer.decision == "continue" and "0 of 200 answers for the guardrails" in answer.reason

@pytest.mark.parametrize(("challenger", "text"), [
    (VariantHealth(500, 40, 70, .05), "errors: 8.0% of 500 answers"),
    (VariantHealth(500, 0, 240, .05), "review: 48.0% of 500 answers"),
    (VariantHealth(500, 0, 70, .3), "latency: 95th percentile 0.300 s; expected at most 0.100 s (champion 0.050 s)"),
    (VariantHealth(500, 0, 70, .099), ""), (VariantHealth(500, 7, 100, None), ""), (VariantHealth(199, 199, 0, 9), "")])
def test_guardrails_name_what_is_violated(challenger: VariantHealth, text: str) -> None:
    texts = violated_guardrails(GuardrailParams(), challenger, HEALTHY)
    assert len(texts) == bool(text) and all(t.startswith(text) and "expected at most" in t for t in texts)

def test_a_fault_of_both_variants_violates_no_guardrail() -> None:
    broken = VariantHealth(500, 200, 0, 1.5)
    assert violated_guardrails(GuardrailParams(), broken, broken) == []
    assert len(violated_guardrails(GuardrailParams(), broken, VariantHealth())) == 1 # the champion is not known

@pytest.mark.parametrize("wrong", [(10, 11, []), (10, 1, [1, 1]), (10, 2, [1, 2])])
def test_evidence_that_cannot_be_is_refused(wrong: tuple[int, int, list[int]]) -> None:
    with pytest.raises(ValueError, match="expected"): ShadowEvidence(*wrong)

# --- the rule in the long run; the notebook has more runs

def end(difference: float, seed: int, labels: int) -> str:
    "How an experiment with 12 % disagreement ends, with a look after every tenth label."
    effect = difference / .12
    p = [(.75 + effect) / 2, (.75 - effect) / 2, .25]
    d = np.random.default_rng(seed).choice([1, -1, 0], labels, p=p).tolist()
    for n in range(10, labels + 1, 10):
        decision = decide(PARAMS, ShadowEvidence(n * 32, n * 4, d[:n]), HEALTH, 1).decision
        if decision != "continue": return decision
    return "continue"

def test_looking_often_does_not_promote_an_equal_challenger() -> None:
    ends = [end(0, seed, 500) for seed in range(60)]
    assert ends.count("promote") <= 3 and ends.count("continue") >= 54

def test_three_points_are_found_within_the_stated_labels() -> None:
    assert [end(.03, seed, 250) for seed in range(40)].count("promote") >= 32
    assert [end(-.03, seed, 500) for seed in range(40)].count("stop") >= 38

# --- parameters and imports

@pytest.mark.parametrize(("text", "parts"), [
    ("{margin: -0.01}", ("abtest.margin", "greater than or equal to 0", "'-0.01'")),
    ("{alpha: 0.7}", ("abtest.alpha", "less than 0.5")), ("{mode: both}", ("abtest.mode", "'shadow' or 'canary'")),
    ("{shares: 1}", ("abtest.shares", "expected mode, shadow_share")),
    ("[1]", ("abtest", "expected names with values")),
    ("{guardrails: {max_errors: 1}}", ("abtest.guardrails.max_errors", "min_answers, max_error_share"))])
def test_a_wrong_parameter_is_one_line(text: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    (path := tmp_path / "params.yaml").write_text(f"abtest: {text}", encoding="utf-8")
    with pytest.raises(InputError) as e: read_section(path, "abtest", AbtestParams)
    assert "\n" not in str(e.value) and all(part in str(e.value) for part in ("params.yaml", *parts))

def test_the_file_of_the_project_has_the_defaults() -> None:
    assert read_section(ROOT / "params.yaml", "abtest", AbtestParams) == AbtestParams()
    assert read_params(ROOT / "params.yaml").seed == 0, "the section is known to training"

def test_an_experiment_can_hold_a_copy_of_its_rule() -> None:
    rule = AbtestParams(mode="canary", margin=.01)
    assert AbtestParams.model_validate(json.loads(json.dumps(rule.model_dump(mode="json")))) == rule
    assert (rule.share_of(), rule.share_of("shadow")) == (.1, 1)

def test_the_modules_load_no_heavy_library() -> None:
    modules = "assignment", "estimates", "abtest"
    code = "import sys\n" + "\n".join(f"import rakuten_nb.evaluation.{m}" for m in modules)
    code += "\nprint(*{n.split('.')[0] for n in sys.modules})"
    names = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"tensorflow", "keras", "mlflow", "matplotlib", "sklearn", "scipy"} & set(names.split())
