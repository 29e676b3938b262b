"A copy of the project with a small sample, in which the pipeline may run."
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
PRODUCTS = 250
NEEDED = ("nbs", "rakuten_nb", "settings.ini", "params.yaml", "dvc.yaml", ".dvcignore", ".gitignore")
STAGES = ["import", "prepare", "text", "image", "fuse", "evaluate", "register", "predict"]
RunInProject = Callable[..., subprocess.CompletedProcess[str]]

def change(project: Path, **sections: Any) -> None:
    "Update sections of params.yaml, or replace values at its top level; a trailing _ of a name is dropped (`import_`)."
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in sections.items():
        key = name.strip("_")
        params[key] = params[key] | value if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(params, allow_unicode=True), encoding="utf-8")

def executed_stages(output: str) -> list[str]: # in order
    "The stages that ran according to the output of `dvc repro`."
    return re.findall(r"Running stage '(\w+)'", output)

def make_project(project: Path) -> None:
    "Copy what the pipeline needs, under git, with parameters that make it quick."
    project.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in NEEDED:
        if (ROOT / name).is_file(): shutil.copy(ROOT / name, project)
        else: shutil.copytree(ROOT / name, project / name, ignore=ignore, symlinks=True)
    (project / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", project / ".dvc")
    subprocess.run(["git", "init", "--quiet", project], check=True)
    change(project, import_={"products": PRODUCTS}, split={"folds": 2}, text={"experts": {"text_linear": {"C": 1.0}}})

def check_rejected(run_in_project: RunInProject, project: Path, stage: str, words: tuple[str, ...]) -> None:
    "Assert that a stage fails with exit code 2 and one line that contains all `words`."
    result = run_in_project(project, "rakuten-nb", "stage", stage)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert (result.returncode, len(errors)) == (2, 1), result.stderr
    for word in words: assert word in errors[0]
    assert "Traceback" not in result.stdout + result.stderr
