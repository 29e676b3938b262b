"`rakuten-nb drift` on the prediction log and on catalogues, with real processes and stores."
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import Run
from PIL import Image, ImageEnhance

from rakuten_nb.config import Settings
from rakuten_nb.data.catalog import Product, Products, as_products, read_catalog
from rakuten_nb.data.profile import (
    PROFILE_NUMBERS,
    full_profile,
    product_numbers,
    profile_frame,
    profile_numbers,
    reference_profile,
    reference_sample,
    served_profile,
)
from rakuten_nb.data.sample import make_sample
from rakuten_nb.evaluation.drift_tests import DriftParams, Window, confirmed, drift_report
from rakuten_nb.models.bundle import Bundle, load_bundle, meta_hash, read_meta
from rakuten_nb.models.experts import predict_numbers
from rakuten_nb.models.image_views import PreparedPicture
from rakuten_nb.models.training import TrainParams, train
from rakuten_nb.operations.drift import next_window
from rakuten_nb.store.database import Store, open_store
from rakuten_nb.store.deployments import adopt
from rakuten_nb.store.drift_reports import last_drift_reports
from rakuten_nb.store.model_copies import copy_bundle
from rakuten_nb.store.prediction_log import add_predictions
from rakuten_nb.taxonomy import CODES

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)

class Log:
    "A store with a champion, and the environment of commands that read it."
    def __init__(self, home: Path, bundle: Path):
        self.store: Store = open_store(f"sqlite:///{home}/data/rakuten.sqlite")
        self.version = adopt(self.store, copy_bundle(bundle, home / "data/models").name, "bundle", "first").champion
        self.env = {"RAKUTEN_DATA_DIR": str(home / "data"), "RAKUTEN_BUNDLE": str(bundle)}
        self.settings = Settings(_env_file=None, rakuten_data_dir=home / "data") # type: ignore[call-arg]
        self.about = load_bundle(bundle).about["profile"]
        self.sample = reference_sample(self.about)
        self.count = 0

    def rows(self, n: int, at: datetime, shift: float = 0.0, first_version: bool = False) -> None:
        "Log predictions like those of the reference; a share `shift` has no French words and one type."
        rng, rows = np.random.default_rng(self.count), []
        for i in rng.integers(len(self.sample), size=n):
            values, moved = self.sample.iloc[i].copy(), rng.random() < shift
            if moved: values["french"] = 0.0
            numbers = [None if np.isnan(x) else float(x) for x in values[list(PROFILE_NUMBERS)]]
            profile = numbers[:8] if first_version else {"version": 2, "numbers": numbers}
            rows.append({
                "request_id": f"r{self.count}", "product_id": f"p{self.count}", "at": at, "user": "marie",
                "prdtypecode": 10 if moved else CODES[int(values["type"])], "confidence": float(values["confidence"]),
                "needs_review": False, "top5": [], "experts": {}, "model_version": self.version, "variant": "champion",
                "profile": profile})
            self.count += 1
        add_predictions(self.store, rows)

@pytest.fixture
def log(tmp_path: Path, bundle: Path) -> Iterator[Log]:
    "An empty log."
    made = Log(tmp_path, bundle)
    yield made
    made.store.close()

def drift(rakuten: Run, log: Log, *options: object) -> tuple[int, dict[str, Any], str]:
    "The exit code, the JSON and the last line of an error of `rakuten-nb drift`."
    answer = rakuten("drift", *options, "--json", "-", extra=log.env)
    lines = answer.stderr.strip().splitlines()
    return answer.returncode, json.loads(answer.stdout or "{}"), lines[-1] if lines else ""

def test_quiet_traffic_exits_with_0(log: Log, rakuten: Run) -> None:
    log.rows(400, NOW)
    code, report, _ = drift(rakuten, log, "--since", "2026-11-24", "--until", "2026-11-25")
    assert (code, report["drift"], report["rows"], report["model_version"]) == (0, False, 400, log.version)
    assert {*report} == {"model_version", "source", "since", "until", "by", "rows", "drift", "summary", "moved",
                         "comparisons"}
    assert (report["moved"], report["source"], report["since"][:10]) == ([], "log", "2026-11-24")
    compared = {c["name"] for c in report["comparisons"]}
    embeddings = {"text embedding", "picture embedding"}
    assert compared == {*log.about["numbers"], *embeddings, "confidence", "predicted types"}

