"Lock files satisfy settings.ini, agree with each other, and contain nothing about the machine that wrote them."
import configparser
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS: dict[str, list[str]] = {"serve": [], "dev": ["train", "lite2", "pretrained", "transformer", "bento", "dev"],
                               "bento": ["bento"], "ops": ["ops"], "scale": ["scale"]}

def pins(path: Path) -> dict[str, str]:
    "Name → version of a lock file."
    lines = path.read_text(encoding="utf-8").splitlines()
    pin = re.compile(r"[a-z0-9._-]+==[\w.!+-]+( ; .*)?")
    assert [line for line in lines if not pin.fullmatch(line)] == [], "a lock file contains pins only"
    return dict(line.split(" ;")[0].split("==") for line in lines)

def required(extras: list[str]) -> list[Requirement]:
    "The requirements of settings.ini: the light set and these extras."
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    keys = ["requirements", *(f"{extra}_requirements" for extra in extras)]
    return [Requirement(word) for key in keys for word in shlex.split(settings["DEFAULT"][key])]

@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_satisfies_the_requirements(lock: str) -> None:
    pinned = pins(ROOT / "requirements" / f"{lock}.txt")
    version = lambda r: pinned.get(canonicalize_name(r.name), "0")
    unmet = [str(r) for r in required(LOCKS[lock]) if not r.specifier.contains(version(r), prereleases=True)]
    assert unmet == [], "run `make lock`"

@pytest.mark.parametrize("lock", LOCKS)
def test_all_locks_fit_one_environment(lock: str) -> None:
    everything, pinned = pins(ROOT / "requirements" / "all.txt"), pins(ROOT / "requirements" / f"{lock}.txt")
    assert {name: version for name, version in pinned.items() if everything.get(name) != version} == {}

def test_a_bento_installs_the_light_set_and_bentoml() -> None:
    serve, bento = (pins(ROOT / "requirements" / f"{lock}.txt") for lock in ("serve", "bento"))
    assert serve.items() <= bento.items()
    assert "httptools" not in bento, "uvicorn would use it, and it accepts headers of any size"
