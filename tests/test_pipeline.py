"""The pipeline as DVC runs it, in a copy of the project with a small sample.

One copy runs from nothing; each test takes a copy of that, changes one thing, and looks at what runs again."""
import csv
import json
from pathlib import Path

import pytest
from pipeline_copy import PRODUCTS, STAGES, Tell, change, check_rejected, ran

pytestmark = pytest.mark.services # runs the pipeline or an MLflow registry

def lines(path: Path) -> list[dict[str, str]]:
    "The lines of a CSV file."
    with path.open(encoding="utf-8", newline="") as f: return list(csv.DictReader(f))

def test_from_nothing_every_stage_runs_once(finished: Path) -> None:
    assert sorted(ran((finished / "said.txt").read_text(encoding="utf-8"))) == sorted(STAGES)

def test_it_leaves_what_it_promises(finished: Path) -> None:
    made = finished / "project"
    assert len(lines(made / "data/predictions/train.csv")) == PRODUCTS
    assert len(lines(made / "data/predictions/test.csv")) == PRODUCTS // 10
    assert (made / "data/preprocessed/quarantine.csv").read_text(encoding="utf-8").startswith("productid,imageid,file,reason\n")
    for which in ("gold", "out_of_fold"):
        figures = json.loads((made / f"metrics/{which}.json").read_text(encoding="utf-8"))
        assert 0 < figures["fused"]["weighted_f1"] <= 1
        assert set(figures["experts"]) == {"text_linear", "image"}
    for name in ("confusion", "coverage", "reliability"): assert (made / f"reports/plots/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((made / "reports/runs").glob("*.ipynb"))) == len(STAGES)

def test_a_second_run_runs_nothing(project: Path, tell: Tell) -> None:
    assert "up to date" in tell(project, "dvc", "status").stdout
    answer = tell(project, "dvc", "repro")
    assert answer.returncode == 0, answer.stderr
    assert ran(answer.stdout) == []

def test_a_text_parameter_runs_text_and_what_follows(project: Path, tell: Tell) -> None:
    change(project, text={"experts": {"text_linear": {"C": 0.3, "max_chars": 1500}}})
    changed = json.loads(tell(project, "dvc", "status", "--json").stdout)
    assert set(changed) == {"text"}
    answer = tell(project, "dvc", "repro")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert sorted(ran(answer.stdout)) == sorted(["text", "fuse", "evaluate", "register", "predict"])
    about = json.loads((project / "models/bundle/bundle.json").read_text(encoding="utf-8"))
    assert about["params"]["text"]["experts"]["text_linear"]["C"] == 0.3

def test_a_directory_is_imported(project: Path, hard_catalog: Path, tell: Tell) -> None:
    change(project, import_={"catalog": str(hard_catalog)})
    answer = tell(project, "dvc", "repro", "--single-item", "import")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert ran(answer.stdout) == ["import"]
    for name in ("X_train_update.csv", "X_test_update.csv"): assert (project / "data/raw" / name).read_bytes() == (hard_catalog / name).read_bytes()
    assert len(list((project / "data/raw").rglob("*.jpg"))) == len(list(hard_catalog.rglob("*.jpg")))

def test_a_stage_rejects_an_unknown_parameter_of_an_expert(project: Path, tell: Tell) -> None:
    change(project, text={"experts": {"text_linear": {"c": 4}}})
    check_rejected(tell, project, "text", ("'c'", "text_linear"))

LOGGED = {"import_data_logger": {"import started", "import done"}, "train_model_logger": {"fold", "registered"},
          "test_model_logger": {"measured", "predicted"}}

@pytest.mark.parametrize("name", LOGGED)
def test_the_logs_tell_what_was_done(name: str, finished: Path, env: dict[str, str]) -> None:
    found = [json.loads(line) for line in (Path(env["RAKUTEN_LOG_DIR"]) / f"{name}.log").read_text(encoding="utf-8").splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in found)
    assert LOGGED[name] <= {line["message"] for line in found}