def test_moved_traffic_exits_with_3_and_names_what_moved(log: Log, rakuten: Run) -> None:
    log.rows(400, NOW, shift=0.6)
    code, report, line = drift(rakuten, log, "--since", "2026-11-24", "--until", "2026-11-25")
    moved = [c for c in report["comparisons"] if c["moved"]]
    assert code == 3 and line.startswith("error: drift: ")
    assert {"french", "predicted types"} <= {c["name"] for c in moved}
    assert all(c["effect"] >= c["least"] and c["p"] <= 0.01 and c["examples"] for c in moved)
    assert report["moved"] == [c["name"] for c in moved] and all(c["meaning"] for c in moved)
    assert "french fell from" in next(c["words"] for c in moved if c["name"] == "french")
    (stored,) = last_drift_reports(log.store)
    assert stored.drift and stored.rows == 400 and stored.report == report

def test_too_few_predictions_exit_with_4(log: Log, rakuten: Run) -> None:
    log.rows(50, NOW)
    code, report, line = drift(rakuten, log, "--since", "2026-11-24", "--until", "2026-11-25")
    assert (code, report) == (4, {}) and "expected at least 200 predictions" in line and "found 50" in line

@pytest.mark.services
def test_a_window_holds_its_own_predictions_only(log: Log, rakuten: Run) -> None:
    log.rows(250, NOW - timedelta(days=3), shift=0.9)
    log.rows(250, NOW)
    assert drift(rakuten, log, "--since", "2026-11-20", "--until", "2026-11-22")[0] == 3
    assert drift(rakuten, log, "--since", "2026-11-23", "--until", "2026-11-25")[0] == 0

@pytest.mark.services
def test_a_catalogue_is_compared_with_a_bundle(log: Log, rakuten: Run, tmp_path: Path) -> None:
    shop = make_sample(tmp_path / "shop", 300, 3, images=False, progress=False)
    code, report, _ = drift(rakuten, log, shop)
    moved = {c["name"] for c in report["comparisons"] if c["moved"]}
    assert code == 3 and "has_picture" in moved, "the bundle was trained with pictures"
    assert last_drift_reports(log.store) == [], "a catalogue is no window of the log"

@pytest.mark.parametrize("options", [("--last", "week"), ("--since", "yesterday"), ("--until", "32/13")], ids=" ".join)
def test_a_wrong_time_is_one_line(options: tuple[str, str], log: Log, rakuten: Run) -> None:
    answer = rakuten("drift", *options, extra=log.env)
    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1 and options[1] in answer.stderr

@pytest.mark.services
def test_without_a_champion_the_error_says_what_to_do(rakuten: Run, tmp_path: Path) -> None:
    answer = rakuten("drift", extra={"RAKUTEN_DATA_DIR": str(tmp_path)})
    assert answer.returncode == 2 and "start the service, or name a bundle with --bundle" in answer.stderr

# --- earlier releases

def test_rows_of_an_earlier_release_are_compared(log: Log, rakuten: Run) -> None:
    log.rows(300, NOW, shift=0.6, first_version=True)
    code, report, _ = drift(rakuten, log, "--since", "2026-11-24", "--until", "2026-11-25")
    compared = {c["name"] for c in report["comparisons"]}
    assert code == 3 and "french" in report["moved"] and report["rows"] == 300
    assert compared == {*product_numbers("", "", False), "confidence", "predicted types"}

def test_a_bundle_of_an_earlier_release_is_compared(log: Log, rakuten: Run, bundle: Path, tmp_path: Path) -> None:
    old = shutil.copytree(bundle, tmp_path / "old")
    meta = read_meta(old / "bundle.json")
    first = product_numbers("", "", False)
    numbers = {name: r for name, r in profile_numbers(meta["profile"]).items() if name in first}
    meta |= {"profile": numbers}
    meta |= {"self": meta_hash(meta)}
    (old / "bundle.json").write_text(json.dumps(meta))
    log.version = meta["self"][:12]
    log.rows(300, NOW, shift=0.6)
    window = ("--since", "2026-11-24", "--until", "2026-11-25", "--bundle", old)
    code, report, _ = drift(rakuten, log, *window)
    assert code == 3 and {c["name"] for c in report["comparisons"]} == {*numbers} and "french" in report["moved"]
    code, _, line = drift(rakuten, log, *window, "--html", tmp_path / "plots.html")
    assert code == 2 and "expected a bundle with a sample" in line and "train it again" in line

