"A small project with a served champion and labels of a reviewer, in which a retraining takes seconds."
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from pipeline_copy import RunInProject, change, make_project

from rakuten_nb.data.catalog import Catalog, Product, read_catalog, write_catalog
from rakuten_nb.data.sample import make_sample
from rakuten_nb.data.split import is_gold
from rakuten_nb.models.bundle import save_bundle
from rakuten_nb.models.training import TrainParams, train
from rakuten_nb.store.database import Store, decisions, feedback, open_store, predictions, shadow_predictions, utc_now
from rakuten_nb.store.deployments import adopt, list_deployments, promote
from rakuten_nb.store.feedback import add_feedback
from rakuten_nb.store.model_copies import copy_bundle
from rakuten_nb.store.prediction_log import add_predictions
from rakuten_nb.store.products import product_columns
from rakuten_nb.store.retrainings import Retraining, latest_retraining
from rakuten_nb.taxonomy import CODES

PRODUCTS, LABELS, GOLD_SHARE = 600, 80, .25
GATE = {"weighted_f1": .3, "ece": .5, "behaviour": {
    "rows": 40, "memory": 1.0, "typical": .1, "moved": .5, "direction": .1,
    "unchanged": {"upper case": .5, "no accents": .3, "HTML": .5, "JPEG again": .5, "cropped": .5}}}
RETRAIN = {"min_new_labels": 20, "cooldown_hours": 0.0}

def with_exchanged_labels(catalog: Catalog, share: float, seed: int = 0) -> Catalog:
    "The catalogue with this share of its labels exchanged, gold excepted."
    rng, products = np.random.default_rng(seed), catalog.products[:]
    rows = np.flatnonzero((products.label >= 0) & ~is_gold(products, GOLD_SHARE))
    rows = rng.permutation(rows)[: round(share * len(rows))]
    products.label = products.label.copy()
    products.label[rows] = products.label[rng.permutation(rows)]
    catalog.products = products
    return catalog

@dataclass
class RetrainProject:
    "A folder with project/, its catalogue, its data directory, and its MLflow database."
    home: Path
    run_in_project: RunInProject

    @property
    def project(self) -> Path:
        "The project, under git."
        return self.home / "project"

    @property
    def env(self) -> dict[str, str]:
        "The settings of its commands."
        return {"RAKUTEN_DATA_DIR": str(self.home / "data"), "RAKUTEN_LOG_DIR": str(self.home / "logs"),
                "MLFLOW_TRACKING_URI": f"sqlite:///{self.home}/mlflow.db"}

    def run(self, command: str, *args: object) -> subprocess.CompletedProcess[str]:
        "Run a command in the project."
        return self.run_in_project(self.project, command, *args, extra=self.env)

    def retrain(self, *args: str) -> subprocess.CompletedProcess[str]:
        "Run `rakuten-nb retrain`."
        return self.run("rakuten-nb", "retrain", *args)

    def retrain_until(self, step: str, *args: str) -> subprocess.CompletedProcess[str]:
        "Run `rakuten-nb retrain` and kill it in a step."
        return self.run("python", Path(__file__).with_name("retrain_until.py"), step, *args)

    def store(self) -> Store:
        "Its store."
        return open_store(f"sqlite:///{self.home}/data/rakuten.sqlite")

    def row(self) -> Retraining:
        "The latest retraining."
        store = self.store()
        try: row = latest_retraining(store)
        finally: store.close()
        assert row
        return row

    def promote_by_hand(self) -> None:
        "Promote the challenger, as `rakuten-nb promote` does."
        store, row = self.store(), self.row()
        promote(store, row.model_version, row.steps["register"]["uri"], "rose", "it is better")
        store.close()

    def versions(self) -> list[str]:
        "The bundles in the registry."
        lines = self.run("python", "-c", LIST_VERSIONS).stdout.split()
        return sorted(lines)

    def history(self) -> dict[str, list[Any]]:
        "Deployments and decisions, in order."
        store = self.store()
        with store.reading() as c:
            rows = c.execute(sa.select(decisions.c.kind, decisions.c.outcome).order_by(decisions.c.id)).all()
        actions = [(d.action, d.experiment or d.champion) for d in reversed(list_deployments(store))]
        store.close()
        return {"deployments": actions, "decisions": [tuple(row) for row in rows]}

LIST_VERSIONS = """from rakuten_nb.tracking.registry import versions_frame
print(*versions_frame()["model"])"""

