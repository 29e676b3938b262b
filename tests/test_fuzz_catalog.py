"""Mutated catalogues: each is read or refused in one line, and a label never leaves its product."""
import csv
import io
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.errors import InputError
from rakuten_nb.taxonomy import CODES

X, Y = "X_train_update.csv", "Y_train_CVw08PX.csv"
TITLES = ("Piscine ronde", 'Écran 12", neuf', "NA", "Livre, poche", "Jeu\nde société", "", "Console", "Été ; hiver",
          "10", "=1+1")
DESCRIPTIONS = ("", "tuyau de 32 mm", "<b>lot</b>\r\nde 2", "NA", 'dit "le grand"', "", "œuf, coque", "a\tb", "", "fin")
TRUTH = {str(1000 + 7 * i): CODES[i * 2] for i in range(len(TITLES))} # product id → code

Row = dict[str, str] # a product, or its label, with its row number
Rows = list[Row]
draws = st.data()

# --- rows: each change is of both tables, or of one that carries its row numbers then

def first_rows(start: int, step: int) -> Rows:
    "All products with their labels and row numbers."
    texts = enumerate(zip(TITLES, DESCRIPTIONS, TRUTH.items(), strict=True))
    return [{"number": str(start + step * i), "designation": title, "description": text, "productid": pid,
             "imageid": str(i + 50), "prdtypecode": str(code)} for i, (title, text, (pid, code)) in texts]

def change_rows(data: st.DataObject, rows: Rows) -> Rows:
    "Rows in another order, one fewer, or one of them twice."
    kind = data.draw(st.sampled_from(("order", "order", "order", "fewer", "twice", "last")))
    i = data.draw(st.integers(0, len(rows) - 1))
    if kind == "order": return list(data.draw(st.permutations(rows)))
    if kind == "fewer": return rows[:i] + rows[i + 1 :]
    return rows[:i] + rows[i:][:1] + rows[i:] if kind == "twice" else rows[:-1]

def rarely(data: st.DataObject, times: int = 5) -> bool:
    "True in one of a number of cases."
    return data.draw(st.integers(1, times)) == times

# --- columns

def index_cells(data: st.DataObject, rows: Rows, needed: bool) -> list[list[str]]:
    "The columns of row numbers that a program saves: none, one, or two."
    own = [row["number"] for row in rows]
    again = [str(i) for i in range(len(rows))]
    kinds: dict[str, list[list[str]]] = {
        "one": [["", *own]], "it came back": [["Unnamed: 0", *own]], "reset": [["index", *own]],
        "two": [["", *again], ["Unnamed: 0", *own]], "decimals": [["", *(f"{n}.0" for n in own)]],
        "beside an empty one": [["", *own], ["", *[""] * len(own)]],
        "none": [], "an empty one": [["", *[""] * len(own)]]}
    return kinds[data.draw(st.sampled_from(list(kinds)[:6] if needed else [*kinds, *["none"] * 4]))]

def table(data: st.DataObject, rows: Rows, names: tuple[str, ...], needed: bool) -> list[list[str]]: # rows of cells
    "The rows of a file, the header first."
    columns = [[name, *(row[name] for row in rows)] for name in names]
    if rarely(data): columns = list(data.draw(st.permutations(columns)))
    if rarely(data): columns.append(["prix", *(str(n) for n in range(len(rows)))])
    if rarely(data, 30): columns.pop(data.draw(st.integers(0, len(columns) - 1)))
    empty = [["", *[""] * len(rows)]]
    columns = index_cells(data, rows, needed) + columns + empty * max(data.draw(st.integers(-6, 3)), 0)
    if columns and rarely(data, 30):
        columns.insert(data.draw(st.integers(1, len(columns))), ["", "vu", *[""] * (len(rows) - 1)])
    return [list(cells) for cells in zip(*columns, strict=True)]

# --- bytes

STYLES: dict[str, dict[str, object]] = {
    "pandas": {}, "Excel": {"lineterminator": "\r\n"}, "all quoted": {"quoting": csv.QUOTE_ALL},
    "old": {"lineterminator": "\r", "quoting": csv.QUOTE_ALL},
    "semicolons": {"delimiter": ";"}, "tabs": {"delimiter": "\t"}}
