"""Catalogues as people's programs save them: what is read, what is refused, and beside which product a label stands."""
import csv
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run, once
from PIL import Image

from rakuten_nb.data.catalog import Catalog, make_products, read_catalog, write_catalog
from rakuten_nb.errors import InputError
from rakuten_nb.taxonomy import CODES

PRODUCTS = 60
X, Y, TEST = "X_train_update.csv", "Y_train_CVw08PX.csv", "X_test_update.csv"
Rows = list[list[object]] # the header, then the rows

@pytest.fixture(scope="session")
def sample(shared: Path) -> Path:
    "60 labelled products and 6 more, without pictures."
    from rakuten_nb.data.sample import make_sample
    return once(shared / "street", lambda part: make_sample(part, PRODUCTS, images=False, progress=False))

def rows_of(path: Path) -> Rows:
    "The rows of a table; numbers are int."
    with path.open(encoding="utf-8", newline="") as f:
        return [[int(cell) if cell.isdigit() else cell for cell in row] for row in csv.reader(f)]

@pytest.fixture(scope="session")
def tables(sample: Path) -> tuple[Rows, Rows]:
    "The rows of the products and of their labels."
    return rows_of(sample / X), rows_of(sample / Y)

def csv_bytes(rows: Rows, separator: str = ",", end: str = "\n", quoted: bool = False, bom: bool = False) -> bytes:
    "A CSV file; `quoted`: quotation marks around each text, as R writes them."
    quoting = csv.QUOTE_NONNUMERIC if quoted else csv.QUOTE_MINIMAL
    csv.writer(f := io.StringIO(), delimiter=separator, lineterminator=end, quoting=quoting).writerows(rows)
    return ("\ufeff" * bom + f.getvalue()).encode()

def write(folder: Path, **files: bytes) -> Path:
    "A catalogue of these tables: x, y and test."
    folder.mkdir(exist_ok=True)
    for name, content in files.items(): (folder / {"x": X, "y": Y, "test": TEST}[name]).write_bytes(content)
    return folder

def truth(tables: tuple[Rows, Rows]) -> dict[str, int | str]:
    "Product id → code, as the sample has them."
    return {str(x[3]): y[1] for x, y in zip(tables[0][1:], tables[1][1:], strict=True)} # type: ignore[misc]

def codes(catalog: Catalog) -> dict[str, int | str]:
    "Product id → code, as read."
    p = catalog.train
    return {i: CODES[label] if label >= 0 else "" for i, label in zip(p.productid, p.label, strict=True)}

# --- the layouts of other programs

def without(rows: Rows) -> Rows: return [row[1:] for row in rows]
def wider(rows: Rows) -> Rows: return [[*row, "", ""] for row in rows]
def renamed(rows: Rows, name: str = "Unnamed: 0") -> Rows: return [[name, *rows[0][1:]], *rows[1:]]
def twice(rows: Rows) -> Rows:
    "Saved by pandas, read without `index_col`, and saved again."
    return [["", "Unnamed: 0", *rows[0][1:]], *([i, *row] for i, row in enumerate(rows[1:]))]
def moved(rows: Rows, seed: int = 0) -> Rows:
    "In another order, with the row numbers."
    return [rows[0], *random.Random(seed).sample(rows[1:], len(rows) - 1)]

class NA(float):
    "A missing value, as R writes it."
    def __str__(self) -> str: return "NA"
    __repr__ = __str__

class RNumber(int):
    "A whole number as R writes it: with an exponent where that is shorter."
    def __str__(self) -> str:
        plain = int.__repr__(self)
        digits = plain.rstrip("0") or "0"
        short = f"{digits[0]}{'.' * (len(digits) > 1)}{digits[1:]}e+{len(plain) - 1:02}"
        return short if len(short) < len(plain) else plain
    __repr__ = __str__

def r_cell(cell: Any) -> Any:
    "A cell as R writes it."
    if cell == "": return NA()
    return RNumber(cell) if isinstance(cell, int) and not isinstance(cell, bool) else cell

