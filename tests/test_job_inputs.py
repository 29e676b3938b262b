"""Uploads as people's programs send them: pictures under other names, archives of Windows, foreign files beside the
table, forms with text around them, other kinds of file, compressed bodies."""
import bz2
import csv
import gzip
import io
import lzma
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_process import USERS, ApiProcess
from conftest import Run
from PIL import Image
from test_jobs import Header, accepted, ended, job_folders, part_of, predicted, problem, send, zipped

@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], bundle: Path) -> Iterator[ApiProcess]:
    "A running API with a worker."
    with ApiProcess(env, tmp_path_factory.mktemp("jobs"), bundle, RAKUTEN_EMBEDDED_WORKER="true") as running:
        running.add_users(**USERS)
        yield running

@pytest.fixture(scope="module")
def marie(api: ApiProcess) -> Header:
    "The authorization header of a user."
    return api.token("marie")

def run_job(api: ApiProcess, header: Header, archive: bytes) -> tuple[dict[str, Any], list[dict[str, str]]]:
    "The last state of a job and its predictions."
    job = accepted(send(api, header, archive))
    state = ended(api, header, job)
    assert state["status"] == "succeeded", state
    text = api.client.get(f"/jobs/{job}/predictions.csv", headers=header).text
    return state, list(csv.DictReader(io.StringIO(text)))

def refused(api: ApiProcess, header: Header, content: bytes, status: int = 422) -> str:
    "The reason why a file is refused; nothing of it stays on the disk."
    before = job_folders(api)
    detail = problem(send(api, header, content), status)
    assert job_folders(api) == before and str(api.home) not in detail
    return detail

# --- names of pictures

TABLE = "designation,description,productid,imageid\nPiscine ronde,,7,12\nLot de cartes,,8,13\n"

def picture(kind: str = "JPEG", colour: str = "navy") -> bytes:
    "A picture of one colour."
    Image.new("RGB", (80, 60), colour).save(file := io.BytesIO(), kind)
    return file.getvalue()

USED = ["image_12_product_7.jpg", "image_12_product_7.JPG", "image_12_product_7.jpeg", "image_12_product_7.Jpeg",
        "IMAGE_12_PRODUCT_7.JPG", "image_12_product_7.png", "image_12_product_7.PNG", "image_12_product_7.webp",
        "image_12_product_7.WEBP", "image_0012_product_7.jpg", "image_12_product_007.JPG",
        "images/image_train/image_12_product_7.JPG", "C\\image_12_product_7.JPG", "./image_12_product_7.jpg"]

@pytest.mark.parametrize("name", USED)
def test_a_picture_with_an_ordinary_name_is_used(name: str, api: ApiProcess, marie: Header) -> None:
    state, rows = run_job(api, marie, zipped({"X.csv": TABLE.encode(), name: picture("WEBP")}))
    assert ["image" in row["experts"] for row in rows] == [True, False]
    assert state["pictures"] == {"used": 1, "not_used": 0, "examples": []}

@pytest.mark.parametrize(("productid", "imageid"), [("007", "12"), ("7", "0012"), ("0007", "00012")])
def test_leading_zeros_of_the_table_do_not_matter(productid: str, imageid: str, api: ApiProcess, marie: Header) -> None:
    table = f"designation,description,productid,imageid\nPiscine ronde,,{productid},{imageid}\n".encode()
    state, (row,) = run_job(api, marie, zipped({"X.csv": table, "image_12_product_7.JPG": picture()}))
    assert "image" in row["experts"] and (row["productid"], row["imageid"]) == (productid, imageid)
    assert state["pictures"]["used"] == 1

def test_each_row_gets_its_own_picture_first(api: ApiProcess, marie: Header) -> None:
    table = b"designation,description,productid,imageid\nJeu,,7,12\nJeu,,07,12\n"
    files = {"X.csv": table, "image_12_product_07.jpg": b"not a picture", "image_12_product_7.png": picture("PNG")}
    _, rows = run_job(api, marie, zipped(files))
    assert ["image" in row["experts"] for row in rows] == [True, False]
    assert [row["warning"] for row in rows] == ["", "picture: not a JPEG, PNG or WebP picture"]
    del files["image_12_product_7.png"]
    _, rows = run_job(api, marie, zipped(files))
    assert [bool(row["warning"]) for row in rows] == [False, True], "the file 07 belongs to the row 07"

UNUSED = ["IMG_0001.jpg", "image_12_product_7.gif", "image_12_product_7 (1).jpg", "image_99_product_7.jpg", "notes.txt"]