ENCODINGS = (*["utf-8"] * 8, *["utf-8-sig"] * 4, "latin-1", "utf-16")

def encode(data: st.DataObject, cells: list[list[str]]) -> bytes:
    "A CSV file as one of many programs writes it."
    style = STYLES[data.draw(st.sampled_from((*["pandas"] * 9, *["Excel"] * 3, *STYLES)))]
    csv.writer(f := io.StringIO(), **{"lineterminator": "\n", **style}).writerows(cells) # type: ignore[arg-type]
    return f.getvalue().encode(data.draw(st.sampled_from(ENCODINGS)), "replace")

INSERTED = (b'"', b'""', b"\xff", b"\0", b"\xef\xbb\xbf", b"\n", b"\r\n", b",", b",,,,\n", b",\n", b"sep=;\n", b" ",
            b"\x1a")

def damage(data: st.DataObject, raw: bytes) -> bytes:
    "A file with a piece inserted, or cut off, or without one line end."
    at = data.draw(st.integers(0, len(raw)))
    kind = data.draw(st.sampled_from(("insert", "insert at a line", "insert at a line", "cut", "join")))
    if kind == "cut": return raw[:at]
    if kind != "insert": at = raw.find(b"\n", at) + 1
    if kind == "join": return raw[: max(at - 1, 0)] + raw[at:]
    return raw[:at] + data.draw(st.sampled_from(INSERTED)) + raw[at:]

# --- the catalogue

def mutated(data: st.DataObject) -> tuple[bytes, bytes]: # X, Y
    "The files of a catalogue."
    rows = first_rows(*data.draw(st.sampled_from(((0, 1), (0, 1), (1, 1), (500, 7)))))
    if rarely(data, 2): rows = change_rows(data, rows)
    if rarely(data): rows = [{**row, "number": str(i)} for i, row in enumerate(rows)]
    missing = data.draw(st.sets(st.integers(0, len(rows) - 1), max_size=2)) if rarely(data, 3) else set()
    rows = [{**row, "prdtypecode": "" if i in missing else row["prdtypecode"]} for i, row in enumerate(rows)]
    alone = [rarely(data, 5) for _ in "XY"]
    x, y = (change_rows(data, rows) if changed else rows for changed in alone)
    files = [encode(data, table(data, x, ("designation", "description", "productid", "imageid"), alone[0])),
             encode(data, table(data, y, ("prdtypecode",), alone[1]))]
    first, second = (damage(data, raw) if rarely(data, 5) else raw for raw in files)
    return first, second

outcomes: Counter[str] = Counter()

def check(data: st.DataObject) -> None:
    "Read a mutated catalogue."
    x, y = mutated(data)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / X).write_bytes(x)
        (Path(folder) / Y).write_bytes(y)
        try: products = read_catalog(folder, max_pixels=10).train
        except InputError as e:
            outcomes["refused"] += 1
            assert len(str(e).splitlines()) == 1 and (X in str(e) or Y in str(e)), str(e)
            return
    outcomes["read"] += 1
    for pid, label in zip(products.productid, products.label, strict=True):
        assert label < 0 or CODES[label] == TRUTH.get(pid, CODES[label]), (pid, x.decode(), y.decode())
    if (products.label >= 0).all(): outcomes["all labelled"] += 1

def fuzz(examples: int) -> Callable[[], None]:
    "A test with a number of mutated catalogues, the same ones in each run."
    options = settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                       suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    return options(given(draws)(check))

def run(examples: int) -> None:
    "Fuzz, and see that both outcomes occur often."
    outcomes.clear()
    fuzz(examples)()
    total = outcomes["read"] + outcomes["refused"]
    assert total >= examples * .9, outcomes
    for outcome in ("read", "refused", "all labelled"): assert outcomes[outcome] > total / 10, outcomes

def test_a_label_never_leaves_its_product() -> None: run(400)

@pytest.mark.heavy
def test_a_label_never_leaves_its_product_in_5000_catalogues() -> None: run(5000)