def by_r(rows: Rows) -> Rows:
    "As R's `write.csv` writes a data frame: rows numbered from 1 as text, NA for a missing value."
    cells = [[r_cell(cell) for cell in row[1:]] for row in rows[1:]]
    return [rows[0], *([str(n), *row] for n, row in enumerate(cells, 1))]

EXCEL = {"end": "\r\n", "bom": True}
Layout = Callable[[Rows, Rows], tuple[bytes, bytes]]

def both(change: Callable[[Rows], Rows], **style: object) -> Layout:
    "The same change of both tables."
    return lambda x, y: (csv_bytes(change(x), **style), csv_bytes(change(y), **style)) # type: ignore[arg-type]

LAYOUTS: dict[str, Layout] = {
    "pandas": both(list),
    "pandas without index": both(without),
    "pandas, read and saved without its index": both(renamed),
    "pandas, read and saved with two": both(twice),
    "pandas, the index of X came back": lambda x, y: (csv_bytes(renamed(x)), csv_bytes(y)),
    "pandas, X alone saved twice": lambda x, y: (csv_bytes(twice(x)), csv_bytes(y)),
    "pandas, X with the index 0, 1, 2": lambda x, y: (csv_bytes(x), csv_bytes(without(y))),
    "pandas, Y with the index 0, 1, 2": lambda x, y: (csv_bytes(without(x)), csv_bytes(y)),
    "pandas, reset_index": both(lambda rows: renamed(rows, "index")),
    "R's write.csv": both(by_r, quoted=True),
    "R, X read and written without row names": lambda x, y: (csv_bytes(renamed(x, "X"), quoted=True), csv_bytes(y)),
    "LibreOffice Calc": both(list),
    "LibreOffice Calc, on Windows": both(list, end="\r\n"),
    "Excel, CSV UTF-8": both(list, **EXCEL),
    "Excel, CSV UTF-8 without index": both(without, **EXCEL),
    "Excel, formatted columns": both(wider, **EXCEL),
    "empty columns of the header only": both(lambda rows: [[*rows[0], "", ""], *rows[1:]]),
    "empty cells beyond the header": both(lambda rows: [rows[0], *([*row, "", " "] for row in rows[1:])]),
    "lines ended twice": lambda x, y: (csv_bytes(x, end="\r\r\n"), csv_bytes(y)),
    "an old Macintosh": both(list, end="\r", quoted=True),
    "columns in another order": lambda x, y: (csv_bytes([row[::-1] for row in without(x)]), csv_bytes(without(y))),
    "an unnamed empty column in the middle":
        lambda x, y: (csv_bytes([[*row[:2], "", *row[2:]] for row in x]), csv_bytes(y)),
    "row numbers as decimals": lambda x, y: (csv_bytes([x[0], *([f"{r[0]}.0", *r[1:]] for r in x[1:])]), csv_bytes(y)),
    "labels as decimals": lambda x, y: (csv_bytes(x), csv_bytes([y[0], *([r[0], f"{r[1]}.0"] for r in y[1:])])),
    "both moved alike": both(moved),
    "both moved alike, without index": both(lambda rows: without(moved(rows))),
    "X moved, both with an index": lambda x, y: (csv_bytes(moved(x)), csv_bytes(y)),
    "Y moved, both with an index": lambda x, y: (csv_bytes(x), csv_bytes(moved(y))),
    "X moved, the index came back": lambda x, y: (csv_bytes(renamed(moved(x))), csv_bytes(y)),
    "X moved, its index has a name":
        lambda x, y: (csv_bytes(renamed(moved(x), "ligne")), csv_bytes(y)),
    "Y has the ids of the products":
        lambda x, y: (csv_bytes(x), csv_bytes([[*b, a[3]] for a, b in zip(x, y, strict=True)])),
    "Y has no index and the ids of the products":
        lambda x, y: (csv_bytes(without(x)), csv_bytes([[a[3], b[1]] for a, b in zip(x, y, strict=True)])),
    "X moved and saved again, its index is of products":
        lambda x, y: (csv_bytes(twice(moved(numbered(x)))), csv_bytes(numbered(y))),
}

