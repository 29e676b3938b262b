"The images: what the Dockerfile and compose.yaml promise, and a container of the built image that keeps it."
import ast
import configparser
import copy
import http.server
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
import yaml
from conftest import ROOT, needs

from rakuten_nb.config import Settings

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
TARGETS = ("train", "serve")
SECRET = re.compile(r"\$\{(\w*(?:SECRET|PASSWORD|TOKEN|KEY)(?:_\w+)?)(?::?[-=])([^}]+)\}")

# --- the Dockerfile

def stages(text: str) -> dict[str, list[str]]:
    "The instructions of each stage, continued lines joined, comments left out."
    found: dict[str, list[str]] = {}
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for instruction in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if m := re.fullmatch(r"FROM (\S+) AS (\w[\w-]*)", instruction): found[m[2]] = [f"FROM {m[1]}"]
        elif found: found[list(found)[-1]].append(instruction)
    return found

def dockerfile_faults(text: str) -> list[str]:
    "What must not be in the Dockerfile, and what is missing in it."
    found, faults = stages(text), []
    for target in TARGETS:
        own = found.get(target, [])
        said = {word: [line.split(maxsplit=1)[1] for line in own if line.split()[0] == word] for word in ("USER", "ENTRYPOINT", "CMD", "VOLUME", "LABEL")}
        if not said["USER"] or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", said["USER"][-1]): faults.append(f"{target} runs as a number that is not root's")
        for word in ("ENTRYPOINT", "CMD"):
            if not said[word] or not said[word][-1].startswith("["): faults.append(f"{target}: {word} in exec form, so that signals arrive")
        if "/data" not in said["VOLUME"]: faults.append(f"{target} keeps its data in a volume")
        if not any("org.opencontainers.image.title" in line for line in said["LABEL"]): faults.append(f"{target} says what it is")
        if any(line.startswith(("ADD", "COPY requirements", "COPY .")) for line in own): faults.append(f"{target} copies built folders only")
    if not any(line.startswith("HEALTHCHECK") and '"/health"' in line for line in found.get("serve", [])): faults.append("serve checks its health")
    forbidden = {"a download by ADD": r"^ADD\s+https?:", "the tag latest": r":latest\b", "an index": r"index[-_]url|trusted-host|find-links",
                 "a secret": r"^(ENV|ARG)\s.*(SECRET|PASSWORD|TOKEN)", "a compiler": r"\bgcc\b|build-essential", "a certificate": r"COPY.*\.(crt|pem|key)\b"}
    code = "\n".join(line for body in found.values() for line in body)
    return faults + [f"holds {what}" for what, pattern in forbidden.items() if re.search(pattern, code, re.M | re.I)]

def test_the_dockerfile_is_sound() -> None:
    assert dockerfile_faults(DOCKERFILE.read_text(encoding="utf-8")) == []

@pytest.mark.parametrize(("old", "new"), [
    ("USER 10001:10001", "USER root"), ("USER 10001:10001", ""), ('ENTRYPOINT ["rakuten-nb"]', "ENTRYPOINT rakuten-nb"), ("HEALTHCHECK", "#"),
    ("WORKDIR /build", "ADD https://example.org/a.tar /a"), ("WORKDIR /build", "ENV PIP_INDEX_URL=https://example.org"),
    ("WORKDIR /build", "ARG SECRET_KEY=a"), ("WORKDIR /build", "RUN apt-get install -y gcc"), ("WORKDIR /build", "FROM python:latest AS other"),
], ids=lambda value: value[:30] or "nothing")
def test_an_unsound_dockerfile_is_noticed(old: str, new: str) -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert old in text
    assert dockerfile_faults(text.replace(old, new)) != []

def test_every_stage_starts_from_the_base_image_given() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    bases = {name: body[0].split()[1] for name, body in stages(text).items()}
    assert {base for base in bases.values() if base not in bases} == {"${PYTHON_IMAGE}"}
    assert re.search(r"^ARG PYTHON_IMAGE=\S+:3\.11[\w.-]+$", text, re.M), "a default that names its version"

