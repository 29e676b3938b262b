"""The pipeline as DVC runs it, in a copy of the project with a small sample.

The pipeline runs once in that copy. A test that changes something takes a copy of the result, and looks at the stages
that run again. Tests of a stage alone are in test_stage.py."""
import csv
import json
from pathlib import Path

import pytest
from pipeline_copy import PRODUCTS, STAGES, RunInProject, change, check_rejected, executed_stages

pytestmark = pytest.mark.services # each test needs the pipeline to have run, which takes a minute

def read_rows(path: Path) -> list[dict[str, str]]:
    "The rows of a CSV file."
    with path.open(encoding="utf-8", newline="") as f: return list(csv.DictReader(f))

def test_the_first_run_executes_every_stage_once(finished_project: Path) -> None:
    output = (finished_project / "repro.txt").read_text(encoding="utf-8")
    assert sorted(executed_stages(output)) == sorted(STAGES)

def test_a_run_writes_every_declared_output(finished_project: Path) -> None:
    project = finished_project / "project"
    assert len(read_rows(project / "data/predictions/train.csv")) == PRODUCTS
    assert len(read_rows(project / "data/predictions/test.csv")) == PRODUCTS // 10
    quarantine = (project / "data/preprocessed/quarantine.csv").read_text(encoding="utf-8")
    assert quarantine.startswith("productid,imageid,file,reason\n")
    for rows in ("gold", "out_of_fold"):
        metrics = json.loads((project / f"metrics/{rows}.json").read_text(encoding="utf-8"))
        assert 0 < metrics["fused"]["weighted_f1"] <= 1
        assert set(metrics["experts"]) == {"text_linear", "image"}
    for name in ("confusion", "coverage", "reliability"):
        assert (project / f"reports/plots/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((project / "reports/runs").glob("*.ipynb"))) == len(STAGES)

def test_a_second_run_executes_no_stage(project: Path, run_in_project: RunInProject) -> None:
    assert "up to date" in run_in_project(project, "dvc", "status").stdout
    answer = run_in_project(project, "dvc", "repro")
    assert answer.returncode == 0, answer.stderr
    assert executed_stages(answer.stdout) == []

def test_a_changed_text_parameter_executes_text_and_later_stages(project: Path, run_in_project: RunInProject) -> None:
    change(project, text={"experts": {"text_linear": {"C": 0.3, "max_chars": 1500}}})
    changed = json.loads(run_in_project(project, "dvc", "status", "--json").stdout)
    assert set(changed) == {"text"}
    answer = run_in_project(project, "dvc", "repro")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert sorted(executed_stages(answer.stdout)) == sorted(["text", "fuse", "evaluate", "register", "predict"])
    bundle = json.loads((project / "models/bundle/bundle.json").read_text(encoding="utf-8"))
    assert bundle["params"]["text"]["experts"]["text_linear"]["C"] == 0.3

def test_imports_a_catalogue_from_a_directory(project: Path, hard_catalog: Path, run_in_project: RunInProject) -> None:
    change(project, import_={"catalog": str(hard_catalog)})
    answer = run_in_project(project, "dvc", "repro", "--single-item", "import")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert executed_stages(answer.stdout) == ["import"]
    raw = project / "data/raw"
    for name in ("X_train_update.csv", "X_test_update.csv"):
        assert (raw / name).read_bytes() == (hard_catalog / name).read_bytes()
    assert len(list(raw.rglob("*.jpg"))) == len(list(hard_catalog.rglob("*.jpg")))

def test_a_stage_rejects_an_unknown_parameter_of_an_expert(project: Path, run_in_project: RunInProject) -> None:
    change(project, text={"experts": {"text_linear": {"c": 4}}})
    check_rejected(run_in_project, project, "text", ("'c'", "text_linear"))

# Name of a log → messages that a run writes to it.
LOGGED = {"import_data_logger": {"import started", "import done"}, "train_model_logger": {"fold", "registered"},
          "test_model_logger": {"measured", "predicted"}}

@pytest.mark.parametrize("name", LOGGED)
def test_a_run_logs_its_progress(name: str, finished_project: Path, env: dict[str, str]) -> None:
    log = Path(env["RAKUTEN_LOG_DIR"]) / f"{name}.log"
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in lines)
    assert LOGGED[name] <= {line["message"] for line in lines}