def numbered(rows: Rows) -> Rows:
    "Row numbers that do not begin at 0."
    return [rows[0], *([int(str(row[0])) * 7 + 1000, *row[1:]] for row in rows[1:])]

@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_label_stays_with_its_product(layout: str, tables: tuple[Rows, Rows], tmp_path: Path) -> None:
    x, y = LAYOUTS[layout](*tables)
    catalog = read_catalog(write(tmp_path / "shop", x=x, y=y))
    assert codes(catalog) == truth(tables)
    assert sorted(catalog.train.title) == sorted(str(row[1]) for row in tables[0][1:])
    assert sorted(catalog.train.description) == sorted(str(row[2]) for row in tables[0][1:]), "a missing one is empty"
    remarks = [line for line in catalog.warnings if f"{Y}: its rows are in another order than those of {X}" in line]
    assert bool(remarks) == ("moved, " in layout or "moved and saved" in layout)

CHECKED = ("pandas", "pandas without index", "R's write.csv", "LibreOffice Calc", "Excel, CSV UTF-8",
           "X moved, both with an index")

@pytest.mark.parametrize("layout", CHECKED)
def test_check_reads_the_layout_of_a_program(
    layout: str, tables: tuple[Rows, Rows], rakuten: Run, tmp_path: Path,
) -> None:
    x, y = LAYOUTS[layout](*tables)
    answer = rakuten("check", write(tmp_path / "shop", x=x, y=y))
    assert (answer.returncode, answer.stderr) == (0, "")
    assert re.search(rf"train\D+{PRODUCTS}\D+{PRODUCTS}\D.*\D{PRODUCTS}\D+\n", answer.stdout), answer.stdout
    assert ("labels are matched by row number" in answer.stdout.replace("\n", " ")) == ("moved" in layout)

# --- refused: labels that may stand beside another product

def from_one(rows: Rows) -> Rows: return [rows[0], *([int(str(row[0])) + 1, *row[1:]] for row in rows[1:])]

DOUBTFUL: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "X moved with its index, Y without":
        (lambda x, y: (csv_bytes(moved(x)), csv_bytes(without(y))), ("only in X_train_update.csv", "0, 1, 2", "save")),
    "X moved with its index, which came back, Y without":
        (lambda x, y: (csv_bytes(renamed(moved(x))), csv_bytes(without(y))), ("only in X_train_update.csv",)),
    "Y moved with its index, X without":
        (lambda x, y: (csv_bytes(without(x)), csv_bytes(moved(y))), ("only in Y_train_CVw08PX.csv", X)),
    "Y moved with its index, which came back, X without":
        (lambda x, y: (csv_bytes(without(x)), csv_bytes(renamed(moved(y)))), ("only in Y_train_CVw08PX.csv",)),
    "X moved after reset_index, Y without":
        (lambda x, y: (csv_bytes(renamed(moved(x), "index")), csv_bytes(without(y))), ("only in X_train_update.csv",)),
    "X numbered from 1, Y without":
        (lambda x, y: (csv_bytes(from_one(x)), csv_bytes(without(y))), ("only in X_train_update.csv",)),
    "X numbered from 1, Y from 0":
        (lambda x, y: (csv_bytes(from_one(x)), csv_bytes(y)), ("others, such as '0' in line 2",)),
    "X moved and numbered again, Y as it was":
        (lambda x, y: (csv_bytes(twice(moved(x))), csv_bytes(y)), ("order the rows differently", "delete the column")),
    "X moved and numbered again, Y without":
        (lambda x, y: (csv_bytes(twice(moved(x))), csv_bytes(without(y))), ("only in X_train_update.csv",)),
    "X moved with an index that has a name, Y without":
        (lambda x, y: (csv_bytes(renamed(moved(x), "ligne")), csv_bytes(without(y))), ("(column 'ligne')",)),
    "Y moved with an index that has a name, X without":
        (lambda x, y: (csv_bytes(without(x)), csv_bytes(renamed(moved(y), "Id"))), ("(column 'Id')",)),
    "Y has the ids of the products, moved":
        (lambda x, y: (csv_bytes(without(x)), csv_bytes(moved([[a[3], b[1]] for a, b in zip(x, y, strict=True)]))),
         ("line 2, row 0, field productid: expected", "put the rows")),
    "X moved without index, Y has the ids of the products":
        (lambda x, y: (csv_bytes(without(moved(x))), csv_bytes([[*b, a[3]] for a, b in zip(x, y, strict=True)])),
         ("field productid: expected", "put the rows")),
    "a row number twice, in another order":
        (lambda x, y: (csv_bytes([*x[:2], [0, *x[2][1:]], *x[3:]]), csv_bytes(y)), ("row numbers",)),
    "one label fewer":
        (lambda x, y: (csv_bytes(x), csv_bytes(y[:-1])), ("expected 60 labels", "found 59", "add or delete")),
    "one label fewer, without index":
        (lambda x, y: (csv_bytes(without(x)), csv_bytes(without(y[:-1]))), ("expected 60 labels", "found 59")),
}