def test_the_context_holds_what_is_allowed_and_no_more() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "nothing but what is named"
    allowed = [line[1:] for line in lines if line.startswith("!")]
    assert [path for path in allowed if not (ROOT / path).exists()] == []
    assert [path for path in allowed if Path(path).parts[0] not in ("deploy", "requirements", "rakuten_nb") and len(Path(path).suffix) < 2] == ["LICENSE"]
    assert {"**/.env*", "**/__pycache__"} <= set(lines[1 + len(allowed):]), "left out again, after what is allowed"

@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)], ids=["well", "not ready", "down"])
def test_the_health_check(status: int | None, code: int) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/ready" and status else 404)
            self.end_headers()
        def log_message(self, *args: object) -> None: "Says nothing."
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port if status else free_port()
        answer = subprocess.run([sys.executable, "-IS", ROOT / "deploy/docker/healthcheck.py", "/ready", str(port)], check=False, capture_output=True,
                                env=os.environ | {"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"})
        server.shutdown()
    assert answer.returncode == code, answer.stderr

# --- compose.yaml

def compose_faults(compose: dict[str, Any]) -> list[str]:
    "What makes a service less closed than it is meant to be."
    faults = []
    for name, service in compose["services"].items():
        wanted = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}
        faults += [f"{name}: {key} is {service.get(key)}" for key, value in wanted.items() if service.get(key) != value]
        faults += [f"{name}: has {key}" for key in ("privileged", "cap_add", "devices", "pid", "ipc") if key in service]
        if not re.search(r":(?!latest\b)[\w.-]+\}?$", service["image"]): faults.append(f"{name}: which version of {service['image']}?")
        if "mem_limit" not in service: faults.append(f"{name}: as much memory as it likes")
        if "restart" in service and "healthcheck" not in service: faults.append(f"{name}: nobody sees whether it is well")
        faults += [f"{name}: reachable from outside by {port}" for port in service.get("ports", []) if not str(port).startswith("127.0.0.1:")]
    for variable, default in SECRET.findall(json.dumps(compose)): faults.append(f"{variable} has the default {default}")
    api = compose["services"]["api"]
    if ":?" not in api["environment"]["SECRET_KEY"]: faults.append("api: starts without a SECRET_KEY")
    bundles = [v for v in api["volumes"] if isinstance(v, dict) and v["target"] == "/models"]
    if not all(v.get("read_only") for v in bundles) or not bundles: faults.append("api: the model is mounted, and only to be read")
    return faults

def set_in(service: str, key: str, value: object) -> Callable[[dict[str, Any]], None]:
    "A change of one service."
    def change(compose: dict[str, Any]) -> None: compose["services"][service][key] = value
    change.__name__ = f"{service} {key} {value}"
    return change

