"Why a product is of one type and not of another: exact where it can be, true where it is tried, harmless wherever it is shown."
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

from rakuten_nb.data.catalog import Products, make_products, read_catalog
from rakuten_nb.data.clean import clean_text
from rakuten_nb.data.picture import picture_bytes
from rakuten_nb.evaluation.explain import Explanation, explain, explanation_text, strongest_tokens
from rakuten_nb.models.bundle import COLUMNS, Bundle, fingerprints, load_bundle
from rakuten_nb.models.experts import Expert, expert_class
from rakuten_nb.models.fusion import Fusion, Pattern
from rakuten_nb.taxonomy import CODES

EVIL = "<script>alert('é')</script> <img/src=x onerror=alert(1)> piscine & [x](javascript:alert(1)) **gras** <img/src=x/onerror=alert(2)// ronde vis < 5"

@pytest.fixture(scope="module")
def model(bundle: Path) -> Bundle:
    "The bundle of both experts."
    return load_bundle(bundle)

@pytest.fixture(scope="module")
def products(sample_catalog: Path) -> Products:
    "Products that it has not learned from."
    return read_catalog(sample_catalog).split("test")

def of_modality(model: Bundle, modality: str) -> list[Expert]:
    "The experts that look at texts, or at pictures."
    return [e for e in model.experts.values() if e.modality == modality]

def only_text(products: Products, row: int) -> Products:
    "A product without its picture."
    return make_products([products.title[row]], [products.description[row]])

def parts(e: Explanation) -> float:
    "The contrasts of all words and regions, and of what belongs to none."
    return sum(w.contrast for w in e.words) + sum(float(np.sum(p.contrast)) for p in e.pictures) + sum(x.rest.contrast for x in e.experts)

# --- the accounts are right

def test_words_and_biases_are_the_log_probabilities(model: Bundle, products: Products) -> None:
    exact = [e for e in of_modality(model, "text") if e.token_evidence("piscine", "")]
    assert exact, "the linear expert tells exactly"
    for expert in exact:
        logs = lambda title, description, expert=expert: np.log(expert.head(expert.embed(make_products([title], [description])))[0].astype(float))
        biases = logs("", "")
        for title, description in [*zip(products.title, products.description, strict=True), (EVIL, ""), ("", "mot " * 3000), ("Été² " * 9, "l'ÉTÉ, été!")]:
            found = expert.token_evidence(title, description)
            assert found is not None
            gap = found[1].sum(0) - (logs(title, description) - biases)
            assert np.ptp(gap) < 1e-4, "but for what is the same for all types"

def test_the_contrasts_are_the_log_odds(model: Bundle, hard_catalog: Path) -> None:
    hard = read_catalog(hard_catalog).products
    rows, answered = range(0, len(hard), 5), 0
    for i, own in zip(rows, model.predict(hard[np.array(rows)]), strict=True):
        e = explain(model, hard[[i]])
        assert e.prdtypecode == own.prdtypecode
        if e.prdtypecode is None: continue
        answered += 1
        assert e.against == own.top5[1][0] and abs(e.confidence - own.confidence) < 1e-5
        assert abs(sum(x.contrast for x in e.experts) + e.bias.contrast - np.log(e.confidence / e.other)) < 1e-5
        assert abs(parts(e) - sum(x.contrast for x in e.experts)) < 1e-6
        assert {x.expert: x.share for x in e.experts} == pytest.approx(own.experts, abs=1e-6)
        for w in e.words: assert (e.title if w.field == "title" else e.description)[w.start : w.end] == w.text
        assert json.loads(json.dumps(e.to_dict(), allow_nan=False)) == e.to_dict()
    assert answered > 5

def test_an_expert_that_cannot_tell_is_asked_again(model: Bundle, products: Products) -> None:
    "The same expert, made silent: leaving words out finds the same decisive word."
    row = next(i for i in range(len(products)) if 3 < len(products.title[i].split()) < 9 and len(products.description[i]) < 150)
    told = explain(model, only_text(products, row))
    silent = {}
    for name, expert in model.experts.items():
        class Silent(type(expert)): # type: ignore[misc]
            def token_evidence(self, title: str, description: str) -> None: return None
            def regions(self, raw: bytes) -> None: return None
        silent[name] = Silent.__new__(Silent)
        silent[name].__dict__ = expert.__dict__
    asked = explain(replace(model, experts=silent), only_text(products, row))
    assert not any(x.exact for x in asked.experts) and all(x.exact for x in told.experts)
    assert [(w.field, w.start, w.text) for w in asked.words] == [(w.field, w.start, w.text) for w in told.words]
    assert np.corrcoef([w.contrast for w in asked.words], [w.contrast for w in told.words])[0, 1] > 0.9
    with_picture = next(i for i in range(len(products)) if products.picture[i] is not None)
    (seen,) = explain(replace(model, experts=silent), products[[with_picture]]).pictures
    assert np.shape(seen.contrast) == (4, 4) and not seen.exact and np.any(seen.contrast)

