"""Bad input on the command line: what is refused, what is quarantined, what causes a warning.

A refusal is one line on standard error and an exit code, and changes nothing on disk."""
import csv
import json
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pandas as pd
import pytest
from conftest import Run, once

PRODUCTS = 60
INDEX = {"keep_default_na": False, "dtype": str, "index_col": 0}

@pytest.fixture(scope="session")
def healthy(shared: Path) -> Path:
    "60 labelled products and 6 more, without pictures."
    from rakuten_nb.data.sample import make_sample
    return once(shared / "healthy", lambda part: make_sample(part, PRODUCTS, images=False, progress=False))

@pytest.fixture
def catalog(healthy: Path, tmp_path: Path) -> Path:
    "A copy that a test may damage."
    return Path(shutil.copytree(healthy, tmp_path / "catalog"))

def content(folder: Path) -> dict[str, bytes | None]: # relative path → bytes; None for a folder
    "All files of a folder, hidden ones included."
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}

def refused(answer: CompletedProcess[str], *named: str, code: int = 2) -> None:
    "Assert one line on standard error with these words, and the exit code."
    assert answer.returncode == code, answer.stderr
    assert len(answer.stderr.splitlines()) == 1, answer.stderr
    for word in named: assert word in answer.stderr
    assert "Traceback" not in answer.stderr + answer.stdout

def edit(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    "Change a table of the catalogue."
    change(pd.read_csv(path, **INDEX)).to_csv(path, lineterminator="\n")

# --- refused catalogues

def drop_column(catalog: Path) -> None: edit(catalog / "X_train_update.csv", lambda x: x.drop(columns="imageid"))
def rename_column(catalog: Path) -> None:
    edit(catalog / "X_train_update.csv", lambda x: x.rename(columns={"designation": "title"}))
def rename_test_column(catalog: Path) -> None:
    edit(catalog / "X_test_update.csv", lambda x: x.rename(columns={"productid": "id"}))
def rename_label(catalog: Path) -> None:
    edit(catalog / "Y_train_CVw08PX.csv", lambda y: y.rename(columns={"prdtypecode": "code"}))
def fewer_labels(catalog: Path) -> None: edit(catalog / "Y_train_CVw08PX.csv", lambda y: y.iloc[:-3])
def other_rows(catalog: Path) -> None:
    edit(catalog / "Y_train_CVw08PX.csv", lambda y: y.set_axis([str(int(i) + 7) for i in y.index]))
def remove_table(catalog: Path) -> None: (catalog / "X_train_update.csv").unlink()
def empty_table(catalog: Path) -> None: (catalog / "X_train_update.csv").write_bytes(b"")
def unknown_code(catalog: Path) -> None:
    edit(catalog / "Y_train_CVw08PX.csv", lambda y: y.assign(prdtypecode=["31", *y["prdtypecode"][1:]]))
def bad_id(catalog: Path) -> None:
    edit(catalog / "X_train_update.csv", lambda x: x.assign(productid=["12a", *x["productid"][1:]]))

def latin1(catalog: Path) -> None:
    x = pd.read_csv(catalog / "X_train_update.csv", **INDEX)
    x = x.assign(designation=["Théière émaillée", *x["designation"][1:]], description="")
    x["designation"] = [t.encode("latin-1", "ignore").decode("latin-1") for t in x["designation"]]
    x.to_csv(catalog / "X_train_update.csv", encoding="latin-1", lineterminator="\n")

def short_line(catalog: Path) -> None:
    with (catalog / "X_train_update.csv").open("a", encoding="utf-8") as f: f.write("61,trop court\n")

# How the catalogue is damaged, which command reads it, what the error names.
REFUSED: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "no directory": (shutil.rmtree, "check", ("catalog", "X_train_update.csv", "no such directory")),
    "no table": (remove_table, "train", ("catalog", "X_train_update.csv", "Y_train_CVw08PX.csv")),
    "empty table": (empty_table, "predict", ("X_train_update.csv", "empty")),
    "column missing": (drop_column, "predict", ("X_train_update.csv", "'imageid'", "designation")),
    "column renamed": (rename_column, "train", ("X_train_update.csv", "'designation'", "'title'")),
    "column of the test table renamed": (rename_test_column, "check", ("X_test_update.csv", "'productid'", "'id'")),
    "label column renamed": (rename_label, "train", ("Y_train_CVw08PX.csv", "'prdtypecode'", "'code'")),
    "labels of another length": (fewer_labels, "evaluate", ("Y_train_CVw08PX.csv", "60", "57")),
    "labels of other rows": (other_rows, "check", ("Y_train_CVw08PX.csv", "row numbers")),
    "Latin-1": (latin1, "evaluate", ("X_train_update.csv", "UTF-8", "line 2")),
    "unknown code": (unknown_code, "check", ("Y_train_CVw08PX.csv", "row 0", "prdtypecode", "'31'")),
    "an id that is no number": (bad_id, "predict", ("X_train_update.csv", "row 0", "productid", "'12a'")),
    "a line of another length": (short_line, "check", ("X_train_update.csv", "line ", "found 2")),
}

