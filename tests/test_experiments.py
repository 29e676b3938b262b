"""Experiments with DVC: parameters changed in place and in the queue, results compared, one applied, all removed.

The experiments run once, in a copy of the project whose run is committed (dvc.lock). The tests examine the results."""
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import once
from pipeline_copy import RunInProject, executed_stages

pytestmark = pytest.mark.services # runs DVC's queue, for minutes
WAIT = 180 # seconds for the queue
C, PRIOR = "text.experts.text_linear.C", "fuse.prior_precision"

# Runs a command without output: DVC's queue worker would hold the pipes of the test open.
QUIET = """
import subprocess, sys
nowhere = subprocess.DEVNULL
sys.exit(subprocess.run(sys.argv[1:], stdout=nowhere, stderr=nowhere).returncode)
"""

def git(project: Path, *words: str) -> str:
    "The output of a git command."
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    command = ["git", *author, *words]
    return subprocess.run(command, cwd=project, check=True, capture_output=True, text=True).stdout

def dvc(project: Path, run_in_project: RunInProject, *words: str) -> str:
    "The output of a DVC command, which must succeed."
    answer = run_in_project(project, "dvc", *words)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout

def wait_for_experiment(project: Path, name: str) -> None:
    "Wait until a queued experiment has ended: then DVC stores it in git."
    deadline = time.monotonic() + WAIT
    while name not in git(project, "for-each-ref", "--format=%(refname:lstrip=-1)", "refs/exps").split():
        assert time.monotonic() < deadline, "the queue did not end"
        time.sleep(0.5)

def run_experiments(project: Path, run_in_project: RunInProject) -> dict[str, str]: # name → output
    "Queue experiment firm, run flat and drawn one after the other in place, then run the queue."
    def experiment(name: str, setting: str, *options: str) -> str:
        return dvc(project, run_in_project, "exp", "run", *options, "--name", name, "-S", setting, "evaluate")
    outputs = {"queued": experiment("firm", f"{PRIOR}=500", "--queue"), "flat": experiment("flat", f"{C}=0.02"),
               "drawn": experiment("drawn", "evaluate.plots=out_of_fold")}
    try:
        run_in_project(project, "python", "-c", QUIET, "dvc", "queue", "start")
        wait_for_experiment(project, "firm")
        outputs["firm"] = dvc(project, run_in_project, "queue", "logs", "firm")
    finally: run_in_project(project, "python", "-c", QUIET, "dvc", "queue", "stop")
    return outputs

@pytest.fixture(scope="session")
def explored(shared: Path, finished_project: Path, run_in_project: RunInProject) -> Path:
    "A folder with project/ after three experiments, outputs.json of their runs, and the table experiments.json."
    def make(part: Path) -> None:
        project = Path(shutil.copytree(finished_project / "project", part / "project", symlinks=True))
        git(project, "add", "--all")
        git(project, "commit", "--quiet", "--message", "A run")
        outputs = run_experiments(project, run_in_project)
        (part / "outputs.json").write_text(json.dumps(outputs), encoding="utf-8")
        table = dvc(project, run_in_project, "exp", "show", "--json")
        (part / "experiments.json").write_text(table, encoding="utf-8")
    return once(shared / "explored", make)

@pytest.fixture
def own_copy(explored: Path, tmp_path: Path) -> Path:
    "A copy that a test may change."
    return Path(shutil.copytree(explored / "project", tmp_path / "project", symlinks=True))

def experiment_table(explored: Path) -> dict[str, dict[str, Any]]: # name → parameters and metrics
    "The experiments of `dvc exp show`, and under `start` the commit on which they are based."
    commit = json.loads((explored / "experiments.json").read_text(encoding="utf-8"))[1]
    experiments = {e["name"]: e["revs"][0]["data"] for e in commit["experiments"]}
    return {"start": commit["data"], **experiments}

def parameters(experiment: dict[str, Any]) -> dict[str, Any]:
    "The params.yaml of an experiment."
    return dict(experiment["params"]["params.yaml"]["data"])

def log_loss(experiment: dict[str, Any]) -> float:
    "The out-of-fold log loss of an experiment."
    return float(experiment["metrics"]["metrics/out_of_fold.json"]["data"]["fused"]["log_loss"])

def test_an_experiment_executes_the_affected_stages_only(explored: Path) -> None:
    outputs = json.loads((explored / "outputs.json").read_text(encoding="utf-8"))
    assert executed_stages(outputs["queued"]) == []
    assert sorted(executed_stages(outputs["flat"])) == ["evaluate", "fuse", "text"]
    assert executed_stages(outputs["drawn"]) == ["evaluate"]
    assert executed_stages(outputs["firm"]) == ["fuse", "evaluate"], "it runs in its own copy of the committed run"

def test_the_table_lists_parameters_and_metrics(explored: Path) -> None:
    table = experiment_table(explored)
    assert set(table) == {"start", "flat", "drawn", "firm"}
    params = {name: parameters(experiment) for name, experiment in table.items()}
    strengths = {name: p["text"]["experts"]["text_linear"]["C"] for name, p in params.items()}
    assert strengths == {"start": 1.0, "flat": 0.02, "drawn": 0.02, "firm": 1.0}
    priors = {name: p["fuse"]["prior_precision"] for name, p in params.items()}
    assert priors == {"start": 20.0, "flat": 20.0, "drawn": 20.0, "firm": 500}
    assert log_loss(table["drawn"]) == log_loss(table["flat"])
    assert len({log_loss(table[name]) for name in ("start", "flat", "firm")}) == 3

def test_an_experiment_changes_only_the_lock_and_the_parameters(explored: Path) -> None:
    status = git(explored / "project", "status", "--short")
    assert sorted(line.split()[-1] for line in status.splitlines()) == ["dvc.lock", "params.yaml"]

def test_metrics_and_plots_are_compared(explored: Path, own_copy: Path, run_in_project: RunInProject) -> None:
    table = experiment_table(explored)
    diff = json.loads(dvc(own_copy, run_in_project, "metrics", "diff", "--json", "HEAD"))
    changed = diff["metrics/out_of_fold.json"]["fused.log_loss"]
    assert (changed["old"], changed["new"]) == (log_loss(table["start"]), log_loss(table["flat"]))
    dvc(own_copy, run_in_project, "plots", "diff", "HEAD")
    plots = sorted(p.name for p in (own_copy / "dvc_plots/static").iterdir())
    assert sum("confusion" in name for name in plots) == 2, plots
    assert "dvc_plots" not in git(own_copy, "status", "--short"), "git ignores the plots"

def test_one_experiment_is_applied_and_all_are_removed(
    explored: Path, own_copy: Path, run_in_project: RunInProject,
) -> None:
    dvc(own_copy, run_in_project, "exp", "apply", "firm")
    params = yaml.safe_load((own_copy / "params.yaml").read_text(encoding="utf-8"))
    assert params["fuse"]["prior_precision"] == 500
    metrics = json.loads((own_copy / "metrics/out_of_fold.json").read_text(encoding="utf-8"))
    assert metrics["fused"]["log_loss"] == log_loss(experiment_table(explored)["firm"])
    changed = json.loads(dvc(own_copy, run_in_project, "status", "--json"))
    assert changed.keys() <= {"predict", "register"}, "the outputs of earlier stages are in place, with their notebooks"
    dvc(own_copy, run_in_project, "exp", "remove", "flat", "drawn", "firm")
    assert git(own_copy, "for-each-ref", "refs/exps/??").strip() == ""