def add_labels(store: Store, data_dir: Path, catalog: Catalog) -> None:
    "Log a prediction for each product, which a reviewer labels."
    products = catalog.labelled
    for i in range(len(products)):
        row = {"request_id": f"r{i}", "at": utc_now(), "user": "marie", "product_id": products.productid[i],
               "prdtypecode": 10, "confidence": .5, "needs_review": True, "top5": [], "experts": {},
               "model_version": "m", "variant": "champion", "profile": []}
        product = Product(products.title[i], products.description[i], None, products.productid[i])
        add_predictions(store, [row], [product_columns(data_dir, product, row["at"])])
        with store.reading() as c: number = c.execute(sa.select(sa.func.max(predictions.c.id))).scalar_one()
        add_feedback(store, number, "rose", int(CODES[products.label[i]]), reviewer=True)

def add_champion(home: Path, catalog: Catalog) -> None:
    "Serve a model of the catalogue, trained without gold on a third of the products."
    params = TrainParams.model_validate({"split": {"folds": 2, "gold_share": GOLD_SHARE, "keep_gold": True}})
    third = Catalog(catalog.root, catalog.products[::3], catalog.is_test[::3], [], [])
    model, _ = train(third, params, "text_linear")
    version = save_bundle(model, home / "champion")
    copy_bundle(home / "champion", home / "data/models")
    store = open_store(f"sqlite:///{home}/data/rakuten.sqlite")
    adopt(store, version, str(home / "champion"), "the first bundle")
    labels = read_catalog(make_sample(home / "labels", LABELS, 1, images=False, progress=False))
    add_labels(store, home / "data", labels)
    store.close()

def commit(project: Path) -> None:
    "Commit everything in the project."
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for words in (["add", "--all"], [*author, "commit", "--quiet", "--message", "A project"]):
        subprocess.run(["git", *words], cwd=project, check=True)

def make_retrain_project(home: Path) -> None:
    "Write a project, its catalogue, and a store with champion and labels."
    home.mkdir()
    make_project(home / "project")
    catalog = read_catalog(make_sample(home / "catalog", PRODUCTS, images=False, progress=False))
    write_catalog(home / "shuffled", with_exchanged_labels(read_catalog(home / "catalog"), .3).labelled)
    change(home / "project", split={"gold_share": GOLD_SHARE}, image={"experts": {}}, gate=GATE, retrain=RETRAIN,
           abtest={"watch_minutes": 0.0})
    commit(home / "project")
    add_champion(home, catalog)

def use_catalog(home: Path, name: str = "catalog") -> None:
    "Name the catalogue in params.yaml by its path, which differs in each copy of the folder."
    change(home / "project", import_={"catalog": os.path.relpath(home / name, home / "project")})

def copy_home(home: Path, out: Path) -> Path:
    "A copy of the folder that a test may change."
    return Path(shutil.copytree(home, out, symlinks=True))

def add_evidence(
    own: RetrainProject, right: int, products: int = 1000, disagreements: int = 120, labels: int = 60,
) -> None:
    "Add the answers of a shadow experiment, and labels of disagreements, of which the challenger has `right` right."
    store, row = own.store(), own.row()
    champion = list_deployments(store, 1)[0].champion
    with store.writing() as c:
        start = int(c.execute(sa.select(sa.func.max(predictions.c.id))).scalar_one()) + 1
        one = answer_columns(champion) | {"experiment": row.experiment}
        c.execute(predictions.insert(), [one | {"id": start + i, "product_id": f"e{i}"} for i in range(products)])
        beside = {"experiment": row.experiment, "model_version": row.model_version, "confidence": .9,
                  "needs_review": False, "top5": [], "seconds": .01, "error": ""}
        c.execute(shadow_predictions.insert(), [
            beside | {"prediction": start + i, "prdtypecode": 40 if i < disagreements else 10, "sampled": i < labels}
            for i in range(products)])
        given = {"user": "rose", "reviewer": True, "at": utc_now(), "content": ""}
        c.execute(feedback.insert(), [given | {"prediction": start + i, "prdtypecode": 40 if i < right else 10}
                                      for i in range(labels)])
    store.close()

def answer_columns(version: str) -> dict[str, Any]:
    "An answer of a champion."
    return {"request_id": "e", "at": utc_now(), "user": "marie", "product_id": "e", "prdtypecode": 10, "confidence": .9,
            "needs_review": False, "top5": [], "experts": {}, "model_version": version, "variant": "champion",
            "profile": [], "seconds": .01}

def add_doubtful_answers(own: RetrainProject, n: int = 400) -> None:
    "Add answers of the champion that all need review."
    store = own.store()
    champion = list_deployments(store, 1)[0].champion
    with store.writing() as c: c.execute(predictions.insert(), [answer_columns(champion) | {"needs_review": True}] * n)
    store.close()
