"""Every kind of refusal in one list, to be read aloud: `pytest -s tests/test_error_texts.py` prints all texts.

Each text is one line, names the place (file, line, field, setting, model), and says what to do or what was expected.
"""
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr
from test_bad_input import OPTIONS, REFUSED
from test_catalog_inputs import DOUBTFUL, MISLEADING, csv_bytes, write
from test_job_inputs import OTHERS, OUTSIDE, raw_zip
from test_picture_inputs import FAULTS, PNG
from test_settings_inputs import UNREADABLE

from rakuten_nb.addresses import redact_database_url
from rakuten_nb.config import Settings, read_settings
from rakuten_nb.data.catalog import read_catalog
from rakuten_nb.data.ingest import import_catalog
from rakuten_nb.data.picture import PictureError, decode_picture
from rakuten_nb.data.sample import make_sample
from rakuten_nb.errors import InputError, RakutenError
from rakuten_nb.evaluation.abtest import AbtestParams
from rakuten_nb.files import check_writable
from rakuten_nb.models.bundle import load_bundle, save_bundle
from rakuten_nb.models.training import read_params
from rakuten_nb.params import read_section
from rakuten_nb.serving.tokens import granted_scopes, signing_key
from rakuten_nb.store.database import make_engine, open_store
from rakuten_nb.store.deployments import adopt, rollback, start_experiment, stop_experiment
from rakuten_nb.store.job_files import UPLOAD, job_folder, unpack_upload
from rakuten_nb.store.model_copies import copy_bundle
from rakuten_nb.store.retention import erase_product, erase_request, erase_user
from rakuten_nb.store.users import add_user, change_user, hash_password

Refusal = Callable[[Path], object] # does something that is refused, in an empty folder
PASSWORD = "hunter2-qzv" # no text may contain it

# What a text tells the reader to do, or what was expected of them.
VERBS = ("save delete set give write train rename restore install run start add choose close double show update stop "
         "list use compare convert make put remove try fetch send complete percent-encode").split()
ADVICE = re.compile(rf"\bexpected\b|[;:.,] (?:perhaps )?(?:{'|'.join(VERBS)}|`rakuten-nb)\b|not found|no such", re.I)

def sample(folder: Path) -> Path:
    "A catalogue of 60 products without pictures."
    return make_sample(folder / "catalog", 60, images=False, progress=False)

def tables(folder: Path) -> tuple[Any, Any]:
    "The rows of X and Y of a sample."
    import csv
    root = sample(folder)
    read = lambda name: list(csv.reader((root / name).read_text(encoding="utf-8").splitlines(keepends=True)))
    rows = [[[int(c) if c.isdigit() else c for c in row] for row in read(name)]
            for name in ("X_train_update.csv", "Y_train_CVw08PX.csv")]
    return rows[0], rows[1]

def damaged_catalog(how: str) -> Refusal:
    def act(folder: Path) -> object:
        root = make_sample(folder / "catalog", 60, progress=False)
        REFUSED[how][0](root)
        return read_catalog(root)
    return act

def misleading(how: str) -> Refusal:
    def act(folder: Path) -> object:
        x, y = tables(folder)
        return read_catalog(write(folder / "shop", x=MISLEADING[how][0](x), y=csv_bytes(y)))
    return act

def realigned(how: str) -> Refusal:
    def act(folder: Path) -> object:
        x, y = DOUBTFUL[how][0](*tables(folder))
        return read_catalog(write(folder / "shop", x=x, y=y))
    return act

def option(how: str) -> Refusal:
    def act(folder: Path) -> object:
        given = [str(value) for value in OPTIONS[how][0](folder)]
        params = read_params(Path(given[1]) if given[0] == "--params" else None)
        names = params.chosen(given[1] if given[0] == "--experts" else None)
        for name in names: params.expert(name)
        from rakuten_nb.models.training import make_expert
        return [make_expert(name, params.expert(name)) for name in names]
    return act

def upload(content: bytes, **changes: Any) -> Refusal:
    def act(folder: Path) -> object:
        settings = Settings(rakuten_data_dir=folder).model_copy(update=changes)
        place = job_folder(settings, "a" * 32)
        place.mkdir(parents=True)
        (place / UPLOAD).write_bytes(content)
        return unpack_upload(place, settings)
    return act

