"""Pictures as programs and cameras write them: much metadata, no end marker, a wrong length. A picture whose pixels are
all there is used; what is wrong with a picture is the same remark on the command line, in a job and in the API."""
import csv
import io
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from api_process import USERS, ApiProcess
from conftest import Run
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from test_jobs import Header, accepted, archive_of, ended, part_of, predicted, problem

from rakuten_nb.data.picture import METADATA_BYTES, PictureError, decode_picture, picture_remark

RNG = np.random.default_rng(7)
PHOTO = Image.fromarray(RNG.integers(0, 255, (20, 30, 3), dtype=np.uint8)).resize((180, 120))
MARK = "no end-of-image marker; all pixels are there"

def saved(kind: str, image: Image.Image = PHOTO, **options: object) -> bytes:
    "The photo as a file."
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()

def refusal(raw: bytes) -> str:
    "Why a picture is refused."
    with pytest.raises(PictureError) as e: decode_picture(raw, max_pixels=10**6)
    return str(e.value)

def same_pixels(raw: bytes, other: bytes) -> bool:
    "Whether two files have the same pixels."
    return decode_picture(raw).tobytes() == decode_picture(other).tobytes()

# --- metadata of a PNG

PNG = saved("PNG")
AFTER_HEADER = 8 + 12 + 13 # bytes: signature and IHDR
BEFORE_END = len(PNG) - 12 # IEND

def chunk(kind: bytes, body: bytes) -> bytes:
    "A chunk of a PNG file."
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

def with_chunks(*chunks: bytes, at: int = AFTER_HEADER) -> bytes:
    "The photo with more chunks."
    return PNG[:at] + b"".join(chunks) + PNG[at:]

LARGE = b"<x:xmpmeta>" + b" " * (METADATA_BYTES + 1)
PACKED = zlib.compress(LARGE)
XMP = b"XML:com.adobe.xmp\0"
METADATA: dict[str, Callable[[], bytes]] = {
    "compressed XMP": lambda: with_chunks(chunk(b"iTXt", XMP + b"\1\0\0\0" + zlib.compress(LARGE))),
    "compressed XMP with a language": lambda: with_chunks(chunk(b"iTXt", XMP + b"\1\0fr\0titre\0" + PACKED)),
    "plain XMP": lambda: with_chunks(chunk(b"iTXt", XMP + b"\0\0\0\0" + LARGE)),
    "compressed text": lambda: with_chunks(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(LARGE))),
    "plain text": lambda: with_chunks(chunk(b"tEXt", b"Comment\0" + LARGE)),
    "a colour profile": lambda: with_chunks(chunk(b"iCCP", b"profile\0\0" + zlib.compress(LARGE))),
    "text after the pixels": lambda: with_chunks(chunk(b"zTXt", b"C\0\0" + zlib.compress(LARGE)), at=BEFORE_END),
    "many small texts": lambda: with_chunks(*[chunk(b"zTXt", b"C\0\0" + zlib.compress(LARGE[:900_000]))] * 80),
    "text and profile": lambda: with_chunks(chunk(b"iCCP", b"p\0\0" + PACKED), chunk(b"tEXt", b"C\0" + LARGE)),
}

@pytest.mark.parametrize("what", METADATA)
def test_a_png_with_much_metadata_is_used(what: str) -> None:
    raw = METADATA[what]()
    assert same_pixels(raw, PNG) and picture_remark(raw) == ""

def test_pillow_alone_refuses_such_a_png() -> None:
    with pytest.raises(ValueError, match="too large"): PngImageFile(io.BytesIO(METADATA["compressed text"]())).load()

def test_metadata_bombs_take_little_time() -> None:
    bomb = chunk(b"zTXt", b"C\0\0" + zlib.compress(bytes(20 * 2**20)))
    raw, began = with_chunks(*[bomb] * 400), time.monotonic()
    assert same_pixels(raw, PNG) and time.monotonic() - began < 2

def test_small_metadata_still_turns_a_picture() -> None:
    exif = Image.Exif()
    exif[274] = 6
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "<rdf tiff:Orientation=\"6\"/>", zip=True)
    for raw in (saved("PNG", exif=exif), saved("PNG", pnginfo=info)): assert decode_picture(raw).size == (120, 180)