def command(name: str, catalog: Path, bundle: Path, out: Path) -> list[object]:
    "The arguments of a command that reads a catalogue and writes a file."
    return {"check": ["check", catalog, "--quarantine", out / "quarantine.csv"],
            "train": ["train", catalog, "--bundle", out / "bundle", "--experts", "text_linear"],
            "evaluate": ["evaluate", bundle, catalog, "--json", out / "figures.json"],
            "predict": ["predict", bundle, catalog, "--out", out / "predictions.csv"]}[name]

COMMANDS = "check", "train", "evaluate", "predict"
BY_ALL = "unknown code" # tried with all commands; the others with one
CASES = [(how, who) for how, (_, own, _) in REFUSED.items() for who in (COMMANDS if how == BY_ALL else (own,))]

@pytest.mark.parametrize(("how", "who"), CASES)
def test_refuses_a_damaged_catalogue(
    how: str, who: str, catalog: Path, bundle: Path, rakuten: Run, tmp_path: Path,
) -> None:
    damage, _, named = REFUSED[how]
    damage(catalog)
    (out := tmp_path / "out").mkdir()
    before = content(tmp_path)
    refused(rakuten(*command(who, catalog, bundle, out)), *named)
    assert content(tmp_path) == before, "something was written"

# --- quarantined

def png_header(side: int) -> bytes:
    "A small PNG whose header declares side × side pixels."
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    size, pixels = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), zlib.compress(b"\0" * 999)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")

def jpeg_header(jpeg: bytes, side: int) -> bytes:
    "A JPEG whose frame header declares side × side pixels."
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", side, side) + jpeg[at + 4 :]

ROWS = { # row of X_train → kind of picture, reason of quarantine
    1: ("truncated", "picture: truncated"),
    2: ("empty", "picture: empty file"),
    3: ("text", "picture: not a JPEG, PNG or WebP picture"),
    4: ("bomb.png", "picture: 40000×40000 pixels"),
    5: ("bomb.jpg", "picture: 40000×40000 pixels"),
}
# Rows with a bad picture and no text, with neither title nor picture, and with one id and two labels.
BAD_PICTURE_ALONE, NOTHING, TWICE, AGAIN = 6, 7, 8, 9
REASONS = {row: why for row, (_, why) in ROWS.items()} | {
    BAD_PICTURE_ALONE: "picture: truncated", NOTHING: "neither title nor picture",
    TWICE: "product id with 2 different labels", AGAIN: "product id with 2 different labels"}

def other_label(label: str) -> str:
    "Another code."
    return "10" if label != "10" else "2583"

