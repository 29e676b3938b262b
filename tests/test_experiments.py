"""Experiments as a data scientist makes them with DVC: a parameter tried in place, another in the queue, compared, kept, forgotten.

They are made once, in a copy of the project whose run is committed (dvc.lock); the tests look at what they left."""
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import once
from pipeline_copy import Tell, ran

pytestmark = pytest.mark.services # of DVC's queue, and by the minutes they take
WAIT = 180 # seconds for the queue
C, PRIOR = "text.experts.text_linear.C", "fuse.prior_precision"
QUIETLY = "import subprocess, sys; sys.exit(subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode)"

def git(project: Path, *words: str) -> str:
    "What git answers."
    person = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", *person, *words], cwd=project, check=True, capture_output=True, text=True).stdout

def done(project: Path, tell: Tell, *words: str) -> str:
    "What DVC says, which must have worked."
    answer = tell(project, "dvc", *words)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout

def wait_for(project: Path, name: str) -> None:
    "Until the experiment is in git, where DVC puts it when it is through."
    deadline = time.monotonic() + WAIT
    while name not in git(project, "for-each-ref", "--format=%(refname:lstrip=-1)", "refs/exps").split():
        assert time.monotonic() < deadline, "the queue did not come to an end"
        time.sleep(0.5)

@pytest.fixture(scope="session")
def explored(shared: Path, finished: Path, tell: Tell) -> Path:
    "The project, its run committed, with three experiments: two made in place, one after the other, and one by the queue."
    def make(part: Path) -> None:
        project = Path(shutil.copytree(finished / "project", part / "project", symlinks=True))
        git(project, "add", "--all")
        git(project, "commit", "--quiet", "--message", "A run")
        said = {"queued": done(project, tell, "exp", "run", "--queue", "--name", "firm", "-S", f"{PRIOR}=500", "evaluate"),
                "flat": done(project, tell, "exp", "run", "--name", "flat", "-S", f"{C}=0.02", "evaluate"),
                "drawn": done(project, tell, "exp", "run", "--name", "drawn", "-S", "evaluate.plots=out_of_fold", "evaluate")}
        try:
            tell(project, "python", "-c", QUIETLY, "dvc", "queue", "start") # its worker would hold on to our pipes
            wait_for(project, "firm")
            said["firm"] = done(project, tell, "queue", "logs", "firm")
        finally: tell(project, "python", "-c", QUIETLY, "dvc", "queue", "stop")
        (part / "said.json").write_text(json.dumps(said), encoding="utf-8")
        (part / "shown.json").write_text(done(project, tell, "exp", "show", "--json"), encoding="utf-8")
    return once(shared / "explored", make)

@pytest.fixture
def mine(explored: Path, tmp_path: Path) -> Path:
    "A copy that may be changed."
    return Path(shutil.copytree(explored / "project", tmp_path / "project", symlinks=True))

def shown(explored: Path) -> dict[str, dict[str, Any]]:
    "What `dvc exp show` tells of each experiment, and of the commit they started from."
    commit = json.loads((explored / "shown.json").read_text(encoding="utf-8"))[1]
    found = {e["name"]: e["revs"][0]["data"] for e in commit["experiments"]}
    return {"start": commit["data"], **found}

def parameters(told: dict[str, Any]) -> dict[str, Any]:
    "The params.yaml of an experiment."
    return dict(told["params"]["params.yaml"]["data"])

def figure(told: dict[str, Any], rows: str = "out_of_fold") -> float:
    "The first figure of an experiment."
    return float(told["metrics"][f"metrics/{rows}.json"]["data"]["fused"]["log_loss"])

def test_only_what_the_parameter_touches_runs(explored: Path) -> None:
    said = json.loads((explored / "said.json").read_text(encoding="utf-8"))
    assert ran(said["queued"]) == []
    assert sorted(ran(said["flat"])) == ["evaluate", "fuse", "text"]
    assert ran(said["drawn"]) == ["evaluate"]
    assert ran(said["firm"]) == ["fuse", "evaluate"], "in a copy of its own, with what the committed run made"

def test_the_table_has_parameters_and_figures(explored: Path) -> None:
    told = shown(explored)
    assert set(told) == {"start", "flat", "drawn", "firm"}
    assert {name: parameters(t)["text"]["experts"]["text_linear"]["C"] for name, t in told.items()} == {"start": 1.0, "flat": 0.02, "drawn": 0.02, "firm": 1.0}
    assert {name: parameters(t)["fuse"]["prior_precision"] for name, t in told.items()} == {"start": 20.0, "flat": 20.0, "drawn": 20.0, "firm": 500}
    assert figure(told["drawn"]) == figure(told["flat"])
    assert len({figure(told[name]) for name in ("start", "flat", "firm")}) == 3

def test_it_leaves_nothing_else_behind(explored: Path) -> None:
    assert sorted(line.split()[-1] for line in git(explored / "project", "status", "--short").splitlines()) == ["dvc.lock", "params.yaml"]

def test_figures_and_plots_are_compared(explored: Path, mine: Path, tell: Tell) -> None:
    told = shown(explored)
    diff = json.loads(done(mine, tell, "metrics", "diff", "--json", "HEAD"))
    changed = diff["metrics/out_of_fold.json"]["fused.log_loss"]
    assert (changed["old"], changed["new"]) == (figure(told["start"]), figure(told["flat"]))
    done(mine, tell, "plots", "diff", "HEAD")
    plots = sorted(p.name for p in (mine / "dvc_plots/static").iterdir())
    assert sum("confusion" in name for name in plots) == 2, plots
    assert "dvc_plots" not in git(mine, "status", "--short"), "what is drawn is nothing for git"

def test_one_is_kept_and_the_others_forgotten(explored: Path, mine: Path, tell: Tell) -> None:
    done(mine, tell, "exp", "apply", "firm")
    assert yaml.safe_load((mine / "params.yaml").read_text(encoding="utf-8"))["fuse"]["prior_precision"] == 500
    figures = json.loads((mine / "metrics/out_of_fold.json").read_text(encoding="utf-8"))
    assert figures["fused"]["log_loss"] == figure(shown(explored)["firm"])
    changed = json.loads(done(mine, tell, "status", "--json"))
    assert changed.keys() <= {"predict", "register"}, "what came before is in place, the executed notebooks too"
    done(mine, tell, "exp", "remove", "flat", "drawn", "firm")
    assert git(mine, "for-each-ref", "refs/exps/??").strip() == ""