# --- it is true

def test_without_the_decisive_word_the_answer_is_less_likely(model: Bundle, products: Products) -> None:
    fell = []
    for row in np.flatnonzero(products.title != ""):
        e = explain(model, only_text(products, row))
        word = max(strongest_tokens(e, 999), key=lambda pair: pair[1])[0]
        plain = lambda w: re.sub(r"^\W+|\W+$", "", w)
        keep = lambda text, word=word, plain=plain: " ".join(w for w in clean_text(text).split() if plain(w) != word)
        left = make_products([keep(products.title[row]) or "?"], [keep(products.description[row])])
        fell.append(model.predict(left).proba[0, CODES.index(e.prdtypecode or 0)] < e.confidence)
    assert len(fell) > 20 and np.mean(fell) > 0.9

# --- whatever there is

def test_a_text_alone_a_picture_alone_and_nothing(model: Bundle, products: Products) -> None:
    row = next(i for i in range(len(products)) if products.picture[i] is not None)
    text, picture = explain(model, make_products(["piscine ronde"])), explain(model, make_products([""], picture=[products.picture[row]]))
    assert [w.text for w in text.words] == ["piscine", "ronde"] and text.pictures == [] and text.description == ""
    assert picture.words == [] and len(picture.pictures) == 1 and explanation_text(picture).startswith("picture: ")
    assert len(text.experts) == len(picture.experts) == 1
    for nothing in (make_products([""]), make_products([""], ["only a description"])):
        e = explain(model, nothing)
        assert e.prdtypecode is None and explanation_text(e) == "" and "no answer" in e._repr_html_() and e.to_dict()["words"] == []
    signs = explain(model, make_products(["???"]))
    assert explanation_text(signs).endswith(f"against {signs.against}")

def test_few_classes_are_enough() -> None:
    codes = (10, 40, 2583)
    titles = [f"{what} {i}" for what in ("livre ancien", "jeu console", "piscine ronde") for i in range(6)]
    few = make_products(titles, prdtypecode=[c for c in codes for _ in range(6)])
    name = "text_linear"
    expert = expert_class(name)()
    expert.fit(expert.embed(few), few.label)
    fusion = Fusion([name], len(CODES), {frozenset([name]): Pattern(np.ones(1), np.zeros(len(CODES)))})
    e = explain(Bundle({name: expert}, fusion, .5, {}, fingerprints(few)), make_products(["Piscine bleue"]), codes[0])
    assert e.prdtypecode == 2583 and e.against == codes[0]
    assert abs(sum(x.contrast for x in e.experts) + e.bias.contrast - np.log(e.confidence / e.other)) < 1e-4
    assert strongest_tokens(e)[0][0] == "piscine" and strongest_tokens(e)[0][1] > 0

# --- and harmless

def test_what_a_merchant_wrote_is_escaped(model: Bundle) -> None:
    e = explain(model, make_products([EVIL.replace("<", "&amp;lt;").replace(">", "&amp;gt;") + EVIL]))
    shown = e._repr_html_()
    assert set(re.findall(r"<(/?\w+)", shown)) <= {s + t for s in ("", "/") for t in ("div", "p", "b", "span", "ul", "li")}
    assert not re.search(r"<[^>]*\Won\w+=", shown) and "&lt;img/src=x/onerror=alert(2)//" in shown, "a tag without an end is no tag to `clean_text`"
    assert not re.search(r"(?<!\\)[<\[]", e._repr_markdown_())

# --- the command line

