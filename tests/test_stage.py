"A stage of the pipeline that cannot run says why in one line; nothing needs to have run before."
from pathlib import Path
from typing import Any

import pytest
from pipeline_copy import Tell, change, check_rejected, make_project

# Changed sections, stage, words of the error.
REJECTED: dict[str, tuple[dict[str, dict[str, Any]], str, tuple[str, ...]]] = {
    "unknown name": ({"split": {"fold": 4}}, "prepare", ("params.yaml", "split.fold", "folds")),
    "no such catalogue": ({"import_": {"catalog": "nowhere"}}, "import", ("nowhere", "X_train_update.csv")),
    "unknown stage": ({}, "improt", ("'improt'", "import")),
}

@pytest.mark.parametrize("case", REJECTED)
def test_a_stage_rejects_wrong_parameters_in_one_line(case: str, tell: Tell, tmp_path: Path) -> None:
    sections, stage, words = REJECTED[case]
    make_project(project := tmp_path / "project")
    change(project, **sections)
    check_rejected(tell, project, stage, words)