def test_files_that_no_row_uses_are_counted_with_examples(api: ApiProcess, marie: Header) -> None:
    files = {"X.csv": TABLE.encode(), "image_12_product_7.JPG": picture(), "image_12_product_7.png": picture("PNG")}
    ignored = ["__MACOSX/._X.csv", ".DS_Store", "a/Thumbs.db", "desktop.ini", "X.csv:Zone.Identifier"]
    state, rows = run_job(api, marie, zipped(files | dict.fromkeys([*UNUSED, *ignored], b"x")))
    assert "image" in rows[0]["experts"]
    unused = sorted([*UNUSED, "image_12_product_7.png"])
    assert state["pictures"] == {"used": 1, "not_used": len(unused), "examples": unused[:5]}
    jobs = api.client.get("/jobs", headers=marie).json()["jobs"]
    assert next(j for j in jobs if j["id"] == state["id"])["pictures"] == state["pictures"]

def test_a_table_without_archive_has_no_count(api: ApiProcess, marie: Header) -> None:
    assert run_job(api, marie, TABLE.encode())[0]["pictures"] is None

def renamed(catalog: Path, folder: Path, name: Callable[[str], str]) -> Path:
    "A copy of a catalogue whose pictures have other names."
    shutil.copytree(catalog, folder)
    for path in list((folder / "image_train").iterdir()): path.rename(path.with_name(name(path.name)))
    return folder

def test_command_line_and_job_use_the_same_names(api: ApiProcess, marie: Header, sample_catalog: Path, bundle: Path,
                                                 rakuten: Run, tmp_path: Path) -> None:
    plain = part_of(sample_catalog, tmp_path / "plain/catalogue", 12, pictures=True)
    expected = predicted(rakuten, bundle, plain)
    names = str.upper, lambda n: n.replace(".jpg", ".JPEG"), lambda n: re.sub(r"_(\d)", r"_0\1", n)
    for i, name in enumerate(names):
        catalog = renamed(plain, tmp_path / f"{i}/catalogue", name)
        assert predicted(rakuten, bundle, catalog) == expected
        files = {p.relative_to(catalog).as_posix(): p.read_bytes() for p in catalog.rglob("*") if p.is_file()}
        job = accepted(send(api, marie, zipped(files)))
        assert ended(api, marie, job)["pictures"]["not_used"] == 0
        assert api.client.get(f"/jobs/{job}/predictions.csv", headers=marie).content == expected

def test_predict_names_the_files_that_it_does_not_use(sample_catalog: Path, bundle: Path, rakuten: Run,
                                                      tmp_path: Path) -> None:
    catalog = part_of(sample_catalog, tmp_path / "catalogue", 5, pictures=True)
    (catalog / "image_train/IMG_0001.jpg").write_bytes(picture())
    run = rakuten("predict", bundle, catalog, "--out", tmp_path / "p.csv")
    assert run.returncode == 0 and "1 files not used: IMG_0001.jpg" in run.stderr

# --- archives of Windows, and foreign files in them

def raw_zip(members: dict[str, bytes]) -> bytes:
    "An archive with these very names."
    with zipfile.ZipFile(out := io.BytesIO(), "w") as z:
        for name, raw in members.items():
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            z.writestr(info, raw)
    return out.getvalue()

WINDOWS = {"catalogue\\": b"", "catalogue\\X_train_update.csv": TABLE.encode(), "catalogue\\image_train\\": b"",
           "catalogue\\image_train\\image_12_product_7.JPG": picture(),
           "mixed\\images/image_13_product_8.jpg": picture()}
FOREIGN = ["12:30 notes.txt", "a:b", "photos/Vue: face.jpg", "C:notes.txt", "image_12_product_7.jpg:thumbnail"]

def test_an_archive_with_backslashes_is_read(api: ApiProcess, marie: Header) -> None:
    state, rows = run_job(api, marie, raw_zip(WINDOWS))
    assert all("image" in row["experts"] for row in rows) and state["pictures"]["used"] == 2

@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_with_a_colon_is_not_used(name: str, api: ApiProcess, marie: Header) -> None:
    state, _ = run_job(api, marie, raw_zip({"X.csv": TABLE.encode(), name: b"x"}))
    assert state["pictures"] == {"used": 0, "not_used": 1, "examples": [name]}

def test_a_folder_with_a_colon_is_read(api: ApiProcess, marie: Header) -> None:
    run_job(api, marie, raw_zip({"Export 12:30/X.csv": TABLE.encode()}))