@pytest.mark.parametrize("layout", DOUBTFUL)
def test_labels_of_other_rows_are_refused(layout: str, tables: tuple[Rows, Rows], tmp_path: Path) -> None:
    damage, words = DOUBTFUL[layout]
    x, y = damage(*tables)
    with pytest.raises(InputError) as e: read_catalog(write(tmp_path / "shop", x=x, y=y))
    text = str(e.value)
    assert text.startswith(f"{Y}: ") and X in text and len(text.splitlines()) == 1
    for word in words: assert word in text, text

def test_check_refuses_realigned_rows_in_one_line(tables: tuple[Rows, Rows], rakuten: Run, tmp_path: Path) -> None:
    x, y = DOUBTFUL["X moved with its index, Y without"][0](*tables)
    answer = rakuten("check", write(tmp_path / "shop", x=x, y=y))
    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1 and X in answer.stderr and Y in answer.stderr

# --- refused: files that no reader understands without guessing

def line(rows: Rows, number: int, change: Callable[[bytes], bytes]) -> bytes:
    "A table without texts of several lines, one line of which is changed."
    flat = [[str(cell).replace("\n", " ").replace('"', "") for cell in row] for row in rows]
    lines = csv_bytes(flat).splitlines(keepends=True)
    lines[number - 1] = change(lines[number - 1])
    return b"".join(lines)

