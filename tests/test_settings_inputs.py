"""Settings and standard streams as people's machines have them: files in other encodings, raw passwords in addresses,
paths that are not UTF-8, full disks and closed pipes. Each is read, or refused in one line."""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import Run
from dotenv import dotenv_values
from fork_server import ForkServer

from rakuten_nb.addresses import redact_database_url
from rakuten_nb.config import ensure_secret_key, get_logger, read_settings
from rakuten_nb.errors import InputError
from rakuten_nb.store.database import StoreUnavailable, driver_message, make_engine, open_store

SECRET = "x7pQ" * 12
LATIN = os.fsdecode(b"caf\xe9") # a name in Latin-1, as an old archive has it

@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    "No setting of this machine."
    for name in [n for n in os.environ if n.startswith("RAKUTEN_") or n == "SECRET_KEY"]: monkeypatch.delenv(name)

def command_line(
    env: dict[str, str], cwd: Path, *args: object, stdout: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[bytes]:
    "Run a command in a process of its own."
    line = [sys.executable, "-m", "rakuten_nb.cli", *map(str, args)]
    return subprocess.run(line, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE,
                          check=False)

def only_line(error: bytes | str) -> str:
    "The one line of an error."
    text = error if isinstance(error, str) else error.decode(errors="replace")
    assert text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text, text
    return text

# --- .env

NOT_UTF_8 = { # content, what the error names
    "PowerShell, UTF-16": (f"SECRET_KEY={SECRET}\r\n".encode("utf-16"), "UTF-16"),
    "UTF-16, big end first": (b"\xfe\xff" + f"SECRET_KEY={SECRET}\n".encode("utf-16-be"), "UTF-16"),
    "UTF-16 without its mark": (f"A=1\r\nSECRET_KEY={SECRET}\r\n".encode("utf-16-le"), "UTF-16"),
    "UTF-32": (f"SECRET_KEY={SECRET}\n".encode("utf-32"), "UTF-32"),
    "Latin-1": (f"# clé\nSECRET_KEY={SECRET}\n".encode("latin-1"), "0xE9 in line 1"),
    "Windows-1252 in a value": (f"SECRET_KEY={SECRET}\nDAGSHUB_REPO=10€\n".encode("cp1252"), "0x80 in line 2"),
    "no text": (b"\x00\x01\x02" + SECRET.encode(), "NUL byte in line 1"),
}

@pytest.mark.parametrize("case", NOT_UTF_8)
def test_a_file_that_is_not_utf_8_is_refused_with_its_encoding(case: str, tmp_path: Path) -> None:
    content, named = NOT_UTF_8[case]
    (env := tmp_path / ".env").write_bytes(content)
    with pytest.raises(InputError) as error: read_settings(env)
    line = str(error.value)
    assert f"{env}: expected UTF-8; found " in line and named in line
    assert "save the file again as UTF-8" in line and "\n" not in line and SECRET[:8] not in line
    with pytest.raises(InputError, match="expected UTF-8"): ensure_secret_key(env)
    assert env.read_bytes() == content, "a key that is appended would be in another encoding"

@pytest.mark.parametrize("command", [("users", "list"), ("store", "show"), ("serve",)])
def test_every_command_ends_in_one_line(
    command: tuple[str, ...], fork_server: ForkServer, env: dict[str, str], tmp_path: Path,
) -> None:
    (tmp_path / ".env").write_bytes(NOT_UTF_8["PowerShell, UTF-16"][0])
    done = fork_server.run(command, env, tmp_path)
    assert done.returncode == 2 and "found UTF-16" in only_line(done.stderr)

READ = {
    "a mark of UTF-8": "\ufeffSECRET_KEY=of-the-first-line\nRAKUTEN_MAX_PIXELS=1000\n",
    "export": "export SECRET_KEY=exported\nexport\tRAKUTEN_MAX_PIXELS=1000\n",
    "quotes": "SECRET_KEY='with # and \"'\nDAGSHUB_REPO=\"a\\tb\"\nRAKUTEN_MAX_PIXELS=\"1000\"\n",
    "line ends of Windows": "SECRET_KEY=windows\r\nRAKUTEN_MAX_PIXELS=1000\r\n",
    "line ends of old Macs": "SECRET_KEY=mac\rRAKUTEN_MAX_PIXELS=1000\r",
    "comments": "# first\nSECRET_KEY=value # a comment\nDAGSHUB_REPO=a#b\nRAKUTEN_MAX_PIXELS= 1000\t# ours\n",
    "a name twice": "RAKUTEN_MAX_PIXELS=1\nSECRET_KEY=old\nSECRET_KEY=new\nRAKUTEN_MAX_PIXELS=1000\n",
    "spaces": "  SECRET_KEY = spaced  \n\n\tRAKUTEN_MAX_PIXELS = 1000\n",
    "several lines": "SECRET_KEY=\"first\nsecond\"\nRAKUTEN_MAX_PIXELS=1000",
    "accents": "SECRET_KEY=clé\nRAKUTEN_MAX_PIXELS=1000\n",
}

@pytest.mark.parametrize("case", READ)
def test_a_file_is_read_as_python_dotenv_reads_it(case: str, tmp_path: Path) -> None:
    (env := tmp_path / ".env").write_bytes(READ[case].encode())
    expected = dotenv_values(stream=StringIO(READ[case], newline=""))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = read_settings(env)
    assert settings.secret_key is not None and settings.secret_key.get_secret_value() == expected["SECRET_KEY"]
    assert settings.rakuten_max_pixels == 1000 == int(expected["RAKUTEN_MAX_PIXELS"] or 0)
    assert settings.dagshub_repo == expected.get("DAGSHUB_REPO")

UNREADABLE = {
    "a colon": "RAKUTEN_MAX_PIXELS=1000\nSECRET_KEY: hush\n",
    "a quote that does not end": "RAKUTEN_MAX_PIXELS=1000\nSECRET_KEY='hush\n",
    "set of Windows": "RAKUTEN_MAX_PIXELS=1000\nset SECRET_KEY=hush\n",
    "a mark in the middle": "RAKUTEN_MAX_PIXELS=1000\n\ufeffSECRET_KEY=hush\n",
    "text after a quote": "RAKUTEN_MAX_PIXELS=1000\nSECRET_KEY='hush' hush\n",
}

@pytest.mark.parametrize("case", UNREADABLE)
def test_a_line_that_sets_nothing_is_named_without_its_content(case: str, tmp_path: Path) -> None:
    (env := tmp_path / ".env").write_text(UNREADABLE[case], encoding="utf-8")
    with pytest.warns(UserWarning, match=r"\.env: line 2: expected NAME=value") as seen: settings = read_settings(env)
    assert settings.rakuten_max_pixels == 1000 and settings.secret_key is None
    assert not any("hush" in str(warning.message) for warning in seen)

def test_the_terminal_shows_the_warning_once(env: dict[str, str], fork_server: ForkServer, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(UNREADABLE["a colon"], encoding="utf-8")
    done = fork_server.run(("users", "list"), env, tmp_path)
    assert done.returncode == 0 and done.stderr.count("line 2: expected NAME=value") == 1
    assert "python-dotenv" not in done.stderr and "hush" not in done.stderr

@pytest.mark.parametrize("before", ["\ufeffRAKUTEN_MAX_PIXELS=1000", "RAKUTEN_MAX_PIXELS=1000\r\nSECRET_KEY=\r\n"])
def test_a_key_is_written_into_a_file_of_windows(before: str, tmp_path: Path) -> None:
    (env := tmp_path / ".env").write_bytes(before.encode())
    assert ensure_secret_key(env) and not ensure_secret_key(env)
    assert read_settings(env).secret_key and read_settings(env).rakuten_max_pixels == 1000

# --- a password in the address of a database

RAW = ["qzv@xjw", "qzv@@xjw", "qzv#xj@jwk", "qzv/xj@wk", "qzv@xj/wk", "qzv@xj#wk", "qzv?xj@wk", "qzv@xj:wk", "@qzvxjw",
       "qzvxjw@", "543/qzv@xjw", "qzv@xjw:80", "qzv:@[xjw]"]
ONE_AT = ["qzv/xjw", "qzv#xjw", "qzv?xjw", "qzv:xjw", "/qzvxjw", "qzv#/xjw"]

def pieces(text: str) -> set[str]:
    "The parts of a password that must not be seen."
    return {part for part in re.split(r"[^a-z]+", text) if part}

@pytest.mark.parametrize("password", RAW + ONE_AT)
@pytest.mark.parametrize("user", ["kbd", "kbq/jqw", "kbq@jqw"])
def test_nothing_of_a_raw_password_is_shown(user: str, password: str) -> None:
    url = f"postgresql+psycopg://{user}:{password}@127.0.0.1:9/shop"
    with pytest.raises((InputError, StoreUnavailable)) as error: open_store(url)
    line = str(error.value)
    assert "percent-encode" in line and "%40" in line and "\n" not in line
    assert not any(part in line for part in pieces(user) | pieces(password)), line
    assert redact_database_url(url) == "postgresql+psycopg://127.0.0.1:9/shop"

@pytest.mark.parametrize("password", ["qzv@xjw", "qzv/xj#wk"])
def test_a_command_shows_nothing_of_a_raw_password(
    password: str, fork_server: ForkServer, env: dict[str, str], tmp_path: Path,
) -> None:
    own = {"RAKUTEN_DATABASE_URL": f"postgresql://kbd:{password}@127.0.0.1:9/shop"}
    done = fork_server.run(("users", "list"), env | own, tmp_path)
    line = only_line(done.stderr)
    assert done.returncode in (1, 2) and "percent-encode" in line
    assert not any(part in line for part in {"kbd"} | pieces(password))

@pytest.mark.parametrize("scheme", ["mysql", "oracle+thin", "postgresql+nothing", "mssql"])
def test_another_database_is_refused_without_the_password(scheme: str) -> None:
    for password in ("qzvxjw", *RAW):
        with pytest.raises(InputError, match="expected sqlite:///FILE") as error:
            make_engine(f"{scheme}://kbd:{password}@db/shop?key=qzv")
        assert not any(part in str(error.value) for part in {"kbd"} | pieces(password))

@pytest.mark.parametrize("port", ["xjw", "80x", "qzv@80", "5432xjw"])
def test_a_port_that_is_no_number_is_refused(port: str) -> None:
    with pytest.raises(InputError, match="percent-encode") as error: make_engine(f"postgresql://kbd:qzv@db:{port}/shop")
    assert not any(part in str(error.value) for part in ("kbd", "qzv", "xjw"))

QUOTED = ['authentication failed for user "kbd"', "invalid dsn: password=qz/v user=kbd host=db",
          'role "kbd" does not exist', "bad URI\npostgresql://kbd:qz/v@db/shop"]

@pytest.mark.parametrize("quoted", QUOTED)
def test_what_a_driver_quotes_is_hidden(quoted: str) -> None:
    line = driver_message(sa.make_url("postgresql+psycopg://kbd:qz%2Fv@db/shop"), quoted)
    assert line.startswith("database postgresql+psycopg://db/shop: ") and "\n" not in line and "…" in line
    assert "kbd" not in line and "qz" not in line and "percent-encode" in line

def test_an_encoded_password_is_read_and_hidden() -> None:
    engine = make_engine("postgresql://kbd:q%40z%2Fv%23x%3Aj%3F@127.0.0.1:9/shop")
    assert engine.url.password == "q@z/v#x:j?" and engine.url.host == "127.0.0.1"
    assert make_engine("postgresql://kbd:qz/v@127.0.0.1:9/shop").url.password == "qz/v", "one reading only"
    with pytest.raises(StoreUnavailable) as error: open_store("postgresql://kbd:plain@127.0.0.1:9/shop")
    assert "percent-encode" not in str(error.value) and "kbd" not in str(error.value)

# --- paths that are not UTF-8

def test_a_path_that_is_not_utf_8_is_a_line_of_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = get_logger("test_settings_inputs", tmp_path)
    for name in (LATIN, "日本", os.fsdecode(b"\xff\xfe"), "a\nb"): log.info("saved", extra={"file": name})
    for handler in list(log.handlers): handler.close()
    get_logger.cache_clear()
    text = (tmp_path / "test_settings_inputs.log").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["file"] for line in lines] == [LATIN, "日本", os.fsdecode(b"\xff\xfe"), "a\nb"]
    assert capfd.readouterr().err == ""

def test_commands_work_in_a_folder_that_is_not_utf_8(
    env: dict[str, str], tmp_path: Path, sample_catalog: Path, bundle: Path,
) -> None:
    (folder := tmp_path / LATIN).mkdir()
    for name, target in (("shop", sample_catalog), ("bundle", bundle)): (folder / name).symlink_to(target)
    own = env | {"RAKUTEN_LOG_DIR": str(tmp_path / "logs")}
    out = folder / f"{LATIN}.csv"
    for line in (["check", folder / "shop", "--quarantine", out],
                 ["predict", folder / "bundle", folder / "shop", "--out", out, "--split", "test"]):
        done = command_line(own, folder, *line)
        assert done.returncode == 0 and b"Traceback" not in done.stderr and b"Logging error" not in done.stderr
    assert len(out.read_text(encoding="utf-8").splitlines()) == 41
    assert [json.loads(line)["file"] for line in (tmp_path / "logs/test_model_logger.log").read_text().splitlines()]

@pytest.mark.parametrize("name", ["RAKUTEN_DATA_DIR", "RAKUTEN_LOG_DIR", "RAKUTEN_BUNDLE"])
def test_a_setting_that_is_not_utf_8_is_refused(
    name: str, fork_server: ForkServer, env: dict[str, str], tmp_path: Path,
) -> None:
    done = fork_server.run(("users", "list"), env | {name: str(tmp_path / LATIN)}, tmp_path)
    assert done.returncode == 2 and f"{name}: expected a path in UTF-8" in only_line(done.stderr)

# --- standard output

@pytest.fixture(scope="module")
def settings_only(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    "An environment with an empty store."
    return env | {"RAKUTEN_DATA_DIR": str(tmp_path_factory.mktemp("street"))}

OUTPUTS = [["users", "list"], ["--help"], ["--version"], ["check", "CATALOG"],
           ["predict", "BUNDLE", "CATALOG", "--out", "-", "--split", "test"]]

@pytest.fixture(params=OUTPUTS, ids=" ".join)
def output_line(request: pytest.FixtureRequest, sample_catalog: Path, bundle: Path) -> list[str]:
    "A command that prints something."
    places = {"CATALOG": str(sample_catalog), "BUNDLE": str(bundle)}
    return [places.get(part, part) for part in request.param]

def test_a_full_standard_output_is_one_line(
    output_line: list[str], settings_only: dict[str, str], tmp_path: Path,
) -> None:
    with Path("/dev/full").open("wb") as full:
        done = command_line(settings_only, tmp_path, *output_line, stdout=full.fileno())
    assert done.returncode == 2
    assert "standard output: cannot be written: No space left on device" in done.stderr.decode().splitlines()[-1]
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr

def test_output_that_waits_in_a_buffer_is_one_line_too(env: dict[str, str], tmp_path: Path) -> None:
    program = "from rakuten_nb.cli.app import run_app; run_app(lambda: print('a result'))"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", program], env=env, cwd=tmp_path, stdout=full,
                              stderr=subprocess.PIPE, check=False)
    assert done.returncode == 2 and "No space left on device" in only_line(done.stderr)

def test_a_reader_that_leaves_ends_the_command_quietly(
    output_line: list[str], settings_only: dict[str, str], tmp_path: Path,
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try: done = command_line(settings_only, tmp_path, *output_line, stdout=writer)
    finally: os.close(writer)
    assert done.returncode == 1 and done.stderr == b""

@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_traceback(closed: str, settings_only: dict[str, str], tmp_path: Path) -> None:
    line = f'"{sys.executable}" -m rakuten_nb.cli users list {closed}'
    done = subprocess.run(["sh", "-c", line], env=settings_only, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == (2 if ">&-" in closed.split() else 0) and b"Traceback" not in done.stderr
    if "2>&-" not in closed and ">&-" in closed: assert "standard output: cannot be written" in only_line(done.stderr)

def test_a_closed_standard_input_is_no_password(settings_only: dict[str, str], tmp_path: Path) -> None:
    line = f'"{sys.executable}" -m rakuten_nb.cli users add jean --password-stdin <&-'
    done = subprocess.run(["sh", "-c", line], env=settings_only, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 2 and "password: expected 1 to 72 bytes" in only_line(done.stderr)

def test_a_file_gets_no_number_of_a_closed_stream(settings_only: dict[str, str], tmp_path: Path, bundle: Path,
                                                  sample_catalog: Path) -> None:
    out = tmp_path / "predictions.csv"
    line = f'"{sys.executable}" -m rakuten_nb.cli predict "{bundle}" "{sample_catalog}" --out "{out}" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", line], env=settings_only, cwd=tmp_path, check=False)
    with out.open(encoding="utf-8", newline="") as f: rows = list(csv.DictReader(f))
    assert len(rows) == 440 and all(row["prdtypecode"] for row in rows if not row["error"])

# --- a result on standard output

@pytest.fixture
def piped(env: dict[str, str], tmp_path: Path) -> Iterator[Run]:
    "Runs a command twice: with `-` and with a file; returns the first and checks that both results are the same."
    def run(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        outputs = []
        for target in ("-", str(tmp_path / "result")):
            done = command_line(env, tmp_path, *args, target)
            assert done.returncode == code and b"Traceback" not in done.stderr, done.stderr
            outputs.append((done.stdout, done.stderr))
        assert outputs[0][0] == (tmp_path / "result").read_bytes() and not (tmp_path / "-").exists()
        result, report = outputs[0]
        return subprocess.CompletedProcess([str(a) for a in args], code, result.decode(), report.decode())
    yield run

@pytest.mark.parametrize("options", [(), ("--explain",), ("--split", "test")], ids=" ".join)
def test_predictions_go_to_standard_output(
    options: tuple[str, ...], piped: Run, bundle: Path, hard_catalog: Path, sample_catalog: Path,
) -> None:
    catalog = sample_catalog if "--split" in options else hard_catalog
    done = piped("predict", bundle, catalog, *options, "--out")
    rows = list(csv.DictReader(StringIO(done.stdout)))
    assert rows and ("explanation" in rows[0]) == ("--explain" in options)
    assert "need review" in done.stderr and "need review" not in done.stdout

def test_metrics_and_quarantine_go_to_standard_output(piped: Run, bundle: Path, sample_catalog: Path) -> None:
    metrics = piped("evaluate", bundle, sample_catalog, "--json")
    assert "weighted_f1" in json.loads(metrics.stdout)["fused"] and "Hardest product types" in metrics.stderr
    rows = piped("check", sample_catalog, "--quarantine")
    assert rows.stdout == "productid,imageid,file,reason\n" and "nothing is quarantined" in rows.stderr

def test_an_audit_goes_to_standard_output(piped: Run, bundle: Path, sample_catalog: Path, tmp_path: Path) -> None:
    (params := tmp_path / "params.yaml").write_text("audit: {min_class_rows: 2}\n", encoding="utf-8")
    done = piped("audit", sample_catalog, "--experts", "text_linear", "--params", params, "--out")
    assert done.stdout.startswith("row,productid,title,given") and "suspicious labels" in done.stderr

def test_a_refusal_writes_nothing_on_standard_output(rakuten: Run, tmp_path: Path, bundle: Path) -> None:
    done = rakuten("predict", bundle, tmp_path / "nowhere", "--out", "-")
    assert done.returncode == 2 and done.stdout == "" and only_line(done.stderr)

def test_an_interrupted_command_writes_nothing_on_standard_output(
    env: dict[str, str], tmp_path: Path, bundle: Path, sample_catalog: Path,
) -> None:
    line = [sys.executable, "-m", "rakuten_nb.cli", "predict", str(bundle), str(sample_catalog), "--out", "-"]
    process = subprocess.Popen(line, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try: process.wait(timeout=0.5)
    except subprocess.TimeoutExpired: process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and out == b""