def cells(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as f: return list(csv.DictReader(f))

def test_explain_appends_one_column_to_the_predictions(rakuten: Callable[..., Any], bundle: Path, sample_catalog: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    lines = (sample_catalog / "X_test_update.csv").read_text(encoding="utf-8").splitlines()
    titles = ["=SOMME(A1:A9)", "-piscine ronde 3,05 m", "", "+@console"]
    (few / "X_test_update.csv").write_text("\n".join([lines[0], *(f'{i},"{t}",,{i + 1},{i + 1}' for i, t in enumerate(titles))]) + "\n", encoding="utf-8")
    (few / "X_train_update.csv").write_text(f"{lines[0]}\n9,Livre,,10,10\n", encoding="utf-8")
    for name, flags in (("plain", ()), ("why", ("--explain",))):
        answer = rakuten("predict", bundle, few, "--out", tmp_path / f"{name}.csv", *flags)
        assert answer.returncode == 0, answer.stderr
    for short, long in zip((tmp_path / "plain.csv").read_bytes().splitlines(), (tmp_path / "why.csv").read_bytes().splitlines(), strict=True):
        assert long.startswith(short + b","), "but for the last column nothing changes"
    plain, why = cells(tmp_path / "plain.csv"), cells(tmp_path / "why.csv")
    assert list(plain[0]) == list(COLUMNS) and list(why[0]) == [*COLUMNS, "explanation"]
    assert [{k: v for k, v in row.items() if k != "explanation"} for row in why] == plain
    for row in why:
        assert row["explanation"][:1] not in ("=", "+", "-", "@") and bool(row["explanation"]) == bool(row["prdtypecode"])
        if row["prdtypecode"]: assert row["explanation"].endswith(f"against {row['top5'].split()[1].split(':')[0]}")
    assert re.search(r"piscine [+−]\d", next(r["explanation"] for r in why if r["productid"] == "2"))

# --- the API

@pytest.fixture(scope="module")
def marie(api: ApiProcess) -> dict[str, str]:
    "The header of an ordinary user."
    return api.token("marie")

def test_the_api_says_why_when_asked(api: ApiProcess, marie: dict[str, str], model: Bundle, products: Products) -> None:
    i = next(i for i in range(len(products)) if products.title[i] and products.description[i] and products.picture[i] is not None)
    title, description, raw = products.title[i], products.description[i], picture_bytes(products.picture[i])
    for asked in ((title, description, raw), (title, "", None), ("", "", raw), ("", description, raw)):
        plain, why = api.predict(marie, *asked).json(), api.predict(marie, *asked, explain="true").json()
        assert "explanation" not in plain and set(why) - set(plain) == {"explanation"}
        assert why["predictions"] == plain["predictions"] and why["model_version"] == plain["model_version"] == model.version
        own = explain(model, make_products(*([x] for x in asked))).to_dict()
        assert set(why["explanation"]) == set(own) and why["explanation"]["words"] == own["words"]
        assert (why["explanation"]["prdtypecode"], why["explanation"]["against"]) == tuple(p["label"] for p in why["predictions"][:2])
        assert [len(why["explanation"][k]) for k in ("experts", "pictures")] == [len(own[k]) for k in ("experts", "pictures")]

def test_explain_is_yes_or_no(api: ApiProcess, marie: dict[str, str]) -> None:
    for said, there in {"true": True, "1": True, "false": False, "0": False, "": False}.items():
        answer = api.client.post("/predict_code", data={"designation": "Piscine", "explain": said}, headers=marie)
        assert answer.status_code == 200 and ("explanation" in answer.json()) == there, said
    for wrong in ("yes", "oui", "2", "True ", "\0"):
        answer = api.client.post("/predict", data={"designation": "Piscine", "explain": wrong}, headers=marie)
        assert answer.status_code == 422 and answer.json()["detail"].startswith("explain: expected ")
    assert api.client.post("/predict", data={"designation": ["Jeu"], "explain": ["true", "true"]}, headers=marie).status_code == 422

def test_those_who_do_not_ask_are_not_held_up(api: ApiProcess, marie: dict[str, str]) -> None:
    "Twenty who ask why at once: each is answered or told that too many wait; the others are answered all the same."
    found: dict[int, httpx.Response] = {}
    def ask(n: int) -> None:
        data = {"designation": "Piscine ronde", "description": "mot " * 300, "explain": str(n % 2)}
        found[n] = httpx.post(f"{api.url}/predict", data=data, headers=marie, timeout=60)
    crowd = [threading.Thread(target=ask, args=(n,)) for n in range(40)]
    for t in crowd: t.start()
    for t in crowd: t.join()
    assert {found[n].status_code for n in range(0, 40, 2)} == {200} and {found[n].status_code for n in range(1, 40, 2)} <= {200, 503}
    assert all(a.headers["retry-after"] for a in found.values() if a.status_code == 503)
    told = [a.json() for a in found.values() if a.status_code == 200]
    assert len({t["predictions"][0]["label"] for t in told}) == 1 and any("explanation" in t for t in told)

def test_the_document_tells_of_it(api: ApiProcess) -> None:
    document = api.client.get("/openapi.json").json()
    for path in ("/predict", "/predict_code"):
        field = document["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]["explain"]
        assert set(field["enum"]) == {"true", "1", "false", "0"}
    answer = document["components"]["schemas"]["PredictionResponse"]
    assert "explanation" in answer["properties"] and "explanation" not in answer["required"]
    assert set(Explanation().to_dict()) == set(document["components"]["schemas"]["Explanation"]["properties"])