Damage = Callable[[Rows], bytes]
MISLEADING: dict[str, tuple[Damage, tuple[str, ...]]] = { # X → what the error names
    "an open quotation mark":
        (lambda x: line(x, 7, lambda b: b.replace(b",", b',"', 1)), ("line 7:", "quotation mark")),
    "an open quotation mark in the last row": (lambda x: line(x, 61, lambda b: b[:-1] + b',"\n'), ("line 61:",)),
    "an open quotation mark at the end of a row":
        (lambda x: line(x, 9, lambda b: b.rstrip(b"\n0123456789") + b'"12\n'), ("line 9:", "quotation mark")),
    "a quotation mark inside a quoted text":
        (lambda x: line(x, 5, lambda b: b'3,"ecran 12" neuf",,1,2\n'), ("line 5:", "double it")),
    "empty rows at the end": (lambda x: csv_bytes(x) + b",,,,\n" * 2, ("line ", "empty cells", "1 more", "delete")),
    "an empty row in the middle":
        (lambda x: line(x, 30, lambda b: b",,,,\n" + b), ("line 30:", "empty cells", "delete")),
    "a row of blanks": (lambda x: line(x, 30, lambda b: b + b" ,, ,,\n"), ("line 31:", "empty cells")),
    "a byte-order mark in the middle":
        (lambda x: line(x, 31, lambda b: b"\xef\xbb\xbf" + b), ("line 31:", "byte-order mark", "delete")),
    "two files joined": (lambda x: line(x, 61, lambda b: b + b"\xef\xbb\xbf" + csv_bytes(x)), ("line 62:", "joined")),
    "semicolons": (lambda x: csv_bytes(x, ";"), ("line 1:", "commas", "semicolons", "save")),
    "semicolons, as Excel in France": (lambda x: csv_bytes(x, ";", "\r\n", bom=True), ("line 1:", "semicolons")),
    "semicolons, as R's write.csv2": (lambda x: csv_bytes(by_r(x), ";", quoted=True), ("line 1:", "semicolons")),
    "tabs": (lambda x: csv_bytes(x, "\t"), ("line 1:", "tabs", "save")),
    "vertical bars": (lambda x: csv_bytes(x, "|"), ("line 1:", "vertical bars")),
    "sep=;": (lambda x: b"sep=;\r\n" + csv_bytes(x, ";"), ("line 1:", "'sep=;'", "delete")),
    "sep=,": (lambda x: b"sep=,\r\n" + csv_bytes(x), ("line 1:", "'sep=,'", "delete")),
    "SEP= with a byte-order mark": (lambda x: b'\xef\xbb\xbf"sep=\t"\r\n' + csv_bytes(x, "\t"), ("line 1:", "sep=")),
    "content without a column name": (lambda x: line([[*r, ""] for r in x], 8, lambda b: b[:-1] + b"seen\n"),
                                      ("line 8:", "column 6", "'seen'", "delete")),
    "a comma without quotation marks":
        (lambda x: line(x, 8, lambda b: b"6,rouge, vert,,1,2\n"), ("line 8:", "5 fields", "found 6")),
    "a row cut in two": (lambda x: line(x, 8, lambda b: b[:3] + b"\n" + b[3:]), ("line 8:", "5 fields", "found 2")),
    "UTF-16": (lambda x: csv_bytes(x).decode().encode("utf-16"), ("UTF-16", "save")),
    "UTF-16 without byte-order mark": (lambda x: csv_bytes(x).decode().encode("utf-16-le"), ("zero bytes", "save")),
    "Windows-1252": (lambda x: csv_bytes(x).decode().encode("cp1252", "replace"), ("UTF-8", "line ")),
    "an Excel workbook": (lambda x: b"PK\x03\x04" + bytes(90), ("Excel", "save")),
    "gzip": (lambda x: b"\x1f\x8b" + bytes(90), ("gzip", "save")),
    "an id of letters": (lambda x: line(x, 8, lambda b: b"6,rouge,,12a,2\n"), ("line 8, row 6", "productid", "'12a'")),
}

SHORTENED = {"9.32e+08": "932000000", "4e+05": "400000", "3.80473e+09": "3804730000"}

@pytest.mark.parametrize("cell, number", SHORTENED.items())
def test_reads_an_id_that_r_has_shortened(cell: str, number: str, tables: tuple[Rows, Rows], tmp_path: Path) -> None:
    x = csv_bytes([tables[0][0], *([*row[:3], cell, *row[4:]] for row in tables[0][1:2])])
    catalog = read_catalog(write(tmp_path / "shop", x=x))
    assert catalog.products.productid.tolist() == [number]

@pytest.mark.parametrize("cell", ["3.80473E+09", "3,80473E+09", "1.5e+00", "1e+99", "9.32e8"])
def test_refuses_an_id_that_has_lost_digits(cell: str, tables: tuple[Rows, Rows], tmp_path: Path) -> None:
    x = csv_bytes([tables[0][0], *([*row[:3], cell, *row[4:]] for row in tables[0][1:2])])
    with pytest.raises(InputError, match=r"line 2, row 0, field productid: expected a whole number; found") as e:
        read_catalog(write(tmp_path / "shop", x=x))
    assert ("a spreadsheet has shortened it" in str(e.value)) == ("E+" in cell)

@pytest.mark.parametrize("how", MISLEADING)
def test_an_error_names_file_and_line(how: str, tables: tuple[Rows, Rows], tmp_path: Path) -> None:
    damage, words = MISLEADING[how]
    shop = write(tmp_path / "shop", x=damage(tables[0]), y=csv_bytes(tables[1]))
    with pytest.raises(InputError) as e: read_catalog(shop)
    text = str(e.value)
    assert text.startswith(f"{X}: ") and Y not in text and len(text.splitlines()) == 1, text
    assert "found" in text or "is not (save" in text
    for word in words: assert word in text, text