@pytest.fixture(scope="session")
def poor(shared: Path, healthy: Path, sample_catalog: Path) -> Path:
    "The healthy catalogue with every kind of quarantined part, and one good picture."
    def make(part: Path) -> None:
        shutil.copytree(healthy, part, dirs_exist_ok=True)
        jpeg = next(iter(sorted((sample_catalog / "image_train").iterdir()))).read_bytes()
        contents = {"truncated": jpeg[: len(jpeg) // 2], "empty": b"", "text": b"this is no picture\n" * 50,
                    "bomb.png": png_header(40_000), "bomb.jpg": jpeg_header(jpeg, 40_000)}
        x, y = (pd.read_csv(part / name, **INDEX) for name in ("X_train_update.csv", "Y_train_CVw08PX.csv"))
        texts = [x.columns.get_loc("designation"), x.columns.get_loc("description")]
        x.iloc[[BAD_PICTURE_ALONE, NOTHING], texts] = ""
        x.iloc[AGAIN, x.columns.get_loc("productid")] = x["productid"].iloc[TWICE]
        y.iloc[AGAIN, 0] = other_label(y["prdtypecode"].iloc[TWICE])
        x.to_csv(part / "X_train_update.csv", lineterminator="\n")
        y.to_csv(part / "Y_train_CVw08PX.csv", lineterminator="\n")
        (folder := part / "image_train").mkdir()
        pictures = {0: jpeg, BAD_PICTURE_ALONE: contents["truncated"]}
        pictures |= {row: contents[kind] for row, (kind, _) in ROWS.items()}
        for row, raw in pictures.items():
            name = f"image_{x['imageid'].iloc[row]}_product_{x['productid'].iloc[row]}.jpg"
            (folder / name).write_bytes(raw)
    return once(shared / "poor", make)

def lines(path: Path) -> list[dict[str, str]]:
    "The lines of a CSV file."
    with path.open(encoding="utf-8", newline="") as f: return list(csv.DictReader(f))

# A product with nothing but a bad picture counts twice.
COUNTS = {"picture: truncated": 2, "picture: empty file": 1, "picture: not a JPEG, PNG or WebP picture": 1,
          "picture: 40000×40000 pixels": 2, "product id with 2 different labels": 2, "neither title nor picture": 2}

def test_check_lists_quarantined_parts_with_their_reasons(poor: Path, rakuten: Run, tmp_path: Path) -> None:
    out = tmp_path / "quarantine.csv"
    answer = rakuten("check", poor, "--quarantine", out)
    assert answer.returncode == 0, answer.stderr
    assert out.read_text(encoding="utf-8").splitlines()[0] == "productid,imageid,file,reason"
    x, quarantined = pd.read_csv(poor / "X_train_update.csv", **INDEX), lines(out)
    for row, reason in REASONS.items():
        ids = x["productid"].iloc[row], x["imageid"].iloc[row]
        own = [q for q in quarantined if (q["productid"], q["imageid"]) == ids]
        assert any(q["reason"].startswith(reason) for q in own), f"row {row}: {reason}"
        if reason.startswith("picture"): assert any(q["file"].startswith("image_") for q in own)
    assert len(quarantined) == sum(COUNTS.values())
    assert f"{len(quarantined)} quarantined" in answer.stdout
    for reason, n in COUNTS.items(): assert re.search(rf"{reason}[^\n]*\D{n}\D", answer.stdout), "counted by reason"

@pytest.mark.parametrize("who", ["train", "evaluate", "predict"])
def test_every_command_counts_quarantined_parts(
    who: str, poor: Path, bundle: Path, rakuten: Run, tmp_path: Path,
) -> None:
    answer = rakuten(*command(who, poor, bundle, tmp_path))
    assert answer.returncode == 0, answer.stderr
    for reason, n in COUNTS.items(): assert f"{n} × {reason}" in answer.stderr

def test_predict_writes_a_line_for_every_product(
    poor: Path, bundle: Path, rakuten: Run, tmp_path: Path,
) -> None:
    out = tmp_path / "predictions.csv"
    answer = rakuten("predict", bundle, poor, "--out", out)
    assert answer.returncode == 0, answer.stderr
    ids = pd.concat([pd.read_csv(poor / f"X_{split}_update.csv", **INDEX) for split in ("train", "test")])
    predictions = lines(out)
    in_order = list(zip(ids["productid"], ids["imageid"], strict=True))
    assert [(p["productid"], p["imageid"]) for p in predictions] == in_order
    unanswered = {row: p for row, p in enumerate(predictions) if not p["prdtypecode"]}
    assert set(unanswered) == {BAD_PICTURE_ALONE, NOTHING}
    assert "truncated" in unanswered[BAD_PICTURE_ALONE]["error"]
    assert unanswered[NOTHING]["error"] == "neither title nor picture"
    assert [row for row, p in enumerate(predictions) if p["error"] and row not in unanswered] == []
    for row in ROWS: assert predictions[row]["experts"] == "text_linear:1.000", "a bad picture: the text is used"
    assert "image:" in predictions[0]["experts"]
    assert "2 without a prediction" in answer.stdout

def test_contradictory_and_empty_rows_are_no_training_rows(poor: Path, rakuten: Run, tmp_path: Path) -> None:
    answer = rakuten("train", poor, "--bundle", tmp_path / "bundle", "--experts", "text_linear")
    assert answer.returncode == 0, answer.stderr
    about = json.loads((tmp_path / "bundle/bundle.json").read_text(encoding="utf-8"))
    assert about["data"]["rows"] == PRODUCTS - len({BAD_PICTURE_ALONE, NOTHING, TWICE, AGAIN})

# --- warnings

def test_a_class_with_one_row_causes_a_warning_and_is_trained_on(catalog: Path, rakuten: Run, tmp_path: Path) -> None:
    labels = ["60", *["10", "2583", "1560"] * 20]
    edit(catalog / "Y_train_CVw08PX.csv", lambda y: y.assign(prdtypecode=labels[: len(y)]))
    answer = rakuten("check", catalog)
    assert answer.returncode == 0, answer.stderr
    assert "60 (1)" in answer.stdout
    answer = rakuten("train", catalog, "--bundle", tmp_path / "bundle", "--experts", "text_linear,image")
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / "bundle/bundle.json").exists()