def test_a_png_bomb_with_metadata_is_refused() -> None:
    head = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    raw = PNG[:8] + chunk(b"IHDR", head) + chunk(b"zTXt", b"C\0\0" + zlib.compress(LARGE)) + chunk(b"IEND", b"")
    assert "40000×40000 pixels" in refusal(raw)

@pytest.mark.parametrize("cut", [20, 40, 1000, len(PNG) // 2])
def test_a_png_that_is_cut_off_after_its_metadata_is_refused(cut: int) -> None:
    raw = METADATA["compressed XMP"]()
    assert refusal(raw[: len(raw) - len(PNG) + cut]).startswith(("truncated", "damaged"))

# --- JPEG without its end

JPEGS = {
    "plain": saved("JPEG"), "progressive": saved("JPEG", progressive=True), "grey": saved("JPEG", PHOTO.convert("L")),
    "CMYK": saved("JPEG", PHOTO.convert("CMYK")), "full colour": saved("JPEG", subsampling=0, quality=95),
    "restart markers": saved("JPEG", restart_marker_rows=1),
    "restart blocks": saved("JPEG", restart_marker_blocks=2)}
each_jpeg = pytest.mark.parametrize("kind", JPEGS)

@each_jpeg
def test_a_jpeg_without_its_end_marker_is_used(kind: str) -> None:
    whole = JPEGS[kind]
    for raw in (whole[:-2], whole[:-1], whole[:-2] + bytes(512), whole[:-2] + b"trailing text"):
        assert same_pixels(raw, whole) and picture_remark(raw) == MARK
        assert decode_picture(raw, min_side=40).size == decode_picture(whole, min_side=40).size
    assert picture_remark(whole) == picture_remark(whole + b"trailing text") == ""

@each_jpeg
def test_a_jpeg_without_some_of_its_pixels_is_refused(kind: str) -> None:
    whole = JPEGS[kind]
    start = whole.index(b"\xff\xda") + 20
    for cut in range(start, len(whole) - 8, (len(whole) - start) // 60): assert refusal(whole[:cut]) == "truncated", cut

# --- length of a WebP

def declared(raw: bytes, size: int) -> bytes:
    "A WebP that declares this length."
    return raw[:4] + size.to_bytes(4, "little") + raw[8:]

WEBPS = {"lossy": saved("WEBP"), "lossless": saved("WEBP", lossless=True),
         "with EXIF": saved("WEBP", exif=b"Exif\0\0MM\0*"), "transparent": saved("WEBP", PHOTO.convert("RGBA"))}
each_webp = pytest.mark.parametrize("kind", WEBPS)

@each_webp
def test_a_webp_with_a_wrong_length_is_used(kind: str) -> None:
    whole = WEBPS[kind]
    right = len(whole) - 8
    for size in (right - 1, right + 1, right + 2, 0, 2**32 - 1, right + 10**6):
        raw = declared(whole, size)
        assert same_pixels(raw, whole), size
        assert f"declares {size + 8:,} bytes, has {len(whole):,}" in picture_remark(raw)
    assert picture_remark(whole) == picture_remark(whole + b"trailing text") == ""

@each_webp
def test_a_webp_that_is_cut_off_is_refused(kind: str) -> None:
    whole = WEBPS[kind]
    for cut in (40, len(whole) // 2, len(whole) - 3):
        for raw in (whole[:cut], declared(whole[:cut], cut - 8), declared(whole[:cut], 0)):
            assert refusal(raw) == "truncated"

def test_a_webp_without_its_last_zero_byte_is_used() -> None:
    whole = saved("WEBP", exif=b"Exif\0\0MM\0*\1") # the last block has an odd length, and so a zero byte behind it
    assert whole[-1] == 0
    for size in (len(whole) - 8, len(whole) - 9): assert same_pixels(declared(whole[:-1], size), whole)

# --- the same remark everywhere

FAULTS: dict[str, tuple[bytes, str]] = { # what is sent as a picture, and the remark
    "cut off": (JPEGS["plain"][:900], "picture: truncated"),
    "no picture": (b"Bonjour", "picture: not a JPEG, PNG or WebP picture"),
    "empty": (b"", "picture: empty file"),
    "no end": (JPEGS["plain"][:-2], f"picture: {MARK}"),
    "length": (declared(WEBPS["lossy"], 0), f"picture: {picture_remark(declared(WEBPS['lossy'], 0))}"),
    "metadata": (METADATA["compressed XMP"](), ""),
    "sound": (JPEGS["plain"], "")}

@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str], bundle: Path) -> Iterator[ApiProcess]:
    "A running API with a worker."
    with ApiProcess(env, tmp_path_factory.mktemp("pictures"), bundle, RAKUTEN_EMBEDDED_WORKER="true") as running:
        running.add_users(**USERS)
        yield running

@pytest.fixture(scope="module")
def marie(api: ApiProcess) -> Header:
    "The authorization header of a user."
    return api.token("marie")

@pytest.fixture(scope="module")
def faulty_catalog(sample_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Products with a title, each with one kind of picture; the last has a damaged picture and no text."
    folder = part_of(sample_catalog, tmp_path_factory.mktemp("faulty") / "catalogue", 0, pictures=True)
    lines = [f"{i},Piscine ronde {what},,{100 + i},{200 + i}\n" for i, what in enumerate(FAULTS)]
    lines.append(f"{len(FAULTS)},,,{100 + len(FAULTS)},{200 + len(FAULTS)}\n")
    (folder / "X_train_update.csv").write_text(",designation,description,productid,imageid\n" + "".join(lines))
    for i, (raw, _) in enumerate([*FAULTS.values(), FAULTS["cut off"]]):
        (folder / f"image_train/image_{200 + i}_product_{100 + i}.jpg").write_bytes(raw)
    return folder

def test_job_and_command_line_give_the_same_remarks(api: ApiProcess, marie: Header, faulty_catalog: Path, bundle: Path,
                                                    rakuten: Run) -> None:
    expected = predicted(rakuten, bundle, faulty_catalog)
    *rows, textless = csv.DictReader(io.StringIO(expected.decode()))
    assert all(row["prdtypecode"] and not row["error"] for row in rows)
    assert [row["warning"] for row in rows] == [remark for _, remark in FAULTS.values()]
    assert ["image" in row["experts"] for row in rows] == [False] * 3 + [True] * 4
    assert (textless["prdtypecode"], textless["error"], textless["warning"]) == ("", "picture: truncated", "")
    job = accepted(api.client.post("/jobs", files={"file": archive_of(faulty_catalog)}, headers=marie))
    state = ended(api, marie, job)
    assert (state["status"], state["errors"]) == ("succeeded", 1)
    assert api.client.get(f"/jobs/{job}/predictions.csv", headers=marie).content == expected

@pytest.mark.parametrize("what", FAULTS)
def test_the_api_gives_the_same_remark_or_refuses_the_picture(what: str, api: ApiProcess, marie: Header) -> None:
    raw, remark = FAULTS[what]
    answer = api.client.post("/predict", data={"designation": "Piscine ronde"}, files={"image": ("a.jpg", raw)},
                             headers=marie)
    if what in ("cut off", "no picture"):
        assert remark.removeprefix("picture: ") in problem(answer, 422)
        return
    assert answer.status_code == 200 and answer.json().get("warning", "") == remark
    assert ("warning" in answer.json()) == bool(remark)
    assert ("image" in answer.json()["experts"]) == (what != "empty")

def test_an_empty_file_alone_is_refused_and_no_chosen_file_is_no_fault(api: ApiProcess, marie: Header) -> None:
    alone = api.client.post("/predict", files={"image": ("a.jpg", b"")}, headers=marie)
    assert "found an empty file as image" in problem(alone, 422)
    title, nothing = {"designation": "Piscine ronde"}, {"image": ("", b"")}
    answer = api.client.post("/predict", data=title, files=nothing, headers=marie)
    assert answer.status_code == 200 and "warning" not in answer.json()
