"The local MLflow database across processes: first use by several at once, an interrupted creation, a moved project."
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from conftest import Run

pytestmark = pytest.mark.services # slow: MLflow takes seconds to import and to create its tables

EMPTY = "no model is registered"

def database(folder: Path) -> dict[str, str]:
    "The environment of a process that uses a folder's MLflow database."
    return {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "RAKUTEN_LOG_DIR": str(folder / "logs")}

def execute(folder: Path, *statements: str) -> None:
    "Run SQL on a folder's database."
    with closing(sqlite3.connect(folder / "mlflow.db")) as db, db:
        for statement in statements: db.execute(statement)

def test_three_commands_at_once_create_one_database(rakuten: Run, tmp_path: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: rakuten("model", "list", extra=database(tmp_path)), range(3)))
    assert [(a.returncode, EMPTY in a.stdout) for a in answers] == [(0, True)] * 3, [a.stderr for a in answers]
    assert rakuten("model", "list", extra=database(tmp_path)).returncode == 0

@pytest.mark.parametrize("damage", [
    "CREATE TABLE _alembic_tmp_tags (a)", # what a race of migrations leaves
    "UPDATE alembic_version SET version_num = '451aebb31d03'", # what a killed process leaves
    "DELETE FROM alembic_version"])
def test_replaces_an_incomplete_database_without_records(damage: str, rakuten: Run, tmp_path: Path) -> None:
    rakuten("model", "list", extra=database(tmp_path))
    execute(tmp_path, damage)
    answer = rakuten("model", "list", extra=database(tmp_path))
    assert answer.returncode == 0 and EMPTY in answer.stdout, answer.stderr
    assert (tmp_path / "mlflow.db.incomplete").is_file()

def test_rejects_an_interrupted_migration_of_a_database_with_records(rakuten: Run, tmp_path: Path) -> None:
    rakuten("model", "list", extra=database(tmp_path))
    execute(tmp_path, "INSERT INTO registered_models (name, creation_time, workspace) VALUES ('a', 0, 'default')",
            "CREATE TABLE _alembic_tmp_tags (a)")
    before = (tmp_path / "mlflow.db").read_bytes()
    answer = rakuten("model", "list", extra=database(tmp_path))
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert "mlflow.db: expected a complete MLflow database; found an interrupted migration" in answer.stderr
    assert "restore a backup" in answer.stderr and (tmp_path / "mlflow.db").read_bytes() == before

def test_relocates_the_addresses_of_a_moved_project(rakuten: Run, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new place"
    old.mkdir()
    assert "nothing to correct" in rakuten("model", "relocate", extra=database(old)).stdout
    rakuten("model", "list", extra=database(old))
    (old / "mlruns").mkdir(exist_ok=True)
    old.rename(new)
    answer = rakuten("model", "relocate", extra=database(new))
    assert answer.returncode == 0 and f"from {old}/mlruns to {new}/mlruns" in " ".join(answer.stdout.split())
    with closing(sqlite3.connect(new / "mlflow.db")) as db:
        addresses = [a for (a,) in db.execute("SELECT artifact_location FROM experiments WHERE experiment_id != 0")]
    assert addresses == [(new / "mlruns").as_uri()]
    assert "nothing to correct" in rakuten("model", "relocate", extra=database(new)).stdout
