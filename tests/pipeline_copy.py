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
Tell = Callable[..., subprocess.CompletedProcess[str]]

def change(project: Path, **sections: Any) -> None:
    "Change sections of params.yaml, or what is no section."
    params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
    for name, section in sections.items(): params[name.strip("_")] = params[name.strip("_")] | section if isinstance(section, dict) else section
    (project / "params.yaml").write_text(yaml.safe_dump(params, allow_unicode=True), encoding="utf-8")

def ran(said: str) -> list[str]:
    "The stages that ran, in order."
    return re.findall(r"Running stage '(\w+)'", said)

def make_project(project: Path) -> None:
    "What the pipeline needs of this project, under git, with parameters that make it quick."
    project.mkdir()
    for name in NEEDED:
        if (ROOT / name).is_file(): shutil.copy(ROOT / name, project)
        else: shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"), symlinks=True)
    (project / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", project / ".dvc")
    subprocess.run(["git", "init", "--quiet", project], check=True)
    change(project, import_={"products": PRODUCTS}, split={"folds": 2}, text={"experts": {"text_linear": {"C": 1.0}}})

def check_rejected(tell: Tell, project: Path, stage: str, words: tuple[str, ...]) -> None:
    "Assert that a stage fails with exit code 2 and one line that contains all `words`."
    result = tell(project, "rakuten-nb", "stage", stage)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert (result.returncode, len(errors)) == (2, 1), result.stderr
    for word in words: assert word in errors[0]
    assert "Traceback" not in result.stdout + result.stderr