def test_a_reference_of_numbers_alone_is_compared() -> None:
    values = pd.DataFrame(np.random.default_rng(0).normal(size=(500, 2)), columns=["title_chars", "digits"])
    window = Window(values + np.array([3, 0]), np.full(500, 10), np.full(500, 0.9), [str(i) for i in range(500)])
    report = drift_report("a" * 12, reference_profile(values), 500, window)
    assert [c.name for c in report.moved] == ["title_chars"] and len(report.comparisons) == 2

# --- windows of the monitor

def test_one_moved_window_is_no_alarm() -> None:
    params = DriftParams()
    assert [confirmed(w, params) for w in ([True], [True, False, False], [True, False, True], [True, True])] == [
        False, False, True, True]
    assert not confirmed([False, True, True], params), "the traffic is as before again"

def test_the_monitor_alarms_at_the_second_moved_window(log: Log) -> None:
    now, passes = datetime.now(UTC), []
    for shift in (0.0, 0.6, 0.6):
        log.rows(250, datetime.now(UTC), shift=shift)
        passes.append(next_window(log.store, log.settings, DriftParams()))
    assert [(p.report is not None and bool(p.report.moved), p.alarm) for p in passes] == [
        (False, False), (True, False), (True, True)]
    assert "french fell from" in passes[2].reason and passes[2].figures["rows"] == 250
    assert all(r.until and r.until > now for r in last_drift_reports(log.store, by="monitor"))

def test_a_window_of_a_person_does_not_count_for_the_monitor(log: Log, rakuten: Run) -> None:
    log.rows(250, NOW, shift=0.6)
    for _ in range(2): assert drift(rakuten, log, "--since", "2026-11-24", "--until", "2026-11-25")[0] == 3
    assert not next_window(log.store, log.settings, DriftParams()).alarm, "its first window"
    assert len(last_drift_reports(log.store)) == 3 and len(last_drift_reports(log.store, by="monitor")) == 1

def test_the_monitor_waits_for_the_hours_of_a_window(log: Log) -> None:
    log.rows(250, datetime.now(UTC))
    first = next_window(log.store, log.settings, DriftParams())
    log.rows(250, datetime.now(UTC), shift=0.6)
    waiting = next_window(log.store, log.settings, DriftParams(hours=1))
    assert first.report is not None and waiting.report is None and not waiting.alarm
    assert next_window(log.store, log.settings, DriftParams(), dry_run=True).report is not None
    assert len(last_drift_reports(log.store)) == 1, "a dry run stores nothing"

# --- plots

def test_plots_need_evidently(log: Log, rakuten: Run, tmp_path: Path) -> None:
    log.rows(400, NOW)
    window = ("--since", "2026-11-24", "--until", "2026-11-25")
    code, _, line = drift(rakuten, log, *window, "--html", tmp_path / "plots.html")
    if find_spec("evidently"): assert code == 0 and (tmp_path / "plots.html").stat().st_size > 100_000
    else: assert code == 2 and "`pip install 'rakuten_nb[ops]'` installs it" in line

# --- profiles of served products

@pytest.fixture(scope="module")
def model(bundle: Path) -> Bundle:
    "A bundle of text and image experts."
    return load_bundle(bundle)

@pytest.fixture(scope="module")
def some(sample_catalog: Path) -> Products:
    "Sixteen products, most with a picture."
    return read_catalog(sample_catalog).train[:16]

def prepared(model: Bundle, product: Product) -> Product:
    "A product whose picture is decoded as the service does it."
    if not product.picture: return product
    picture, picture.inputs = (raw := PreparedPicture(product.picture)), Future()
    picture.inputs.set_result(model.picture_inputs(bytes(raw)))
    return replace(product, picture=picture)

def single(products: Products) -> list[Product]:
    "Products as requests bring them."
    rows = zip(products.title, products.description, products.picture, products.productid, strict=True)
    return [Product(t, d, Path(p).read_bytes() if p is not None else None, i) for t, d, p, i in rows]

def test_a_request_and_a_catalogue_give_the_same_profile(model: Bundle, some: Products) -> None:
    catalog = full_profile(some, model.predict(some).numbers)
    requests = [prepared(model, product) for product in single(some)]
    rows = [served_profile(p, model.predict_chunk(as_products([p]))[0].numbers) for p in requests]
    assert np.allclose(profile_frame(rows), catalog, rtol=1e-3, atol=1e-4, equal_nan=True)
    pictured = catalog[catalog.has_picture == 1]
    assert pictured.notna().all(axis=None) or pictured[pictured.has_text == 1].notna().all(axis=None)
    assert catalog[catalog.has_picture == 0].filter(like="picture_").isna().all(axis=None)
    assert len(json.dumps(rows[0])) < 500