def test_a_foreign_file_may_be_compressed_in_any_way(api: ApiProcess, marie: Header) -> None:
    with zipfile.ZipFile(out := io.BytesIO(), "w") as z:
        z.writestr("X.csv", TABLE)
        z.writestr("film.mp4", b"x" * 100, zipfile.ZIP_LZMA)
    assert run_job(api, marie, out.getvalue())[0]["pictures"]["not_used"] == 1

OUTSIDE = ["..\\X.csv", "a\\..\\..\\X.csv", "\\X.csv", "\\\\server\\share\\X.csv", "C:\\X.csv", "c:X.csv", "../X.csv",
           "/X.csv",
           "..\\image_12_product_7.jpg", "D:\\image_12_product_7.jpg", "..\\notes.txt"]

@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_outside_the_archive_is_refused(name: str, api: ApiProcess, marie: Header) -> None:
    beside = {} if name.endswith(".csv") else {"X.csv": TABLE.encode()}
    assert "points elsewhere" in refused(api, marie, raw_zip(beside | {name: b"x"}))

# --- other kinds of file

def tar() -> bytes:
    "A tar archive."
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w") as t:
        info = tarfile.TarInfo("X.csv")
        info.size = len(TABLE)
        t.addfile(info, io.BytesIO(TABLE.encode()))
    return out.getvalue()

ARCHIVE = zipped({"X.csv": TABLE.encode()})
EXE = b"MZ\x90\0\3\0\0\0" + bytes(500)
OTHERS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "gzip": ("a gzip archive", lambda: gzip.compress(TABLE.encode())),
    "gzip of a tar": ("a gzip archive", lambda: gzip.compress(tar())),
    "tar": ("a tar archive", tar), "bzip2": ("a bzip2 archive", lambda: bz2.compress(TABLE.encode())),
    "xz": ("an xz archive", lambda: lzma.compress(TABLE.encode())),
    "7-Zip": ("a 7-Zip archive", lambda: b"7z\xbc\xaf\x27\x1c" + bytes(40)),
    "RAR": ("a RAR archive", lambda: b"Rar!\x1a\x07\x01\0" + bytes(40)),
    "xlsx": ("an Excel workbook (.xlsx)", lambda: zipped({"[Content_Types].xml": b"", "xl/workbook.xml": b""})),
    "xls": ("an Excel workbook (.xls)", lambda: b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)),
    "ods": ("an OpenDocument file", lambda: zipped({"mimetype": b"", "content.xml": b""})),
    "docx": ("a text document (.docx)", lambda: zipped({"word/document.xml": b""})),
    "self-extracting ZIP": ("a self-extracting archive", lambda: EXE + ARCHIVE),
    "self-extracting ZIP of Linux": ("a self-extracting archive", lambda: b"\x7fELF\2\1\1\0" + bytes(500) + ARCHIVE),
    "self-extracting script": ("a self-extracting archive", lambda: b"#!/bin/sh\nexit\n" + ARCHIVE),
    "split ZIP": ("a split ZIP archive", lambda: b"PK\x07\x08" + ARCHIVE),
    "PDF": ("a PDF document", lambda: b"%PDF-1.7\n"), "Parquet": ("a Parquet file", lambda: b"PAR1" + bytes(40)),
    "picture": ("a picture", picture),
    "ZIP in a ZIP": ("it holds 'catalogue.zip'", lambda: zipped({"catalogue.zip": ARCHIVE})),
}

@pytest.mark.parametrize("what", OTHERS)
def test_the_error_names_what_another_file_is(what: str, api: ApiProcess, marie: Header) -> None:
    kind, make = OTHERS[what]
    detail = refused(api, marie, make())
    assert kind in detail and "expected" in detail and detail.isprintable()

def test_an_error_in_a_table_names_the_table(api: ApiProcess, marie: Header) -> None:
    for name in ("X_train_update.csv", "a\\X.csv"):
        detail = refused(api, marie, raw_zip({name: TABLE.encode() + b"Jeu\n"}))
        assert repr(name.replace("\\", "/")) in detail and "line 4" in detail

# --- forms

FORM = {"Content-Type": 'multipart/form-data; boundary="b"'}
CRLF = b"\r\n"

def form(disposition: bytes, content: bytes = TABLE.encode(), before: bytes = b"", after: bytes = b"") -> bytes:
    "A form of one part, with text around it."
    part = b"Content-Disposition: form-data; " + disposition + CRLF + CRLF + content
    return before + b"--b" + CRLF + part + CRLF + b"--b--" + CRLF + after