@pytest.mark.parametrize("how", ["semicolons", "sep=;", "a byte-order mark in the middle", "tabs"])
def test_an_error_of_the_labels_names_their_file(how: str, tables: tuple[Rows, Rows], tmp_path: Path) -> None:
    damage, words = MISLEADING[how]
    with pytest.raises(InputError, match=f"^{Y}: ") as e:
        read_catalog(write(tmp_path / "shop", x=csv_bytes(tables[0]), y=damage(tables[1])))
    for word in words: assert word in str(e.value)

def test_check_refuses_semicolons_in_one_line(tables: tuple[Rows, Rows], rakuten: Run, tmp_path: Path) -> None:
    x, y = both(list, separator=";", **EXCEL)(*tables)
    answer = rakuten("check", write(tmp_path / "shop", x=x, y=y))
    assert answer.returncode == 2 and len(answer.stderr.splitlines()) == 1 and "semicolons" in answer.stderr

# --- an index of X_test, and the order of predictions

def test_predictions_are_in_the_order_of_the_rows(
    sample: Path, bundle: Path, tables: tuple[Rows, Rows], rakuten: Run, tmp_path: Path,
) -> None:
    test, predicted = rows_of(sample / TEST), []
    for number, rows in enumerate((test, moved(test), without(moved(test)), renamed(moved(test)))):
        shop = write(tmp_path / f"shop{number}", x=csv_bytes(tables[0]), test=csv_bytes(rows))
        answer = rakuten("predict", bundle, shop, "--out", out := tmp_path / f"{number}.csv", "--split", "test")
        assert answer.returncode == 0, answer.stderr
        with out.open(encoding="utf-8", newline="") as f: lines = list(csv.DictReader(f))
        position = rows[0].index("productid")
        assert [p["productid"] for p in lines] == [str(row[position]) for row in rows[1:]]
        predicted.append({p["productid"]: p["prdtypecode"] for p in lines})
    assert predicted == [predicted[0]] * 4, "a product's prediction does not depend on its row number"

# --- labels that training contradicts

@pytest.fixture(scope="session")
def hundred(shared: Path) -> Path:
    "120 labelled products, without pictures."
    from rakuten_nb.data.sample import make_sample
    return once(shared / "hundred", lambda part: make_sample(part, 120, images=False, progress=False))

@pytest.mark.parametrize("beside", ["the right rows", "other rows"])
def test_train_warns_of_labels_beside_other_rows(beside: str, hundred: Path, rakuten: Run, tmp_path: Path) -> None:
    x, y = rows_of(hundred / X), rows_of(hundred / Y)
    y = y if beside == "the right rows" else moved(y)
    shop = write(tmp_path / "shop", x=csv_bytes(without(x)), y=csv_bytes(without(y)))
    (params := tmp_path / "params.yaml").write_text("split: {folds: 3}", encoding="utf-8")
    command = "train", shop, "--bundle", tmp_path / "bundle", "--experts", "text_linear", "--params", params
    answer = rakuten(*command)
    assert answer.returncode == 0, answer.stderr
    warned = [line for line in answer.stderr.splitlines() if "near the majority baseline" in line]
    assert len(warned) == (beside == "other rows"), answer.stderr
    for line in warned: assert line.startswith("warning: ") and X in line and Y in line

# --- products without a label

@pytest.mark.parametrize("missing", ["", " ", "NA", "NaN"])
def test_an_unlabelled_product_is_predicted_and_not_trained_on(
    missing: str, tables: tuple[Rows, Rows], tmp_path: Path,
) -> None:
    x, y = tables
    y = [y[0], *([row[0], missing if row[0] in (3, 59) else row[1]] for row in y[1:])]
    catalog = read_catalog(write(tmp_path / "shop", x=csv_bytes(x), y=csv_bytes(y)))
    assert len(catalog.train) == PRODUCTS and len(catalog.labelled) == PRODUCTS - 2
    assert (catalog.train.label < 0).nonzero()[0].tolist() == [3, 59]
    assert "products without a label: 2" in catalog.warnings