# --- too little data

def relabel(catalog: Path, labels: list[str]) -> None:
    "Cut the catalogue to as many products as there are labels, and set these labels."
    edit(catalog / "X_train_update.csv", lambda x: x.iloc[: len(labels)])
    edit(catalog / "Y_train_CVw08PX.csv", lambda y: y.iloc[: len(labels)].assign(prdtypecode=labels))

TOO_LITTLE = {"49 products": (["10", "40"] * 24 + ["60"], "found 49 of 3"),
              "one class": (["10"] * PRODUCTS, "found 60 of 1")}

@pytest.mark.parametrize(("labels", "found"), TOO_LITTLE.values(), ids=TOO_LITTLE)
def test_training_on_too_little_data_exits_with_4(
    labels: list[str], found: str, catalog: Path, rakuten: Run, tmp_path: Path,
) -> None:
    relabel(catalog, labels)
    before = content(tmp_path)
    refused(rakuten("train", catalog, "--bundle", tmp_path / "bundle"), "at least 50", "2 product types", found, code=4)
    assert content(tmp_path) == before

def test_fifty_products_of_two_classes_suffice(catalog: Path, rakuten: Run, tmp_path: Path) -> None:
    relabel(catalog, ["10", "40"] * 25)
    (params := tmp_path / "params.yaml").write_text("split: {folds: 2}", encoding="utf-8") # in fewer folds
    answer = rakuten("train", catalog, "--bundle", tmp_path / "bundle", "--params", params)
    assert answer.returncode == 0, answer.stderr

def test_evaluating_without_labels_exits_with_4(catalog: Path, bundle: Path, rakuten: Run) -> None:
    (catalog / "Y_train_CVw08PX.csv").unlink()
    refused(rakuten("evaluate", bundle, catalog), "labelled products", code=4)

# --- output paths and options

def place_below_a_file(out: Path) -> Path:
    (out / "file").write_text("", encoding="utf-8")
    return out / "file" / "below"

def place_of_a_folder(out: Path) -> Path:
    (out / "folder").mkdir()
    return out / "folder"