def env(text: str | bytes) -> Refusal:
    def act(folder: Path) -> object:
        (folder / ".env").write_bytes(text if isinstance(text, bytes) else text.encode())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try: return read_settings(folder / ".env")
            except UserWarning as e: raise InputError(str(e)) from None # shown as a warning, which must read as well
    return act

def with_store(act: Callable[[Any], object]) -> Refusal:
    def run(folder: Path) -> object:
        store = open_store(f"sqlite:///{folder}/store.sqlite")
        try: return act(store)
        finally: store.close()
    return run

def two_experiments(store: Any) -> object:
    adopt(store, "a" * 12, "models/bundle", "first")
    for letter in "bc": start_experiment(store, letter * 12, "", "shadow", 1.0, {}, "marie", "better?")
    return None

def foreign_store(folder: Path) -> object:
    import sqlite3
    from contextlib import closing
    with closing(sqlite3.connect(folder / "store.sqlite")) as db: db.execute("CREATE TABLE users (login TEXT)")
    return open_store(f"sqlite:///{folder}/store.sqlite")

def bundle_text(content: str) -> Refusal:
    def act(folder: Path) -> object:
        (folder / "bundle").mkdir()
        (folder / "bundle/bundle.json").write_text(content)
        return load_bundle(folder / "bundle")
    return act

def occupied(folder: Path) -> object:
    (folder / "notes.txt").write_text("mine")
    return save_bundle(None, folder) # type: ignore[arg-type] # refused before it is used

def section(text: str) -> Refusal:
    def act(folder: Path) -> object:
        (folder / "params.yaml").write_text(text)
        return read_section(folder / "params.yaml", "abtest", AbtestParams)
    return act

URLS = {"another database": "mysql://u:{}@h/d", "no URL": "my database", "a port of letters": "postgresql://u:{}@h:x/d",
        "an @ in the password": "postgresql://u:a@{}@h/d", "memory": "sqlite://"}
BIG = "designation,description\n" + "Jeu,\n" * 5
JOBS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "no header": (b"Jeu;12\n", {}), "too many rows": (BIG.encode(), {"rakuten_max_job_rows": 3}),
    "an empty file": (b"", {}), "no rows": (b"designation,description\n", {}),
    "a long id": (b"designation,description,productid\nJeu,," + b"7" * 400 + b"\n", {}),
    "Latin-1": ("designation,description\nThéière,\n".encode("latin-1"), {}),
    "no table in the archive": (raw_zip({"image_1_product_2.jpg": PNG}), {}),
    "two tables in the archive": (raw_zip({"a.csv": BIG.encode(), "b.csv": BIG.encode()}), {}),
    "a table that inflates": (raw_zip({"a.csv": BIG.encode() * 100_000}), {"rakuten_max_job_mb": 1})}
STORES: dict[str, Callable[[Any], object]] = {
    "a strange user name": lambda s: add_user(s, "a b", "x" * 60),
    "an unknown role": lambda s: add_user(s, "a", "x", "king"),
    "a user twice": lambda s: [add_user(s, "marie", "x" * 60) for _ in range(2)],
    "an unknown user": lambda s: change_user(s, "nobody", disabled=True),
    "an unknown product to erase": lambda s: erase_product(s, Settings(), "4711"),
    "an unknown request to erase": lambda s: erase_request(s, Settings(), "r1"),
    "an unknown user to erase": lambda s: erase_user(s, Settings(), "nobody"), "a second experiment": two_experiments,
    "an experiment without a champion": lambda s: start_experiment(s, "b", "", "shadow", 1.0, {}, "m", ""),
    "a wrong mode": lambda s: start_experiment(s, "b", "", "live", 1.0, {}, "m", ""),
    "a wrong share": lambda s: start_experiment(s, "b", "", "canary", 7, {}, "m", ""),
    "no experiment to stop": lambda s: stop_experiment(s, "m", ""),
    "no earlier champion": lambda s: rollback(s, "m", "")}