def test_blank_lines_are_unlabelled_products_where_labels_have_one_column(
    tables: tuple[Rows, Rows], tmp_path: Path,
) -> None:
    x, labels = csv_bytes(without(tables[0])), [str(row[1]) for row in tables[1]]
    labels[1] = labels[4] = labels[60] = ""
    for end in ("\n", "\r\n"): # the last product has no label either
        catalog = read_catalog(write(tmp_path / "shop", x=x, y=("\n".join(labels) + end).encode()))
        assert (catalog.train.label < 0).nonzero()[0].tolist() == [0, 3, 59]

@pytest.mark.parametrize("surplus", [1, 3])
def test_blank_lines_after_the_last_label_are_none(surplus: int, tables: tuple[Rows, Rows], tmp_path: Path) -> None:
    x, labels = csv_bytes(without(tables[0])), csv_bytes(without(tables[1]))
    shop = write(tmp_path / "shop", x=x, y=labels + b"\n" * surplus)
    assert codes(read_catalog(shop)) == truth(tables)
    write(shop, y=labels.replace(b"\n", b"\n\n", 2)[:-1] + b"\n" * surplus) # blank lines before the first labels
    with pytest.raises(InputError, match=f"^{Y}: expected 60 labels"): read_catalog(shop)

def test_a_catalogue_with_unlabelled_products_is_written_and_trained_on(
    tables: tuple[Rows, Rows], rakuten: Run, tmp_path: Path,
) -> None:
    y = [tables[1][0], *([row[0], "" if i % 10 == 9 else row[1]] for i, row in enumerate(tables[1][1:]))]
    first = read_catalog(write(tmp_path / "shop", x=csv_bytes(tables[0]), y=csv_bytes(y)))
    again = read_catalog(write_catalog(tmp_path / "again", first.train))
    assert np.array_equal(first.train.label, again.train.label) and (again.train.label < 0).sum() == 6
    answer = rakuten("train", tmp_path / "again", "--bundle", tmp_path / "bundle", "--experts", "text_linear")
    assert answer.returncode == 0, answer.stderr
    assert json.loads((tmp_path / "bundle/bundle.json").read_text(encoding="utf-8"))["data"]["rows"] == PRODUCTS - 6
    answer = rakuten("predict", tmp_path / "bundle", tmp_path / "again", "--out", out := tmp_path / "p.csv")
    assert answer.returncode == 0, answer.stderr
    with out.open(encoding="utf-8", newline="") as f: assert len(list(csv.DictReader(f))) == PRODUCTS

@pytest.mark.parametrize(("cell", "word"), [("99", "'99'"), ("10.5", "'10.5'"), ("livre", "'livre'"), ("-10", "'-10'")])
def test_another_label_is_refused(cell: str, word: str, tables: tuple[Rows, Rows], tmp_path: Path) -> None:
    y = [row if row[0] != 3 else [3, cell] for row in tables[1]]
    error = f"^{Y}: line 5, row 3, field prdtypecode: expected one of .*, or nothing"
    with pytest.raises(InputError, match=error) as e:
        read_catalog(write(tmp_path / "shop", x=csv_bytes(tables[0]), y=csv_bytes(y)))
    assert word in str(e.value)

# --- picture files

def picture(kind: str, grey: int = 200) -> bytes:
    "A small picture."
    Image.new("RGB", (40, 30), (grey, 20, 90)).save(f := io.BytesIO(), kind)
    return f.getvalue()

