"A stage with wrong parameters is rejected in one line. No earlier stage needs to have run."
from pathlib import Path
from typing import Any

import pytest
from pipeline_copy import RunInProject, change, check_rejected, make_project

# Changed sections, stage, words of the error.
REJECTED: dict[str, tuple[dict[str, dict[str, Any]], str, tuple[str, ...]]] = {
    "unknown parameter": ({"split": {"fold": 4}}, "prepare", ("params.yaml", "split.fold", "folds")),
    "missing catalogue": ({"import_": {"catalog": "nowhere"}}, "import", ("nowhere", "X_train_update.csv")),
    "unknown stage": ({}, "improt", ("'improt'", "import")),
}

@pytest.mark.parametrize("case", REJECTED)
def test_a_stage_rejects_wrong_parameters_in_one_line(case: str, run_in_project: RunInProject, tmp_path: Path) -> None:
    sections, stage, words = REJECTED[case]
    make_project(project := tmp_path / "project")
    change(project, **sections)
    check_rejected(run_in_project, project, stage, words)