UNDECODED = [how for how, (_, remark) in FAULTS.items() if remark in ("truncated", "empty file") or "not a" in remark]

REFUSALS: dict[str, Refusal] = { # what is wrong → how it is refused
    **{f"catalogue: {how}": damaged_catalog(how) for how in REFUSED},
    **{f"table: {how}": misleading(how) for how in MISLEADING},
    **{f"labels: {how}": realigned(how) for how in DOUBTFUL},
    **{f"params: {how}": option(how) for how in OPTIONS},
    "params: a rule out of bounds": section("abtest: {alpha: 2}\n"),
    "params: an unknown rule": section("abtest: {guardrails: {speed: 2}}\n"),
    **{f".env: {how}": env(text) for how, text in UNREADABLE.items()},
    ".env: UTF-16": env(f"SECRET_KEY={PASSWORD}\n".encode("utf-16")),
    ".env: Latin-1": env(f"SECRET_KEY={PASSWORD}é\n".encode("latin-1")),
    ".env: a word as a number": env("RAKUTEN_MAX_PIXELS=many\n"),
    ".env: a share above 1": env("RAKUTEN_AUDIT_SHARE=7\n"),
    "settings: no signing key": lambda _: signing_key(Settings(secret_key=None)),
    "settings: a short signing key": lambda _: signing_key(Settings(secret_key=SecretStr("short"))),
    **{f"database: {how}": lambda _, url=url: make_engine(url.format(PASSWORD)) for how, url in URLS.items()},
    "database: another program's tables": foreign_store,
    **{f"job: {how}": upload(content, **changes) for how, (content, changes) in JOBS.items()},
    **{f"job: {how}": upload(make()) for how, (_, make) in OTHERS.items()},
    **{f"job: the name {name}": upload(raw_zip({"X.csv": BIG.encode(), name: b"x"})) for name in OUTSIDE[-3:]},
    **{f"picture: {how}": lambda _, raw=FAULTS[how][0]: decode_picture(raw) for how in UNDECODED},
    "picture: a bomb": lambda _: decode_picture(PNG, max_pixels=10),
    "bundle: none": lambda folder: load_bundle(folder / "bundle"), "bundle: no JSON": bundle_text("<html>"),
    "bundle: another format": bundle_text('{"format": 99}'),
    "bundle: changed": bundle_text('{"format": 2, "self": "x"}'),
    "bundle: none to copy": lambda folder: copy_bundle(folder / "bundle", folder / "models"),
    "bundle: a place that is occupied": occupied,
    **{f"store: {how}": with_store(act) for how, act in STORES.items()},
    "an empty password": lambda _: hash_password(""), "a long password": lambda _: hash_password("x" * 100),
    "a scope beyond the role": lambda _: granted_scopes("user", "admin"),
    "a file that cannot be written": lambda folder: check_writable(folder / "file/below"),
    "no catalogue to import": lambda folder: import_catalog(folder / "raw", folder / "nowhere", 10, 0, ""),
}

@pytest.fixture(scope="module")
def texts() -> Iterator[dict[str, str]]:
    "The texts of this run; all of them are printed at the end."
    seen: dict[str, str] = {}
    yield seen
    print("\n\n" + "\n".join(f"{what}\n    {text}" for what, text in sorted(seen.items())))

@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_says_what_to_do(what: str, texts: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises((RakutenError, PictureError)) as e: REFUSALS[what](tmp_path)
    text = texts[what] = str(e.value).replace(f"{tmp_path}/", "").replace(str(tmp_path), "FOLDER")
    assert len(text.splitlines()) == 1 and text.isprintable() and 8 < len(text) < 420, text
    assert PASSWORD not in text and "hush" not in text and "Traceback" not in text and "object at 0x" not in text
    assert "/tmp" not in text, "the place of a temporary folder"
    assert what.startswith("picture: ") or ADVICE.search(text), f"what to do next? {text}"

def test_the_password_of_a_database_is_hidden() -> None:
    assert PASSWORD not in redact_database_url(f"postgresql://u:{PASSWORD}@h/d")
    assert np.all([PASSWORD in url.format(PASSWORD) for url in URLS.values() if "{}" in url])
