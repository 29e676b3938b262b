"Explanations are exact where possible, faithful to the model, and safe to display."
import csv
import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from api_process import ApiProcess
from conftest import Run

from rakuten_nb.data.catalog import Products, make_products, read_catalog
from rakuten_nb.data.clean import clean_text
from rakuten_nb.data.picture import picture_bytes
from rakuten_nb.evaluation.explain import Explanation, explain, explanation_text, plain_token, strongest_tokens
from rakuten_nb.models.bundle import COLUMNS, Bundle, fingerprints, load_bundle
from rakuten_nb.models.experts import Expert, expert_class
from rakuten_nb.models.fusion import Fusion, Pattern
from rakuten_nb.taxonomy import CODES

MALICIOUS = (
    "<script>alert('é')</script> <img/src=x onerror=alert(1)> piscine & [x](javascript:alert(1)) **gras** "
    "<img/src=x/onerror=alert(2)// ronde vis < 5"
)

@pytest.fixture(scope="module")
def model(bundle: Path) -> Bundle:
    "The bundle of a text expert and an image expert."
    return load_bundle(bundle)

@pytest.fixture(scope="module")
def products(sample_catalog: Path) -> Products:
    "Products that the bundle was not trained on."
    return read_catalog(sample_catalog).split("test")

def of_modality(model: Bundle, modality: str) -> list[Expert]:
    "The experts of a modality."
    return [e for e in model.experts.values() if e.modality == modality]

def only_text(products: Products, row: int) -> Products:
    "A product without its picture."
    return make_products([products.title[row]], [products.description[row]])

def attributed_contrast(e: Explanation) -> float:
    "The sum of the contrasts of tokens, regions and rests."
    in_pictures = sum(float(np.sum(p.contrast)) for p in e.pictures)
    return sum(w.contrast for w in e.words) + in_pictures + sum(x.rest.contrast for x in e.experts)

def log_odds(e: Explanation) -> float:
    "The sum of the contrasts of experts and biases."
    return sum(x.contrast for x in e.experts) + e.bias.contrast

# --- the sums are exact

def log_proba(expert: Expert, title: str, description: str) -> np.ndarray: # (27,)
    "Log-probabilities of a text."
    return np.log(expert.head(expert.embed(make_products([title], [description])))[0].astype(float))

def test_token_evidence_and_biases_sum_to_the_log_probabilities(model: Bundle, products: Products) -> None:
    exact = [e for e in of_modality(model, "text") if e.token_evidence("piscine", "")]
    assert exact, "the linear expert attributes exactly"
    texts = [*zip(products.title, products.description, strict=True), (MALICIOUS, ""), ("", "mot " * 3000)]
    for expert in exact:
        biases = log_proba(expert, "", "")
        for title, description in [*texts, ("Été² " * 9, "l'ÉTÉ, été!")]:
            attribution = expert.token_evidence(title, description)
            assert attribution is not None
            gap = attribution[1].sum(0) - (log_proba(expert, title, description) - biases)
            assert np.ptp(gap) < 1e-4, "the gap is the same for all types"

def test_contrasts_sum_to_the_log_odds(model: Bundle, hard_catalog: Path) -> None:
    hard = read_catalog(hard_catalog).products
    rows, explained = range(0, len(hard), 5), 0
    for i, own in zip(rows, model.predict(hard[np.array(rows)]), strict=True):
        e = explain(model, hard[[i]])
        assert e.prdtypecode == own.prdtypecode
        if e.prdtypecode is None: continue
        explained += 1
        assert e.against == own.top5[1][0] and abs(e.confidence - own.confidence) < 1e-5
        assert abs(log_odds(e) - np.log(e.confidence / e.other)) < 1e-5
        assert abs(attributed_contrast(e) - sum(x.contrast for x in e.experts)) < 1e-6
        assert {x.expert: x.share for x in e.experts} == pytest.approx(own.experts, abs=1e-6)
        for w in e.words: assert (e.title if w.field == "title" else e.description)[w.start : w.end] == w.text
        assert json.loads(json.dumps(e.to_dict(), allow_nan=False)) == e.to_dict()
    assert explained > 5