def test_compose_follows_the_schema() -> None:
    check = Path(sys.executable).with_name("check-jsonschema")
    answer = subprocess.run([check, "--builtin-schema", "vendor.compose-spec", ROOT / "compose.yaml"], check=False, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout

def test_compose_is_closed() -> None:
    assert compose_faults(COMPOSE) == []

@pytest.mark.parametrize("change", [
    set_in("api", "read_only", False), set_in("api", "cap_drop", []), set_in("postgres", "security_opt", []), set_in("train", "privileged", True),
    set_in("redis", "image", "redis:latest"), set_in("redis", "image", "redis"), set_in("api", "ports", ["8000:8000"]),
    set_in("api", "environment", {"SECRET_KEY": "${SECRET_KEY:-change-me}"}), set_in("api", "environment", {"SECRET_KEY": "${SECRET_KEY}"}),
    set_in("postgres", "environment", {"POSTGRES_PASSWORD": "${POSTGRES_PASSWORD:-postgres}"}),
    set_in("api", "volumes", ["data:/data"]), set_in("postgres", "healthcheck", None),
], ids=lambda change: change.__name__)
def test_a_more_open_compose_is_noticed(change: Callable[[dict[str, Any]], None]) -> None:
    changed = copy.deepcopy(COMPOSE)
    change(changed)
    if changed["services"]["postgres"]["healthcheck"] is None: del changed["services"]["postgres"]["healthcheck"]
    assert compose_faults(changed) != []

def test_compose_says_what_starts_when() -> None:
    profiles = {name: service.get("profiles", []) for name, service in COMPOSE["services"].items()}
    assert profiles == {"api": [], "postgres": ["full"], "redis": ["full"], "train": ["train"]}
    assert all(d == {"condition": "service_healthy", "required": False} for d in COMPOSE["services"]["api"]["depends_on"].values())
    targets = {name: service["build"]["target"] for name, service in COMPOSE["services"].items() if "build" in service}
    assert targets == {"api": "serve", "train": "train"}

def test_compose_gives_the_service_settings_that_exist() -> None:
    named = {name.lower() for name in COMPOSE["services"]["api"]["environment"]}
    assert named - set(Settings.model_fields) == set()

@pytest.mark.parametrize(("target", "extra", "said"), [
    ("up", {}, "make up: no SECRET_KEY in .env: `make serve` writes one there"),
    ("up", {"SECRET_KEY": "x", "PROFILE": "full"}, "make up: PROFILE=full needs POSTGRES_PASSWORD and REDIS_PASSWORD in .env"),
    ("up", {"SECRET_KEY": "x"}, "make up: no model in models/bundle: `make demo` makes one"),
    ("image-serve", {"CONTAINER": "no-such-engine"}, "make image-serve: no container engine: start Docker, or install podman or buildah"),
], ids=["no key", "no passwords", "no model", "no engine"])
@needs("make")
def test_make_says_in_one_line_what_is_missing(target: str, extra: dict[str, str], said: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    env = {k: v for k, v in os.environ.items() if k not in ("SECRET_KEY", "POSTGRES_PASSWORD", "REDIS_PASSWORD", "MAKEFLAGS")} | extra
    answer = subprocess.run(["make", target], cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
    assert answer.returncode != 0
    assert answer.stderr.splitlines()[0] == said

# --- a container

BASE = os.environ.get("RAKUTEN_TEST_BASE_IMAGE", "")
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096") # some machines allow no more
CLOSED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--security-opt", "no-new-privileges", "--network", "host", "--no-healthcheck")
COPIED = ("rakuten_nb", "deploy", "requirements", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", ".dockerignore")

def free_port() -> int:
    "A loopback port that nobody listens on."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

def podman(*args: object, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
    "Runs podman; what it says is shown where it fails."
    runtime = ["--runtime", "runc"] if shutil.which("runc") else []
    answer = subprocess.run(["podman", *runtime, *map(str, args)], check=False, capture_output=True, text=True, **more)
    assert not check or answer.returncode == 0, f"podman {' '.join(map(str, args))}\n{answer.stdout[-2000:]}\n{answer.stderr[-4000:]}"
    return answer

def debian_mirror() -> list[str]:
    "Where this machine's apt finds Debian 12, if it does; debootstrap knows another."
    if not shutil.which("apt-get"): return []
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Codename: bookworm", "Component: main"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.split()[:1]

@pytest.fixture(scope="module")
def base_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    "The image named by RAKUTEN_TEST_BASE_IMAGE (any Python 3.11 image), or a Debian 12 with Python made on the spot."
    if BASE:
        yield BASE
        return
    if os.geteuid() != 0: pytest.skip("debootstrap must be root's; RAKUTEN_TEST_BASE_IMAGE names an image that is there")
    name, folder = f"localhost/rakuten-nb-test-base:{secrets.token_hex(4)}", tmp_path_factory.mktemp("debian")
    include = "--include=python3.11,python3-pip,python3.11-venv,ca-certificates"
    subprocess.run(["debootstrap", "--variant=minbase", include, "bookworm", folder, *debian_mirror()], check=True, capture_output=True)
    with subprocess.Popen(["tar", "--create", "--directory", folder, "."], stdout=subprocess.PIPE) as tar:
        podman("import", "--quiet", "-", name, stdin=tar.stdout)
    shutil.rmtree(folder)
    yield name
    podman("rmi", "--force", name, check=False)

def pip_settings() -> dict[str, str]:
    "What pip is told on this machine, by its files and by the environment, the latter last."
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True).stdout
    found = dict(line.split("=", 1) for line in listed.splitlines())
    ordered = sorted(found.items(), key=lambda kv: kv[0].startswith(":env:"))
    settings = {key.rsplit(".", 1)[1]: str(ast.literal_eval(value)) for key, value in ordered if "find-links" not in key or "://" in value}
    return {key: value for key, value in settings.items() if key != "constraint" and "file://" not in value} # files of this machine are not in the build

def authorities(settings: dict[str, str]) -> Path:
    "The certificates this machine trusts."
    named = [settings.get("cert"), os.environ.get("REQUESTS_CA_BUNDLE"), os.environ.get("SSL_CERT_FILE"), "/etc/ssl/certs/ca-certificates.crt"]
    return next(Path(p) for p in named if p and Path(p).is_file())

@pytest.fixture(scope="module")
def markers() -> dict[str, bytes]:
    "What must be in no layer; the secret is made anew for each run."
    settings = pip_settings()
    lines = authorities(settings).read_text(encoding="utf-8", errors="replace").splitlines()
    found = {"the secret key": secrets.token_hex(32), "what lies beside the sources": secrets.token_hex(16), "pip's configuration": secrets.token_hex(16),
             "a certificate of this machine": lines[max(i for i, line in enumerate(lines) if "BEGIN CERTIFICATE" in line) + 2]}
    for key, value in settings.items():
        for url in re.findall(r"https?://([^/\s]+)", value): found[f"pip's {key}"] = url
    return {what: text.encode() for what, text in found.items()}

@pytest.fixture(scope="module")
def image(base_image: str, markers: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    "The image `serve`, built of a copy of the project in which things lie about that are nobody's business."
    context, name = tmp_path_factory.mktemp("project"), f"localhost/rakuten-nb-test-serve:{secrets.token_hex(4)}"
    for path in COPIED:
        if (ROOT / path).is_dir(): shutil.copytree(ROOT / path, context / path)
        else: shutil.copy(ROOT / path, context / path)
    for path in (".env", ".git/config", "data/a.csv", "models/bundle/a.json", "rakuten_nb/.env", "deploy/docker/.env", "requirements/pip.conf"):
        (context / path).parent.mkdir(parents=True, exist_ok=True)
        (context / path).write_bytes(markers["what lies beside the sources"])
    settings = configparser.RawConfigParser()
    settings["global"] = pip_settings()
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as conf: # readable by nobody else, and gone afterwards
        conf.write("# " + markers["pip's configuration"].decode() + "\n")
        settings.write(conf)
        conf.flush()
        podman("build", "--format", "docker", "--layers=false", "--network", "host", *LIMITS, "--build-arg", f"PYTHON_IMAGE={base_image}", "--target", "serve",
               "--secret", f"id=pip,src={conf.name}", "--secret", f"id=ca,src={authorities(pip_settings())}",
               "--file", context / "deploy/docker/Dockerfile", "--tag", name, context)
    yield name
    podman("rmi", "--force", name, check=False)

def ready(url: str, within: float) -> float:
    "Seconds until the service says that it is ready."
    began, said = time.monotonic(), "nothing"
    while time.monotonic() < began + within:
        try:
            said = (answer := httpx.get(f"{url}/ready", timeout=2, trust_env=False)).text
            if answer.status_code == 200: return time.monotonic() - began
        except httpx.TransportError as e: said = str(e)
        time.sleep(0.05)
    raise AssertionError(f"not ready within {within} s; last said {said}")

@pytest.fixture(scope="module")
def container(image: str, bundle: Path, markers: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    "A running container, by name and address; whatever happens, it is gone afterwards."
    name, port = f"rakuten-nb-test-{secrets.token_hex(4)}", free_port()
    try:
        podman("run", "--detach", "--name", name, *CLOSED, *LIMITS, "--volume", f"{name}:/data", "--volume", f"{bundle.parent}:/models:ro",
               "--env", f"SECRET_KEY={markers['the secret key'].decode()}", image, "serve", "--host", "127.0.0.1", "--port", port)
        yield name, f"http://127.0.0.1:{port}"
    finally:
        podman("rm", "--force", "--time", 2, name, check=False)
        podman("volume", "rm", "--force", name, check=False)

built = [pytest.mark.heavy, needs("podman"), *([] if BASE else [needs("debootstrap")])]

def marked(test: Callable[..., None]) -> Callable[..., None]:
    "Every mark of a test that builds the image."
    for mark in built: test = mark(test)
    return test

@marked
def test_a_container_predicts_and_ends_when_told(container: tuple[str, str], sample_catalog: Path) -> None:
    name, url = container
    seconds = ready(url, 30)
    password = secrets.token_urlsafe(16)
    podman("exec", "--interactive", name, "rakuten-nb", "users", "add", "amelie", "--role", "admin", "--password-stdin", input=password)
    picture = next((sample_catalog / "image_train").glob("*.jpg"))
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        token = client.post("/token", data={"username": "amelie", "password": password})
        assert token.status_code == 200, token.text
        bearing = {"Authorization": f"Bearer {token.json()['access_token']}"}
        files = {"image": (picture.name, picture.read_bytes(), "image/jpeg")}
        answer = client.post("/predict", headers=bearing, data={"designation": "Livre de poche"}, files=files)
        said = client.post("/feedback", headers=bearing, data={"request_id": answer.json()["request_id"], "prdtypecode": 10})
        assert said.status_code == 201 and said.json()["kept"], said.text
        assert client.post("/predict", data={"designation": "Livre de poche"}).status_code == 401
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["predictions"]) == 5
    podman("exec", name, "rakuten-nb", "feedback", "export", "/data/reviewed")
    assert "Livre de poche" in podman("exec", name, "cat", "/data/reviewed/X_train_update.csv").stdout
    port = url.rsplit(":", 1)[1]
    assert podman("exec", name, "python", "-IS", "/opt/healthcheck.py", "/health", port).returncode == 0
    assert podman("exec", name, "id", "-u").stdout.strip() == "10001"
    assert podman("exec", name, "touch", "/opt/venv/a", check=False).returncode != 0
    assert podman("exec", name, "sh", "-c", "command -v gcc cc make git", check=False).stdout == ""
    began = time.monotonic()
    podman("kill", "--signal", "TERM", name)
    code = int(podman("wait", name, timeout=30).stdout)
    assert time.monotonic() - began < 15
    assert code in (0, 128 + 15), podman("logs", name).stderr[-2000:]
    print(f"ready after {seconds:.1f} s, ended after {time.monotonic() - began:.1f} s")

def layers(image: str, base: str, folder: Path) -> tuple[bytes, list[Path]]:
    "What is said of an image, and the layers it has beside those of its base, as tar files."
    podman("save", "--format", "docker-archive", "--output", folder / "image.tar", image)
    with tarfile.open(folder / "image.tar") as archive: archive.extractall(folder, filter="data")
    manifest = json.loads((folder / "manifest.json").read_bytes())[0]
    below = len(json.loads(podman("image", "inspect", base).stdout)[0]["RootFS"]["Layers"])
    return (folder / manifest["Config"]).read_bytes(), [folder / layer for layer in manifest["Layers"][below:]]

def found_in(file: IO[bytes], markers: dict[str, bytes]) -> list[str]:
    "Which markers a file holds."
    content = file.read()
    return [what for what, marker in markers.items() if marker in content]

@marked
def test_no_layer_holds_a_secret(image: str, base_image: str, markers: dict[str, bytes], tmp_path: Path) -> None:
    said, own = layers(image, base_image, tmp_path)
    assert [what for what, marker in markers.items() if marker in said] == []
    assert own, "layers of its own"
    seen = set()
    for layer in own:
        with tarfile.open(layer) as tar:
            for member in tar:
                seen.add(member.name)
                if member.isfile() and (file := tar.extractfile(member)):
                    assert found_in(file, markers) == [], member.name
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rakuten_nb").rglob("*.py")}
    assert modules <= {name.partition("site-packages/")[2] for name in seen}, "the whole package is in it"
    assert [name for name in seen if Path(name).name in (".env", "pip.conf", ".netrc", ".pypirc", ".git")] == []
    assert [name for name in seen if name.startswith(("build/", "root/", "app/", "run/secrets/"))] == []

@marked
def test_the_scan_of_layers_finds_what_is_there(image: str, base_image: str, tmp_path: Path) -> None:
    _, own = layers(image, base_image, tmp_path)
    present = {"the entry point": b"from rakuten_nb.cli import run"}
    hits = 0
    for layer in own:
        with tarfile.open(layer) as tar: hits += sum(found_in(f, present) != [] for m in tar if m.isfile() and (f := tar.extractfile(m)))
    assert hits == 1
