"""Retraining: one at a time, resumed after a crash in any step, with one registered version and one experiment.

The pipeline runs once, in `first`. The other tests take copies of the project with the same DVC cache, so that their
retrainings restore most stages."""
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import Run, needs_postgres, once
from pipeline_copy import RunInProject, change
from retrain_project import (
    RetrainProject,
    add_doubtful_answers,
    add_evidence,
    commit,
    copy_home,
    make_retrain_project,
    use_catalog,
)

from rakuten_nb.store.database import Store, open_store, retrainings
from rakuten_nb.store.retrainings import (
    STEPS,
    RetrainingBusy,
    begin_retraining,
    finish_retraining,
    latest_retraining,
    list_retrainings,
    pause,
    resume_retraining,
    save_step,
)

DATABASES = ["sqlite", pytest.param("postgresql", marks=[pytest.mark.services, needs_postgres])]
WAIT = 120 # seconds, generous for a busy machine

# --- the store

@pytest.fixture(params=DATABASES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    "An empty store on each database."
    postgres = request.param == "postgresql"
    return open_store(request.getfixturevalue("postgres") if postgres else f"sqlite:///{tmp_path}/store.sqlite")

def test_one_of_several_starts_at_once_succeeds(store: Store) -> None:
    def start(_: int) -> str:
        try: return begin_retraining(store, "manual").id
        except RetrainingBusy as e: return str(e)
    with ThreadPoolExecutor(6) as pool: answers = list(pool.map(start, range(6)))
    row = latest_retraining(store)
    assert row and [a for a in answers if a == row.id] == [row.id] and len(list_retrainings(store)) == 1
    assert all(a.startswith(f"retraining {row.id}: at step collect since ") for a in answers if a != row.id)

def test_one_of_several_resumes_at_once_succeeds(store: Store) -> None:
    pause(store, begin_retraining(store, "manual"), "for labels")
    with store.writing() as c: c.execute(retrainings.update().values(process=""))
    # A process does not wait for itself, so these are processes of their own.
    code = ("import sys; from rakuten_nb.store.database import open_store\n"
            "from rakuten_nb.store.retrainings import resume_retraining\n"
            "resume_retraining(open_store(sys.argv[1])); print('resumed', flush=True); input()")
    url = store.engine.url.render_as_string(hide_password=False)
    started = [subprocess.Popen([sys.executable, "-c", code, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [p.stdout.readline() for p in started if p.stdout]
    for p in started: p.communicate("\n")
    assert sorted(lines) == ["", "", "resumed\n"]

def test_a_row_of_another_machine_is_resumed_after_its_lease_only(store: Store) -> None:
    row = begin_retraining(store, "drift")
    with store.writing() as c: c.execute(retrainings.update().values(process="elsewhere:1"))
    with pytest.raises(RetrainingBusy, match="process elsewhere:1 works on it"): resume_retraining(store)
    with store.writing() as c: c.execute(retrainings.update().values(updated=row.updated - timedelta(minutes=5)))
    assert resume_retraining(store).id == row.id

def test_a_process_that_lost_its_row_cannot_store_a_result(store: Store) -> None:
    row = begin_retraining(store, "drift")
    with store.writing() as c: c.execute(retrainings.update().values(process="elsewhere:1"))
    with pytest.raises(RetrainingBusy, match="taken it over"): save_step(store, row, "collect", {"new": 1})
    with pytest.raises(RetrainingBusy, match="taken it over"): finish_retraining(store, row, "succeeded")
    after = latest_retraining(store)
    assert after and (after.steps, after.status) == ({}, "running")

# --- the command, without a pipeline

def test_status_before_the_first_retraining(rakuten: Run, tmp_path: Path) -> None:
    answer = rakuten("retrain", "status", extra={"RAKUTEN_DATA_DIR": str(tmp_path)})
    assert answer.returncode == 0 and "no retraining so far" in answer.stdout

def check_refused(answer: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    "Assert that a command failed with this exit code and one line that contains all words."
    errors = [line for line in answer.stderr.splitlines() if line.startswith("error:")]
    assert (answer.returncode, len(errors)) == (code, 1), answer.stdout + answer.stderr
    for word in words: assert word in errors[0]
    assert "Traceback" not in answer.stdout + answer.stderr

def test_a_folder_without_a_project_is_refused(rakuten: Run, tmp_path: Path) -> None:
    answer = rakuten("retrain", extra={"RAKUTEN_DATA_DIR": str(tmp_path)})
    check_refused(answer, 2, "expected a project with dvc.yaml", "git checkout")

# --- the whole, on a small project

@pytest.fixture(scope="session")
def template(shared: Path, run_in_project: RunInProject) -> Path:
    "A folder with home/, a project before its first retraining, and first/, a copy in which one waits for labels."
    def make(part: Path) -> None:
        make_retrain_project(part / "home")
        use_catalog(part / "home")
        first = RetrainProject(copy_home(part / "home", part / "first"), run_in_project)
        answer = first.retrain("--because", "accuracy")
        assert answer.returncode == 0, answer.stdout + answer.stderr
        (part / "output.txt").write_text(answer.stdout + answer.stderr, encoding="utf-8")
        shutil.copytree(part / "first/project/.dvc/cache", part / "home/project/.dvc/cache")
    return once(shared / "retrain_project", make)

@pytest.fixture
def own(template: Path, tmp_path: Path, run_in_project: RunInProject) -> RetrainProject:
    "A project before its first retraining, for one test."
    return RetrainProject(copy_home(template / "home", tmp_path / "home"), run_in_project)

@pytest.fixture
def waiting(template: Path, tmp_path: Path, run_in_project: RunInProject) -> RetrainProject:
    "A project in which a retraining waits for labels, for one test."
    return RetrainProject(copy_home(template / "first", tmp_path / "home"), run_in_project)

@pytest.mark.services
def test_a_retraining_waits_for_the_decision(template: Path, run_in_project: RunInProject) -> None:
    first = RetrainProject(template / "first", run_in_project)
    row, output = first.row(), (template / "output.txt").read_text(encoding="utf-8")
    assert (row.step, row.waiting, row.because) == ("decide", True, "accuracy")
    assert list(row.steps) == list(STEPS[:5])
    assert row.steps["collect"]["new"] > 20 and row.steps["train"]["gold"] > 100
    assert row.steps["gate"]["passed"] and row.steps["gate"]["rows"]["scored"] > 100
    assert row.steps["register"]["new"] and row.steps["experiment"]["mode"] == "shadow"
    assert first.history()["decisions"][:1] == [("gate", "passed")]
    assert first.versions() == [row.model_version]
    assert "rakuten-nb retrain --resume" in output and "Running stage 'text'" in output

@pytest.mark.services
def test_nothing_in_the_project_changes(template: Path) -> None:
    project = template / "first/project"
    command = ["git", "status", "--short"]
    status = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout
    assert [line for line in status.splitlines() if ".dvc" not in line] == [" M params.yaml"]
    assert not (project / "models").exists() and not (project / "dvc.lock").exists()

# The end of each retraining below.
DONE = [("adopt", "CHAMPION"), ("start", "EXPERIMENT"), ("promote", "MODEL")]

def check_end(own: RetrainProject) -> None:
    "Assert that a retraining has succeeded, with one version, one experiment and no decision twice."
    row, history = own.row(), own.history()
    assert (row.status, list(row.steps)) == ("succeeded", list(STEPS)), row
    actions = history["deployments"]
    assert [action for action, _ in actions] == [action for action, _ in DONE]
    assert [key for _, key in actions[1:]] == [row.id, row.model_version]
    assert own.versions() == [row.model_version]
    assert len(set(history["decisions"])) == len(history["decisions"])
    assert {("gate", "passed"), ("retrain", "succeeded")} <= set(history["decisions"])

def check_resumed(own: RetrainProject, step: str, *options: str) -> None:
    "Kill a retraining in a step and resume it."
    killed = own.retrain_until(step, *options)
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    row = own.row()
    assert (row.status, row.step) == ("running", step) and row.process and step not in row.steps
    check_refused(own.retrain(), 1, row.id, f"at step {step}", "rakuten-nb retrain --resume")
    resumed = own.retrain("--resume")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert own.row().id == row.id

@pytest.mark.heavy
@pytest.mark.parametrize("step", STEPS[:5])
def test_a_retraining_that_was_killed_before_the_decision_is_resumed_to_the_same_end(
    own: RetrainProject, step: str,
) -> None:
    check_resumed(own, step)
    assert own.row().waiting
    own.promote_by_hand()
    assert own.retrain("--resume").returncode == 0
    check_end(own)

@pytest.mark.services
@pytest.mark.parametrize("step", STEPS[5:])
def test_a_retraining_that_was_killed_after_the_experiment_is_resumed_to_the_same_end(
    waiting: RetrainProject, step: str,
) -> None:
    add_evidence(waiting, right=55)
    change(waiting.project, retrain={"auto_promote": True})
    check_resumed(waiting, step, "--resume")
    check_end(waiting)

@pytest.mark.services
def test_the_rule_promotes_and_a_violated_guardrail_rolls_back(waiting: RetrainProject) -> None:
    own = waiting
    change(own.project, abtest={"watch_minutes": 60.0})
    add_evidence(own, right=55)
    answer = own.retrain("--resume")
    assert answer.returncode == 0 and "rakuten-nb promote --reason" in answer.stdout, answer.stderr
    assert own.row().step == "promote" and own.row().steps["decide"]["decision"] == "promote"
    change(own.project, retrain={"auto_promote": True})
    answer = own.retrain("--resume")
    assert answer.returncode == 0 and own.row().step == "watch" and own.row().waiting
    assert "no guardrail violated in 0 answers; the watch ends" in " ".join(answer.stdout.split()), answer.stdout
    add_doubtful_answers(own)
    check_refused(own.retrain("--resume"), 3, f"model {own.row().model_version} was rolled back", "review: 100.0%")
    history = own.history()
    assert [action for action, _ in history["deployments"]] == ["adopt", "start", "promote", "rollback"]
    kinds = [("gate", "passed"), ("abtest", "start"), ("promote", "promote"), ("rollback", "rollback"),
             ("retrain", "refused")]
    assert history["decisions"] == kinds

@pytest.mark.services
def test_the_rule_stops_a_worse_model(waiting: RetrainProject) -> None:
    add_evidence(waiting, right=5)
    experiment = waiting.row().experiment
    check_refused(waiting.retrain("--resume"), 3, f"experiment {experiment}: stop: the challenger is worse")
    assert [action for action, _ in waiting.history()["deployments"]] == ["adopt", "start", "stop"]
    assert waiting.row().steps["decide"]["decision"] == "stop"

def wait_for(condition: Callable[[], object]) -> None:
    "Wait until a condition is true."
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.1)

def in_step(own: RetrainProject, step: str) -> bool:
    "Whether the latest retraining is in this step."
    store = own.store()
    row = latest_retraining(store)
    store.close()
    return bool(row and row.step == step)

def pipeline_processes(folder: Path) -> list[str]:
    "The commands of running processes that name a folder."
    found = []
    for path in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if path.resolve().is_relative_to(folder): found.append(path.parent.name)
        except OSError: continue
    return found

@pytest.mark.services
def test_a_second_retraining_at_once_names_the_first(own: RetrainProject, env: dict[str, str]) -> None:
    programs = Path(sys.executable).parent
    settings = env | own.env | {"PYTHONPATH": str(own.project)}
    with (own.home / "output.txt").open("w") as out, subprocess.Popen(
            [programs / "rakuten-nb", "retrain"], cwd=own.project, env=settings, stdout=out, stderr=out) as first:
        wait_for(lambda: in_step(own, "train") and pipeline_processes(own.home / "data/retrain"))
        row = own.row()
        for words in ((), ("--resume",)):
            check_refused(own.retrain(*words), 1, f"retraining {row.id}: at step", row.process)
        first.kill()
    wait_for(lambda: not pipeline_processes(own.home / "data/retrain"))
    assert own.retrain("--resume").returncode == 0
    assert own.row().waiting and own.row().id == row.id

@pytest.mark.heavy
def test_shuffled_labels_are_refused_by_the_gate_and_stopped_by_a_person_without_it(own: RetrainProject) -> None:
    use_catalog(own.home, "shuffled")
    check_refused(own.retrain(), 3, "is refused", "no worse than the champion")
    row = own.row()
    assert (row.status, row.step, row.steps["gate"]["passed"]) == ("refused", "gate", False)
    assert own.versions() == [] and own.history()["decisions"] == [("gate", "refused"), ("retrain", "refused")]
    check_refused(own.retrain("--resume"), 2, f"found retraining {row.id}: refused at step gate")
    check_refused(own.retrain(), 4, "at least 20 new labels", "found 0 since")
    change(own.project, retrain={"min_new_labels": 0})
    assert own.retrain("--skip-gate").returncode == 0
    assert own.row().waiting and ("gate", "skipped") in own.history()["decisions"]
    stop = "from rakuten_nb.store.deployments import stop_experiment; stop_experiment(store, 'rose', 'it is worse')"
    own.run("python", "-c", f"{OPEN}; {stop}")
    check_refused(own.retrain("--resume"), 3, "was ended by rose (stop): it is worse")

OPEN = ("from rakuten_nb.config import read_settings; from rakuten_nb.store.database import open_store; "
        "store = open_store(read_settings().database_url)")

@pytest.mark.services
def test_too_few_labels_cooldown_and_dry_run(own: RetrainProject) -> None:
    plan = own.retrain("--dry-run", "--because", "drift")
    assert plan.returncode == 0 and re.search(r"\b\d\d products with a new label", plan.stdout), plan.stderr
    assert not (own.home / "data/retrain").exists()
    change(own.project, retrain={"min_new_labels": 1000})
    for words in ((), ("--dry-run",)): check_refused(own.retrain(*words), 4, "at least 1,000 new labels")
    check_refused(own.retrain("--because", "boredom"), 2, "--because: expected drift, accuracy")
    change(own.project, retrain={"min_new_labels": -1})
    check_refused(own.retrain(), 2, "params.yaml: retrain.min_new_labels")
    store = own.store()
    finish_retraining(store, begin_retraining(store, "drift"), "refused")
    store.close()
    change(own.project, retrain={"min_new_labels": 1, "cooldown_hours": 24.0})
    check_refused(own.retrain(), 4, "expected 24 h since the last retraining")

@pytest.mark.services
def test_a_stage_that_fails_names_its_reason_and_is_resumed(own: RetrainProject) -> None:
    broken = own.project / "nbs/stages/10_import.ipynb"
    text = broken.read_text(encoding="utf-8")
    fault = "raise OSError(28, 'No space left on device')"
    broken.write_text(text.replace("ws = workspace()", fault, 1), encoding="utf-8")
    commit(own.project)
    check_refused(own.retrain(), 1, "10_import.ipynb: OSError", "No space left on device")
    row = own.row()
    assert (row.status, row.step) == ("failed", "train")
    clone = own.home / "data/retrain" / row.id / "project"
    (clone / "nbs/stages/10_import.ipynb").write_text(text, encoding="utf-8")
    assert own.retrain("--resume").returncode == 0 and own.row().waiting