def without_attribution(model: Bundle) -> Bundle:
    "The same bundle, with experts that do not attribute their evidence themselves."
    experts: dict[str, Expert] = {}
    for name, expert in model.experts.items():
        class Occluded(type(expert)): # type: ignore[misc]
            def token_evidence(self, title: str, description: str) -> None: return None
            def regions(self, raw: bytes) -> None: return None
        experts[name] = Occluded.__new__(Occluded)
        experts[name].__dict__ = expert.__dict__
    return replace(model, experts=experts)

def test_occlusion_agrees_with_exact_token_evidence(model: Bundle, products: Products) -> None:
    short = [3 < len(t.split()) < 9 and len(d) < 150
             for t, d in zip(products.title, products.description, strict=True)]
    product = only_text(products, short.index(True))
    exact, occluded = explain(model, product), explain(without_attribution(model), product)
    assert not any(x.exact for x in occluded.experts) and all(x.exact for x in exact.experts)
    assert [(w.field, w.start, w.text) for w in occluded.words] == [(w.field, w.start, w.text) for w in exact.words]
    assert np.corrcoef([w.contrast for w in occluded.words], [w.contrast for w in exact.words])[0, 1] > 0.9

def test_occlusion_covers_sixteen_regions_of_a_picture(model: Bundle, products: Products) -> None:
    row = next(i for i in range(len(products)) if products.picture[i] is not None)
    (picture,) = explain(without_attribution(model), products[[row]]).pictures
    assert np.shape(picture.contrast) == (4, 4) and not picture.exact and np.any(picture.contrast)

# --- faithfulness

def test_removing_the_decisive_token_lowers_the_confidence(model: Bundle, products: Products) -> None:
    lower = []
    for row in np.flatnonzero(products.title != "").tolist():
        e = explain(model, only_text(products, row))
        token = max(strongest_tokens(e, 999), key=lambda pair: pair[1])[0]
        title, description = (" ".join(w for w in clean_text(text).split() if plain_token(w) != token)
                              for text in (products.title[row], products.description[row]))
        proba = model.predict(make_products([title or "?"], [description])).proba
        lower.append(proba[0, CODES.index(e.prdtypecode or 0)] < e.confidence)
    assert len(lower) > 20 and np.mean(lower) > 0.9

# --- incomplete products and few classes

def test_explains_a_text_without_a_picture(model: Bundle) -> None:
    e = explain(model, make_products(["piscine ronde"]))
    assert [w.text for w in e.words] == ["piscine", "ronde"] and e.pictures == [] and e.description == ""
    assert len(e.experts) == 1

def test_explains_a_picture_without_a_text(model: Bundle, products: Products) -> None:
    row = next(i for i in range(len(products)) if products.picture[i] is not None)
    e = explain(model, make_products([""], picture=[products.picture[row]]))
    assert e.words == [] and len(e.pictures) == 1 and explanation_text(e).startswith("picture: ")
    assert len(e.experts) == 1

@pytest.mark.parametrize("description", ["", "only a description"])
def test_has_no_answer_without_title_and_picture(model: Bundle, description: str) -> None:
    e = explain(model, make_products([""], [description]))
    assert e.prdtypecode is None and explanation_text(e) == ""
    assert "no answer" in e._repr_html_() and e.to_dict()["words"] == []

def test_explains_a_title_of_punctuation(model: Bundle) -> None:
    e = explain(model, make_products(["???"]))
    assert explanation_text(e).endswith(f"against {e.against}")

def test_explains_a_model_of_three_classes() -> None:
    codes, name = (10, 40, 2583), "text_linear"
    titles = [f"{kind} {i}" for kind in ("livre ancien", "jeu console", "piscine ronde") for i in range(6)]
    few = make_products(titles, prdtypecode=[c for c in codes for _ in range(6)])
    expert = expert_class(name)()
    expert.fit(expert.embed(few), few.label)
    fusion = Fusion([name], len(CODES), {frozenset([name]): Pattern(np.ones(1), np.zeros(len(CODES)))})
    e = explain(Bundle({name: expert}, fusion, .5, {}, fingerprints(few)), make_products(["Piscine bleue"]), codes[0])
    assert e.prdtypecode == 2583 and e.against == codes[0]
    assert abs(log_odds(e) - np.log(e.confidence / e.other)) < 1e-4
    assert strongest_tokens(e)[0][0] == "piscine" and strongest_tokens(e)[0][1] > 0