NAMES = [b'name="file"; filename*=UTF-8\'\'produits.csv', b"name=file; filename*=utf-8'fr'produits%20%C3%A9t%C3%A9.csv",
         b'name="file"; FILENAME*=UTF-8\'\'a.csv', b'filename*=iso-8859-1\'\'%e9.csv; name="file"',
         b'name="file"; filename="a.csv"; filename*=UTF-8\'\'b.csv',
         b'name="file"; filename=""; filename*=UTF-8\'\'b.csv',
         b'name="file"; filename*0="prod"; filename*1="uits.csv"']

@pytest.mark.parametrize("disposition", NAMES)
def test_a_file_with_an_extended_name_is_accepted(disposition: bytes, api: ApiProcess, marie: Header) -> None:
    answer = api.client.post("/jobs", content=form(disposition), headers=FORM | marie)
    assert ended(api, marie, accepted(answer))["rows"] == 2

TEXT = b"This is a multi-part message in MIME format." + CRLF
AROUND = {"a preamble": (TEXT, b""), "an empty line": (CRLF, b""), "an epilogue": (b"", TEXT), "both": (TEXT, TEXT),
          "a long epilogue": (b"", TEXT * 1000), "a long preamble": (TEXT * 1000, b""), "NUL bytes": (b"", bytes(9000)),
          "another boundary": (b"", b"--b--" + CRLF + TEXT), "a preamble with hyphens": (b"--- -- --a" + CRLF, b"--")}

@pytest.mark.parametrize("what", AROUND)
def test_text_around_a_form_is_skipped(what: str, api: ApiProcess, marie: Header) -> None:
    before, after = AROUND[what]
    content = form(b'name="file"; filename="a.csv"', before=before, after=after)
    job = accepted(api.client.post("/jobs", content=content, headers=FORM | marie))
    assert ended(api, marie, job)["rows"] == 2
    content = form(b'name="designation"', b"Piscine ronde", before, after)
    assert api.client.post("/predict", content=content, headers=FORM | marie).status_code == 200

def test_a_form_that_is_cut_off_is_still_refused(api: ApiProcess, marie: Header) -> None:
    whole = form(b'name="file"; filename="a.csv"', before=TEXT)
    for cut in (3, 5, 30, len(whole) - 60):
        assert "cut off" in problem(api.client.post("/jobs", content=whole[:-cut], headers=FORM | marie), 400)

# --- compressed bodies

URLENCODED = {"Content-Type": "application/x-www-form-urlencoded"}
CODINGS = [{}, {"Content-Encoding": "gzip"}, {"Content-Encoding": "GZIP"}, {"Content-Encoding": "x-gzip"}]

@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("route", ["/predict", "/jobs", "/token"])
def test_a_gzip_body_is_named_and_not_repeated(route: str, coding: dict[str, str], api: ApiProcess,
                                               marie: Header) -> None:
    kind, body = URLENCODED, b"designation=Jeu&username=a&password=b"
    if route == "/jobs": kind, body = FORM, form(b'name="file"; filename="a"')
    detail = problem(api.client.post(route, content=gzip.compress(body), headers=kind | coding | marie), 415)
    assert "gzip" in detail and "uncompressed" in detail and detail.isascii()

@pytest.mark.parametrize("coding", ["deflate", "br", "zstd", "gzip, br"])
def test_another_compression_is_named(coding: str, api: ApiProcess, marie: Header) -> None:
    answer = api.client.post("/predict", content=b"x", headers=URLENCODED | {"Content-Encoding": coding} | marie)
    assert repr(coding) in problem(answer, 415)

BINARY = [b"\x78\x9c\xab\x56", b"\x28\xb5\x2f\xfd\x04", b"\xff\xfed\0", b"\x1b\x0d", b"a%00b", b"%1F%8B"]

@pytest.mark.parametrize("name", BINARY)
def test_a_binary_field_name_is_not_repeated(name: bytes, api: ApiProcess, marie: Header) -> None:
    detail = problem(api.client.post("/predict", content=name + b"=1", headers=URLENCODED | marie), 422)
    assert "binary name" in detail and detail.isascii()

def test_an_unknown_field_with_a_readable_name_is_named(api: ApiProcess, marie: Header) -> None:
    detail = problem(api.client.post("/predict", data={"désignation": "Jeu"}, headers=marie), 422)
    assert "'désignation'" in detail