def test_threads_do_not_mix_up_profiles(model: Bundle, some: Products) -> None:
    ask = lambda i: model.predict_chunk(some[i % len(some) : i % len(some) + 1]).numbers
    alone = [ask(i) for i in range(len(some))]
    with ThreadPoolExecutor(4) as pool: together = list(pool.map(ask, range(48)))
    assert all(np.array_equal(x, alone[i % len(some)], equal_nan=True) for i, x in enumerate(together))

def test_training_products_know_no_more_words_than_new_ones(
    model: Bundle, sample_catalog: Path, tmp_path: Path,
) -> None:
    expert, known = model.experts["text_linear"], read_catalog(sample_catalog).labelled
    new = read_catalog(make_sample(tmp_path / "new", 400, 5, images=False, progress=False)).train
    plain, fresh = (np.nanmean(predict_numbers(expert, products)[1]["unknown_words"]) for products in (known, new))
    corrected = np.nanmean(expert.held_out_numbers(known)["unknown_words"])
    assert plain < fresh / 1.5 and abs(corrected - fresh) < 0.02, (plain, corrected, fresh)

def test_the_reference_of_a_bundle_is_small(bundle: Path) -> None:
    assert len(json.dumps(read_meta(bundle / "bundle.json")["profile"])) < 100_000

# --- shifts that a model of text and pictures finds

def darkened(products: Products, brightness: float) -> Products:
    "Products with darker pictures."
    def dark(source: Path | None) -> bytes | None:
        if source is None: return None
        ImageEnhance.Brightness(Image.open(source).convert("RGB")).enhance(brightness).save(out := BytesIO(), "JPEG")
        return out.getvalue()
    pictures = np.empty(len(products), object)
    pictures[:] = [dark(source) for source in products.picture]
    return replace(products, picture=pictures)

def as_window(model: Bundle, products: Products) -> Window:
    "A window of products."
    predictions = model.predict(products)
    codes = np.array(CODES)[predictions.proba.argmax(1)]
    return Window(full_profile(products, predictions.numbers), codes, predictions.confidence, products.productid)

def mixed(normal: Window, shifted: Window, strength: float, seed: int) -> Window:
    "500 products, of which a share is shifted."
    rng, n = np.random.default_rng(seed), round(500 * strength)
    where = rng.choice(len(shifted), n), rng.choice(len(normal), 500 - n)
    values = pd.concat([w.values.iloc[i] for w, i in zip((shifted, normal), where, strict=True)])
    join = lambda name: np.concatenate([getattr(w, name)[i] for w, i in zip((shifted, normal), where, strict=True)])
    return Window(values, join("codes"), join("confidence"))

@pytest.mark.heavy
def test_embeddings_find_dark_pictures_and_other_words_without_false_alarms(tmp_path: Path) -> None:
    catalog = read_catalog(make_sample(tmp_path / "a", 1500, progress=False))
    fresh = read_catalog(make_sample(tmp_path / "b", 1500, seed=7, progress=False)).train
    model, _ = train(catalog, TrainParams.model_validate({"split": {"folds": 4}}), "text_linear,image")
    normal = as_window(model, fresh)
    words = replace(fresh, title=np.array([f"REF XK-{len(t)} {t[:6].upper()}" for t in fresh.title], object),
                    description=np.full(len(fresh), "", object))
    pools = {"dark": as_window(model, darkened(fresh, 0.4)), "words": as_window(model, words)}
    report = lambda *args: drift_report("m", model.about["profile"], len(catalog.labelled), mixed(normal, *args))
    found = {(kind, s): [{c.name for c in report(pool, s, seed).moved} for seed in range(20)]
             for kind, pool in pools.items() for s in (0.1, 0.2, 0.4)}
    quiet = [{c.name for c in report(normal, 0.0, 1000 + seed).moved} for seed in range(40)]
    print({key: np.mean([bool(names) for names in value]) for key, value in found.items()}, quiet)
    assert sum(map(bool, quiet)) <= 1
    whole = {kind: {c.name for c in report(pool, 1.0, 0).moved} for kind, pool in pools.items()}
    assert {"picture_brightness", "picture embedding"} <= whole["dark"] and "text embedding" in whole["words"]
    assert all("picture_brightness" in names for names in found["dark", 0.4])
    assert min(np.mean([bool(names) for names in found[kind, 0.2]]) for kind in pools) >= 0.8
