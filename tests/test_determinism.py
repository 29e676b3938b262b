"The same seed gives the same bytes in another process, with another hash seed and another number of threads."
from pathlib import Path

import pytest
from conftest import Run
from train_and_predict import EXPERTS, FOLDS

def content(folder: Path) -> dict[str, bytes]: # relative path → bytes
    "The content of every file in a folder."
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

@pytest.mark.services # slow: two trainings
def test_two_processes_train_and_predict_the_same(
    trained: Path, sample_catalog: Path, hard_catalog: Path, rakuten: Run, tmp_path: Path,
) -> None:
    (options := tmp_path / "params.yaml").write_text(f"split:\n  folds: {FOLDS}\n", encoding="utf-8")
    another = {"PYTHONHASHSEED": "4711", "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2",
               "RAKUTEN_DATA_DIR": str(tmp_path / "data")}
    answer = rakuten("train", sample_catalog, "--bundle", tmp_path / "bundle", "--params", options,
                     "--experts", EXPERTS, extra=another)
    assert answer.returncode == 0, answer.stderr
    first, second = content(trained / "bundle"), content(tmp_path / "bundle")
    different = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
    assert different == [], "files of the bundles differ"
    one = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "RAKUTEN_DATA_DIR": str(tmp_path / "other data")}
    bundles = {"one": (trained / "bundle", one), "two": (tmp_path / "bundle", another)}
    for name, (bundle, extra) in bundles.items():
        answer = rakuten("predict", bundle, hard_catalog, "--out", tmp_path / f"{name}.csv", extra=extra)
        assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()

@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, rakuten: Run) -> dict[str, dict[str, bytes]]:
    "Three samples: one seed with two hash seeds, and another seed."
    folder = tmp_path_factory.mktemp("samples")
    for name, seed, hashes in (("once", 3, "1"), ("again", 3, "2"), ("other", 4, "1")):
        answer = rakuten("sample", folder / name, "--products", 60, "--seed", seed, extra={"PYTHONHASHSEED": hashes})
        assert answer.returncode == 0, answer.stderr
    return {name: content(folder / name) for name in ("once", "again", "other")}

def test_a_seed_draws_the_same_sample(samples: dict[str, dict[str, bytes]]) -> None:
    assert len(samples["once"]) > 20
    assert samples["once"] == samples["again"]

def test_different_seeds_give_different_samples(samples: dict[str, dict[str, bytes]]) -> None:
    once, other = samples["once"], samples["other"]
    assert once["X_train_update.csv"] != other["X_train_update.csv"]
    assert {name for name in once if name.endswith(".jpg")} & {name for name in other if name.endswith(".jpg")} == set()
    assert set(once.values()) & set(other.values()) == set(), "no file in common"