NAMES = { # name of the file → its content; product 7 with image 12
    "image_12_product_7.jpg": "JPEG", "image_12_product_7.JPG": "JPEG", "image_12_product_7.jpeg": "JPEG",
    "image_12_product_7.JPEG": "JPEG", "image_12_product_7.png": "PNG", "image_12_product_7.PNG": "PNG",
    "image_12_product_7.webp": "WEBP", "image_12_product_7.WebP": "WEBP", "IMAGE_12_PRODUCT_7.JPG": "JPEG",
    "image_0012_product_7.jpg": "JPEG", "image_12_product_007.jpg": "JPEG", "image_12_product_7.JpG": "PNG",
    "image_00012_product_07.PNG": "WEBP",
}

def shop_with(folder: Path, files: dict[str, bytes], productid: str = "7", imageid: str = "12") -> Catalog:
    "A catalogue of two products; these files are in its picture folder."
    p = make_products(["Jeu", "Livre"], productid=[productid, "8"], imageid=[imageid, "13"], prdtypecode=[40, 10])
    write_catalog(folder, p)
    (folder / "image_train").mkdir()
    for name, content in files.items(): (folder / "image_train" / name).write_bytes(content)
    return read_catalog(folder)

@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_found_under_an_ordinary_name(name: str, tmp_path: Path) -> None:
    catalog = shop_with(tmp_path / "shop", {name: picture(NAMES[name])})
    assert [p and p.name for p in catalog.train.picture] == [name, None] and catalog.quarantine == []
    assert (catalog.pictures[0].used, catalog.pictures[0].unused) == (1, [])

@pytest.mark.parametrize("ids", [("007", "12"), ("7", "0012"), ("07", "012")])
def test_leading_zeros_of_an_id_do_not_matter(ids: tuple[str, str], tmp_path: Path) -> None:
    catalog = shop_with(tmp_path / "shop", {"image_12_product_7.jpg": picture("JPEG")}, *ids)
    assert catalog.train.has_picture.tolist() == [True, False]
    assert catalog.train.productid.tolist() == [ids[0], "8"], "the id itself stays"

def test_the_name_of_the_challenge_comes_first(tmp_path: Path) -> None:
    names = "image_12_product_7.jpeg", "image_12_product_7.jpg", "image_012_product_7.jpg"
    files = {name: picture("JPEG") for name in names}
    catalog = shop_with(tmp_path / "shop", files)
    assert catalog.train.picture[0].name == "image_12_product_7.jpg"
    assert catalog.pictures[0].unused == ["image_012_product_7.jpg", "image_12_product_7.jpeg"]

def test_check_counts_pictures_that_are_not_used(rakuten: Run, tmp_path: Path) -> None:
    files = {name: picture("JPEG") for name in ("image_12_product_7.JPG", "photo 13.jpg", "image_99_product_99.jpg")}
    shop_with(tmp_path / "shop", files | {".DS_Store": b"", "Thumbs.db": b""})
    answer = rakuten("check", tmp_path / "shop")
    assert answer.returncode == 0, answer.stderr
    assert re.search(r"image_train/\D+1\D+2\D+image_99_product_99.jpg, photo\s13.jpg", answer.stdout), answer.stdout

# --- numbers in params.yaml

@pytest.mark.parametrize(("text", "folds", "precision"), [
    ("split: {folds: 1e1}\nfuse: {prior_precision: 1e1}", 10, 10), ("fuse: {prior_precision: 5E-1}", 5, .5),
    ("fuse: {prior_precision: +2e+2}", 5, 200), ("split: {folds: 4}\nfuse: {prior_precision: 1.5e1}", 4, 15)])
def test_a_number_with_an_exponent_is_a_number(text: str, folds: int, precision: float, tmp_path: Path) -> None:
    from rakuten_nb.models.training import read_params
    (path := tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    params = read_params(path)
    assert (params.split.folds, params.fuse.prior_precision) == (folds, precision)

@pytest.mark.parametrize("value", ["'1e1x'", "1e", "ten", "1,5"])
def test_a_text_for_a_number_is_refused(value: str, tmp_path: Path) -> None:
    from rakuten_nb.models.training import read_params
    (path := tmp_path / "params.yaml").write_text(f"fuse:\n  prior_precision: {value}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"params\.yaml: fuse\.prior_precision: .*number.*; found "): read_params(path)