def place_of_something_else(out: Path) -> Path:
    (out / "other").mkdir()
    (out / "other/thesis.txt").write_text("years of work", encoding="utf-8")
    return out / "other"

PLACES: dict[str, tuple[str, Callable[[Path], Path]]] = { # command, path that it is to write
    "predict below a file": ("predict", place_below_a_file),
    "predict onto a folder": ("predict", place_of_a_folder),
    "train below a file": ("train", place_below_a_file),
    "train over something else": ("train", place_of_something_else),
    "check below a file": ("check", place_below_a_file),
    "check onto a folder": ("check", place_of_a_folder),
    "evaluate below a file": ("evaluate", place_below_a_file),
    "sample below a file": ("sample", place_below_a_file),
    "sample over a catalogue": ("sample", lambda out: out / "catalog"),
}

@pytest.mark.parametrize("how", PLACES)
def test_refuses_a_path_that_cannot_be_written(
    how: str, catalog: Path, bundle: Path, rakuten: Run, tmp_path: Path,
) -> None:
    who, prepare = PLACES[how]
    place = prepare(tmp_path)
    arguments = {"predict": [bundle, catalog, "--out", place], "train": [catalog, "--bundle", place],
                 "check": [catalog, "--quarantine", place], "evaluate": [bundle, catalog, "--json", place],
                 "sample": [place, "--products", 30, "--no-images"]}[who]
    before = content(tmp_path)
    refused(rakuten(who, *arguments), str(place))
    assert content(tmp_path) == before

def params(text: str) -> Callable[[Path], list[object]]:
    "Options that give a params.yaml."
    def options(folder: Path) -> list[object]:
        (folder / "params.yaml").write_text(text, encoding="utf-8")
        return ["--params", folder / "params.yaml"]
    return options

OPTIONS: dict[str, tuple[Callable[[Path], list[object]], tuple[str, ...]]] = { # options of train, words of the error
    "unknown expert": (lambda _: ["--experts", "text,smell"], ("'smell'", "text_linear", "image")),
    "unknown section": (params("splitt:\n  folds: 3\n"), ("params.yaml", "splitt", "split, ", "gate")),
    "a section twice": (params("split: {folds: 3}\nsplit: {folds: 4}\n"),
                        ("params.yaml", "line 2: 'split' stands there a second time")),
    "unknown parameter": (params("split:\n  fold: 3\n"), ("params.yaml", "split.fold", "expected folds, gold_share")),
    "unknown parameter of an expert":
        (params("text:\n  experts:\n    text_linear:\n      c: 2\n"), ("'c'", "text_linear", "C, max_chars")),
    "a value that does not fit": (params("split:\n  folds: many\n"), ("params.yaml", "split.folds", "'many'")),
    "not YAML": (params("split: [\n"), ("params.yaml", "YAML")),
    "no such file": (lambda folder: ["--params", folder / "nowhere.yaml"], ("nowhere.yaml",)),
}

@pytest.mark.parametrize("how", OPTIONS)
def test_refuses_a_wrong_option(how: str, healthy: Path, rakuten: Run, tmp_path: Path) -> None:
    options, named = OPTIONS[how]
    given = options(tmp_path)
    before = content(tmp_path)
    refused(rakuten("train", healthy, "--bundle", tmp_path / "bundle", *given), *named)
    assert content(tmp_path) == before

def test_refuses_an_unknown_split(healthy: Path, bundle: Path, rakuten: Run, tmp_path: Path) -> None:
    answer = rakuten("predict", bundle, healthy, "--out", tmp_path / "predictions.csv", "--split", "gold")
    refused(answer, "--split", "'gold'")

def test_refuses_a_folder_that_is_no_bundle(healthy: Path, rakuten: Run, tmp_path: Path) -> None:
    answer = rakuten("predict", healthy, healthy, "--out", tmp_path / "predictions.csv")
    refused(answer, str(healthy / "bundle.json"))
    assert list(tmp_path.iterdir()) == []