# --- display

def test_escapes_the_text_of_the_merchant(model: Bundle) -> None:
    escaped_twice = MALICIOUS.replace("<", "&amp;lt;").replace(">", "&amp;gt;")
    e = explain(model, make_products([escaped_twice + MALICIOUS]))
    page = e._repr_html_()
    allowed = {slash + tag for slash in ("", "/") for tag in ("div", "p", "b", "span", "ul", "li")}
    assert set(re.findall(r"<(/?\w+)", page)) <= allowed and not re.search(r"<[^>]*\Won\w+=", page)
    assert "&lt;img/src=x/onerror=alert(2)//" in page, "`clean_text` does not remove a tag without an end"
    assert not re.search(r"(?<!\\)[<\[]", e._repr_markdown_())

# --- the command line

def read_csv(path: Path) -> list[dict[str, str]]:
    "The rows of a CSV file."
    with path.open(encoding="utf-8", newline="") as f: return list(csv.DictReader(f))

@pytest.fixture(scope="module")
def small_catalog(sample_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Four test products, some with titles that a spreadsheet would read as formulas."
    folder = tmp_path_factory.mktemp("small")
    header = (sample_catalog / "X_test_update.csv").read_text(encoding="utf-8").splitlines()[0]
    titles = ["=SOMME(A1:A9)", "-piscine ronde 3,05 m", "", "+@console"]
    test = [header, *(f'{i},"{t}",,{i + 1},{i + 1}' for i, t in enumerate(titles))]
    (folder / "X_test_update.csv").write_text("\n".join(test) + "\n", encoding="utf-8")
    (folder / "X_train_update.csv").write_text(f"{header}\n9,Livre,,10,10\n", encoding="utf-8")
    return folder

@pytest.fixture(scope="module")
def predicted(rakuten: Run, bundle: Path, small_catalog: Path) -> Path: # plain.csv, explained.csv
    "Predictions of the small catalogue without and with `--explain`."
    for name, flags in (("plain", ()), ("explained", ("--explain",))):
        answer = rakuten("predict", bundle, small_catalog, "--out", small_catalog / f"{name}.csv", *flags)
        assert answer.returncode == 0, answer.stderr
    return small_catalog

def test_explain_appends_one_column_to_the_predictions(predicted: Path) -> None:
    lines = [(predicted / name).read_bytes().splitlines() for name in ("plain.csv", "explained.csv")]
    for short, long in zip(*lines, strict=True):
        assert long.startswith(short + b","), "only the last column is new"
    plain, explained = read_csv(predicted / "plain.csv"), read_csv(predicted / "explained.csv")
    assert list(plain[0]) == list(COLUMNS) and list(explained[0]) == [*COLUMNS, "explanation"]
    assert [{k: v for k, v in row.items() if k != "explanation"} for row in explained] == plain

def test_the_column_explains_each_predicted_product(predicted: Path) -> None:
    rows = read_csv(predicted / "explained.csv")
    for row in rows:
        assert row["explanation"][:1] not in ("=", "+", "-", "@")
        assert bool(row["explanation"]) == bool(row["prdtypecode"])
        if row["prdtypecode"]: assert row["explanation"].endswith(f"against {row['top5'].split()[1].split(':')[0]}")
    assert re.search(r"piscine [+−]\d", next(r["explanation"] for r in rows if r["productid"] == "2"))

# --- the API

@pytest.fixture(scope="module")
def marie(api: ApiProcess) -> dict[str, str]:
    "The header of an ordinary user."
    return api.token("marie")

@pytest.mark.parametrize("parts", ["title description picture", "title", "picture", "description picture"])
def test_the_api_explains_on_request(
    parts: str, api: ApiProcess, marie: dict[str, str], model: Bundle, products: Products,
) -> None:
    complete = [bool(t and d and p is not None)
                for t, d, p in zip(products.title, products.description, products.picture, strict=True)]
    i = complete.index(True)
    picture = picture_bytes(products.picture[i]) if "picture" in parts else None
    title, description = products.title[i] * ("title" in parts), products.description[i] * ("description" in parts)
    plain, explained = (api.predict(marie, title, description, picture, **fields).json()
                        for fields in ({}, {"explain": "true"}))
    assert "explanation" not in plain and set(explained) - set(plain) == {"explanation"}
    assert explained["predictions"] == plain["predictions"]
    assert explained["model_version"] == plain["model_version"] == model.version
    explanation = explained["explanation"]
    own = explain(model, make_products([title], [description], [picture])).to_dict()
    assert set(explanation) == set(own) and explanation["words"] == own["words"]
    assert [explanation[k] for k in ("prdtypecode", "against")] == [p["label"] for p in explained["predictions"][:2]]
    assert [len(explanation[k]) for k in ("experts", "pictures")] == [len(own[k]) for k in ("experts", "pictures")]

@pytest.mark.parametrize(
    ("value", "explained"), [("true", True), ("1", True), ("false", False), ("0", False), ("", False)])
def test_the_explain_field_is_a_boolean(
    value: str, explained: bool, api: ApiProcess, marie: dict[str, str],
) -> None:
    form = {"designation": "Piscine", "explain": value}
    answer = api.client.post("/predict_code", data=form, headers=marie)
    assert answer.status_code == 200 and ("explanation" in answer.json()) == explained

@pytest.mark.parametrize("value", ["yes", "oui", "2", "True ", "\0"])
def test_rejects_another_value_of_the_explain_field(value: str, api: ApiProcess, marie: dict[str, str]) -> None:
    answer = api.client.post("/predict", data={"designation": "Piscine", "explain": value}, headers=marie)
    assert answer.status_code == 422 and answer.json()["detail"].startswith("explain: expected ")

def test_rejects_two_explain_fields(api: ApiProcess, marie: dict[str, str]) -> None:
    form = {"designation": ["Jeu"], "explain": ["true", "true"]}
    assert api.client.post("/predict", data=form, headers=marie).status_code == 422

def in_parallel(send: Callable[[int], httpx.Response], n: int) -> list[httpx.Response]:
    "The responses to n simultaneous requests, in order."
    responses: dict[int, httpx.Response] = {}
    threads = [threading.Thread(target=lambda i=i: responses.update({i: send(i)})) for i in range(n)]
    for t in threads: t.start()
    for t in threads: t.join()
    return [responses[i] for i in range(n)]

def test_explanations_do_not_delay_other_predictions(api: ApiProcess, marie: dict[str, str]) -> None:
    "Of 40 simultaneous requests, every second one wants an explanation; only those may be refused as too many."
    def send(i: int) -> httpx.Response:
        form = {"designation": "Piscine ronde", "description": "mot " * 300, "explain": str(i % 2)}
        return httpx.post(f"{api.url}/predict", data=form, headers=marie, timeout=60)
    responses = in_parallel(send, 40)
    assert {r.status_code for r in responses[::2]} == {200} and {r.status_code for r in responses[1::2]} <= {200, 503}
    assert all(r.headers["retry-after"] for r in responses if r.status_code == 503)
    answers = [r.json() for r in responses if r.status_code == 200]
    assert len({a["predictions"][0]["label"] for a in answers}) == 1 and any("explanation" in a for a in answers)

@pytest.fixture(scope="module")
def openapi(api: ApiProcess) -> dict[str, Any]:
    "The OpenAPI document of the running API."
    document: dict[str, Any] = api.client.get("/openapi.json").json()
    return document

@pytest.mark.parametrize("path", ["/predict", "/predict_code"])
def test_openapi_lists_the_values_of_the_explain_field(openapi: dict[str, Any], path: str) -> None:
    form = openapi["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert set(form["properties"]["explain"]["enum"]) == {"true", "1", "false", "0"}

def test_openapi_documents_the_explanation_as_optional(openapi: dict[str, Any]) -> None:
    response = openapi["components"]["schemas"]["PredictionResponse"]
    assert "explanation" in response["properties"] and "explanation" not in response["required"]
    assert set(Explanation().to_dict()) == set(openapi["components"]["schemas"]["Explanation"]["properties"])

@pytest.mark.parametrize("name", ["Explanation", "Evidence", "ExpertEvidence", "TokenEvidence", "PictureEvidence"])
def test_openapi_describes_every_field_of_an_explanation(openapi: dict[str, Any], name: str) -> None:
    fields = openapi["components"]["schemas"][name]["properties"]
    assert fields and all(field.get("description") for field in fields.values())
