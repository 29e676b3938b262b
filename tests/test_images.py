"The container images: the Dockerfile, compose.yaml, and a container that runs the built image."
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

from rakuten_nb.config import RENAMED, Settings

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
TARGETS = ("train", "serve")
SECRET = re.compile(r"\$\{(\w*(?:SECRET|PASSWORD|TOKEN|KEY)(?:_\w+)?)(?::?[-=])([^}]+)\}")

# --- the Dockerfile

def stages(text: str) -> dict[str, list[str]]:
    "The instructions of each stage, with continued lines joined and without comments."
    by_stage: dict[str, list[str]] = {}
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for instruction in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if m := re.fullmatch(r"FROM (\S+) AS (\w[\w-]*)", instruction): by_stage[m[2]] = [f"FROM {m[1]}"]
        elif by_stage: by_stage[list(by_stage)[-1]].append(instruction)
    return by_stage

FORBIDDEN = { # what → pattern
    "a download by ADD": r"^ADD\s+https?:", "the tag latest": r":latest\b",
    "an index": r"index[-_]url|trusted-host|find-links", "a secret": r"^(ENV|ARG)\s.*(SECRET|PASSWORD|TOKEN)",
    "a compiler": r"\bgcc\b|build-essential", "a certificate": r"COPY.*\.(crt|pem|key)\b",
}

def target_faults(target: str, body: list[str]) -> list[str]:
    "What is missing or forbidden in one target of the Dockerfile."
    faults = []
    values = lambda word: [line.split(maxsplit=1)[1] for line in body if line.split()[0] == word]
    users = values("USER")
    numeric = users and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    if not numeric: faults.append(f"{target}: expected a numeric user, not root")
    for word in ("ENTRYPOINT", "CMD"):
        form = values(word)
        exec_form = form and form[-1].startswith("[")
        if not exec_form: faults.append(f"{target}: expected {word} in exec form, which forwards signals")
    if "/data" not in values("VOLUME"): faults.append(f"{target}: expected a volume for its data")
    titled = any("org.opencontainers.image.title" in label for label in values("LABEL"))
    if not titled: faults.append(f"{target}: expected a title")
    copies = any(line.startswith(("ADD", "COPY requirements", "COPY .")) for line in body)
    if copies: faults.append(f"{target}: copies sources")
    return faults

def dockerfile_faults(text: str) -> list[str]:
    "What is missing or forbidden in the Dockerfile."
    by_stage = stages(text)
    faults = [fault for target in TARGETS for fault in target_faults(target, by_stage.get(target, []))]
    health = any(line.startswith("HEALTHCHECK") and '"/health"' in line for line in by_stage.get("serve", []))
    if not health: faults.append("serve: expected a health check")
    code = "\n".join(line for body in by_stage.values() for line in body)
    return faults + [f"contains {what}" for what, pattern in FORBIDDEN.items() if re.search(pattern, code, re.M | re.I)]

def test_the_dockerfile_follows_the_rules() -> None:
    assert dockerfile_faults(DOCKERFILE.read_text(encoding="utf-8")) == []

@pytest.mark.parametrize(("old", "new"), [
    ("USER 10001:10001", "USER root"), ("USER 10001:10001", ""), ("HEALTHCHECK", "#"),
    ('ENTRYPOINT ["rakuten-nb"]', "ENTRYPOINT rakuten-nb"), ("WORKDIR /build", "ADD https://example.org/a.tar /a"),
    ("WORKDIR /build", "ENV PIP_INDEX_URL=https://example.org"), ("WORKDIR /build", "ARG SECRET_KEY=a"),
    ("WORKDIR /build", "RUN apt-get install -y gcc"), ("WORKDIR /build", "FROM python:latest AS other"),
], ids=lambda value: value[:30] or "nothing")
def test_detects_a_dockerfile_that_breaks_a_rule(old: str, new: str) -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert old in text
    assert dockerfile_faults(text.replace(old, new)) != []

def test_every_stage_starts_from_the_configured_base_image() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    bases = {name: body[0].split()[1] for name, body in stages(text).items()}
    assert {base for base in bases.values() if base not in bases} == {"${PYTHON_IMAGE}"}
    assert re.search(r"^ARG PYTHON_IMAGE=\S+:3\.11[\w.-]+$", text, re.M), "the default names its version"

def test_the_build_context_contains_only_allowed_paths() -> None:
    text = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "the first line excludes everything"
    allowed = [Path(line[1:]) for line in lines if line.startswith("!")]
    assert [path for path in allowed if not (ROOT / path).exists()] == []
    others = [path for path in allowed if path.parts[0] not in ("deploy", "requirements", "rakuten_nb")]
    assert [str(path) for path in others if len(path.suffix) < 2] == ["LICENSE"]
    assert {"**/.env*", "**/__pycache__"} <= set(lines[1 + len(allowed):]), "excluded again after the allowed paths"

@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)], ids=["ready", "not ready", "down"])
def test_the_health_check_exits_0_only_if_ready(status: int | None, code: int) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/ready" and status else 404)
            self.end_headers()
        def log_message(self, *args: object) -> None: "Writes no log."
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port if status else free_port()
        proxied = os.environ | {"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
        command = [sys.executable, "-IS", ROOT / "deploy/docker/healthcheck.py", "/ready", str(port)]
        answer = subprocess.run(command, check=False, capture_output=True, env=proxied)
        server.shutdown()
    assert answer.returncode == code, answer.stderr

# --- compose.yaml

HARDENED = {"read_only": True, "cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"]}

def service_faults(name: str, service: dict[str, Any]) -> list[str]:
    "Settings of one service that weaken its isolation."
    faults = [f"{name}: {key} is {service.get(key)}" for key, value in HARDENED.items() if service.get(key) != value]
    faults += [f"{name}: has {key}" for key in ("privileged", "cap_add", "devices", "pid", "ipc") if key in service]
    image = service["image"]
    if not re.search(r":(?!latest\b)[\w.-]+\}?$", image): faults.append(f"{name}: {image} has no version")
    if "mem_limit" not in service: faults.append(f"{name}: no memory limit")
    if "restart" in service and "healthcheck" not in service: faults.append(f"{name}: no health check")
    ports = [port for port in service.get("ports", []) if not str(port).startswith("127.0.0.1:")]
    return faults + [f"{name}: reachable from outside by {port}" for port in ports]

def compose_faults(compose: dict[str, Any]) -> list[str]:
    "Settings that weaken the isolation of the services."
    faults = [fault for name, service in compose["services"].items() for fault in service_faults(name, service)]
    for variable, default in SECRET.findall(json.dumps(compose)): faults.append(f"{variable} has the default {default}")
    api = compose["services"]["api"]
    if ":?" not in api["environment"]["SECRET_KEY"]: faults.append("api: starts without a SECRET_KEY")
    bundles = [v for v in api["volumes"] if isinstance(v, dict) and v["target"] == "/models"]
    read_only = bundles and all(v.get("read_only") for v in bundles)
    if not read_only: faults.append("api: expected a read-only mount of the model")
    return faults

def set_in(service: str, key: str, value: object) -> Callable[[dict[str, Any]], None]:
    "A function that changes one service."
    def change(compose: dict[str, Any]) -> None: compose["services"][service][key] = value
    change.__name__ = f"{service} {key} {value}"
    return change

def test_compose_follows_the_schema() -> None:
    check = Path(sys.executable).with_name("check-jsonschema")
    command = [check, "--builtin-schema", "vendor.compose-spec", ROOT / "compose.yaml"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout

def test_compose_isolates_its_services() -> None:
    assert compose_faults(COMPOSE) == []

@pytest.mark.parametrize("change", [
    set_in("api", "read_only", False), set_in("api", "cap_drop", []), set_in("api", "ports", ["8000:8000"]),
    set_in("postgres", "security_opt", []), set_in("train", "privileged", True),
    set_in("redis", "image", "redis:latest"), set_in("redis", "image", "redis"),
    set_in("api", "environment", {"SECRET_KEY": "${SECRET_KEY:-change-me}"}),
    set_in("api", "environment", {"SECRET_KEY": "${SECRET_KEY}"}),
    set_in("postgres", "environment", {"POSTGRES_PASSWORD": "${POSTGRES_PASSWORD:-postgres}"}),
    set_in("api", "volumes", ["data:/data"]), set_in("postgres", "healthcheck", None),
], ids=lambda change: change.__name__)
def test_detects_a_weaker_compose(change: Callable[[dict[str, Any]], None]) -> None:
    changed = copy.deepcopy(COMPOSE)
    change(changed)
    postgres = changed["services"]["postgres"]
    if postgres["healthcheck"] is None: del postgres["healthcheck"]
    assert compose_faults(changed) != []

def test_compose_profiles_and_dependencies() -> None:
    profiles = {name: service.get("profiles", []) for name, service in COMPOSE["services"].items()}
    assert profiles == {"api": [], "monitor": ["full", "monitor"], "postgres": ["full"], "redis": ["full"],
                        "train": ["train"]}
    healthy = {"condition": "service_healthy", "required": False}
    for name in ("api", "monitor"):
        assert all(dependency == healthy for dependency in COMPOSE["services"][name]["depends_on"].values())
    targets = {name: service["build"]["target"] for name, service in COMPOSE["services"].items() if "build" in service}
    assert targets == {"api": "serve", "train": "train"}

def test_compose_sets_existing_settings_only() -> None:
    names = {name.lower() for service in ("api", "monitor") for name in COMPOSE["services"][service]["environment"]}
    former = {name.lower() for name in RENAMED}
    assert names - set(Settings.model_fields) - former == set()

def test_the_monitor_shares_database_data_and_model_with_the_api() -> None:
    api, monitor = COMPOSE["services"]["api"], COMPOSE["services"]["monitor"]
    assert monitor["image"] == api["image"] and monitor["environment"].items() - {
        ("MLFLOW_TRACKING_URI", "${MLFLOW_TRACKING_URI:-}")} <= api["environment"].items()
    assert [v for v in api["volumes"] if v not in monitor["volumes"]] == []
    assert monitor["command"][:2] == ["monitor", "--every"]

@pytest.mark.parametrize(("age", "code"), [(60, 0), (3600, 1), (None, 1)], ids=["recent", "old", "none"])
def test_the_monitors_health_is_the_age_of_its_last_pass(age: int | None, code: int, tmp_path: Path) -> None:
    test = COMPOSE["services"]["monitor"]["healthcheck"]["test"]
    if age is not None:
        (status := tmp_path / "monitor.json").touch()
        os.utime(status, (time.time() - age,) * 2)
    script = test[-1].replace("/data/", f"{tmp_path}/")
    assert subprocess.run([sys.executable, *test[2:-1], script], check=False, capture_output=True).returncode == code

@pytest.mark.parametrize(("target", "extra", "message"), [
    ("up", {}, "make up: no SECRET_KEY in .env: `make serve` writes one there"),
    ("up", {"SECRET_KEY": "x", "PROFILE": "full"},
     "make up: PROFILE=full needs POSTGRES_PASSWORD and REDIS_PASSWORD in .env"),
    ("up", {"SECRET_KEY": "x"}, "make up: no model in models/bundle: `make demo` makes one"),
    ("image-serve", {"CONTAINER": "no-such-engine"},
     "make image-serve: no container engine: start Docker, or install podman or buildah"),
], ids=["no key", "no passwords", "no model", "no engine"])
@needs("make")
def test_make_reports_a_missing_prerequisite(target: str, extra: dict[str, str], message: str, tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    unset = ("SECRET_KEY", "POSTGRES_PASSWORD", "REDIS_PASSWORD", "MAKEFLAGS")
    env = {k: v for k, v in os.environ.items() if k not in unset} | extra
    answer = subprocess.run(["make", target], cwd=tmp_path, env=env, check=False, capture_output=True, text=True)
    assert answer.returncode != 0
    assert answer.stderr.splitlines()[0] == message

# --- a container

BASE = os.environ.get("RAKUTEN_TEST_BASE_IMAGE", "")
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096") # the most that some machines allow
CLOSED = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--security-opt", "no-new-privileges",
          "--network", "host", "--no-healthcheck")
COPIED = ("rakuten_nb", "deploy", "requirements", "settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE",
          ".dockerignore")
BESIDE = (".env", ".git/config", "data/a.csv", "models/bundle/a.json", "rakuten_nb/.env", "deploy/docker/.env",
          "requirements/pip.conf") # files of a project that must not enter an image

def free_port() -> int:
    "An unused loopback port."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

def podman(*args: object, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
    "Run podman; a failure shows its output."
    runtime = ["--runtime", "runc"] if shutil.which("runc") else []
    answer = subprocess.run(["podman", *runtime, *map(str, args)], check=False, capture_output=True, text=True, **more)
    output = f"podman {' '.join(map(str, args))}\n{answer.stdout[-2000:]}\n{answer.stderr[-4000:]}"
    assert not check or answer.returncode == 0, output
    return answer

def debian_mirror() -> list[str]:
    "The Debian 12 mirror of this machine's apt, if it has one; debootstrap has a default."
    if not shutil.which("apt-get"): return []
    target = ("Created-By: Packages", "Codename: bookworm", "Component: main")
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", *target]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.split()[:1]

@pytest.fixture(scope="module")
def base_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    "The image that RAKUTEN_TEST_BASE_IMAGE names (any Python 3.11 image), or a new Debian 12 with Python."
    if BASE:
        yield BASE
        return
    if os.geteuid() != 0: pytest.skip("debootstrap needs root; set RAKUTEN_TEST_BASE_IMAGE to an existing image")
    name, folder = f"localhost/rakuten-nb-test-base:{secrets.token_hex(4)}", tmp_path_factory.mktemp("debian")
    include = "--include=python3.11,python3-pip,python3.11-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", include, "bookworm", folder, *debian_mirror()]
    subprocess.run(command, check=True, capture_output=True)
    with subprocess.Popen(["tar", "--create", "--directory", folder, "."], stdout=subprocess.PIPE) as tar:
        podman("import", "--quiet", "-", name, stdin=tar.stdout)
    shutil.rmtree(folder)
    yield name
    podman("rmi", "--force", name, check=False)

def pip_settings() -> dict[str, str]:
    "The settings of pip on this machine, the environment last; without files, which the build cannot read."
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    listed_entries = dict(line.split("=", 1) for line in listed.splitlines()).items()
    entries = sorted(listed_entries, key=lambda entry: entry[0].startswith(":env:"))
    usable = [(key, value) for key, value in entries if "find-links" not in key or "://" in value]
    settings = {key.rsplit(".", 1)[1]: str(ast.literal_eval(value)) for key, value in usable}
    return {key: value for key, value in settings.items() if key != "constraint" and "file://" not in value}

def authorities(settings: dict[str, str]) -> Path:
    "The certificate authorities that this machine trusts."
    environment = [os.environ.get(name) for name in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")]
    paths = [settings.get("cert"), *environment, "/etc/ssl/certs/ca-certificates.crt"]
    return next(Path(p) for p in paths if p and Path(p).is_file())

@pytest.fixture(scope="module")
def markers() -> dict[str, bytes]:
    "Strings that no layer may contain; the secrets are new in each run."
    settings = pip_settings()
    lines = authorities(settings).read_text(encoding="utf-8", errors="replace").splitlines()
    certificate = lines[max(i for i, line in enumerate(lines) if "BEGIN CERTIFICATE" in line) + 2]
    texts = {"the secret key": secrets.token_hex(32), "a file beside the sources": secrets.token_hex(16),
             "pip's configuration": secrets.token_hex(16), "a certificate of this machine": certificate}
    for key, value in settings.items():
        for url in re.findall(r"https?://([^/\s]+)", value): texts[f"pip's {key}"] = url
    return {what: text.encode() for what, text in texts.items()}

@pytest.fixture(scope="module")
def image(base_image: str, markers: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    "The image `serve`, built from a copy of the project with private files beside the sources."
    context, name = tmp_path_factory.mktemp("project"), f"localhost/rakuten-nb-test-serve:{secrets.token_hex(4)}"
    for path in COPIED:
        if (ROOT / path).is_dir(): shutil.copytree(ROOT / path, context / path)
        else: shutil.copy(ROOT / path, context / path)
    for path in BESIDE:
        (context / path).parent.mkdir(parents=True, exist_ok=True)
        (context / path).write_bytes(markers["a file beside the sources"])
    settings = configparser.RawConfigParser()
    settings["global"] = pip_settings()
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as conf: # private, and deleted afterwards
        conf.write("# " + markers["pip's configuration"].decode() + "\n")
        settings.write(conf)
        conf.flush()
        options = ("--format", "docker", "--layers=false", "--network", "host", *LIMITS, "--target", "serve")
        mounts = ("--secret", f"id=pip,src={conf.name}", "--secret", f"id=ca,src={authorities(pip_settings())}")
        podman("build", *options, *mounts, "--build-arg", f"PYTHON_IMAGE={base_image}",
               "--file", context / "deploy/docker/Dockerfile", "--tag", name, context)
    yield name
    podman("rmi", "--force", name, check=False)

def ready(url: str, within: float) -> float:
    "Seconds until the service is ready."
    began, last = time.monotonic(), "no response"
    while time.monotonic() < began + within:
        try:
            response = httpx.get(f"{url}/ready", timeout=2, trust_env=False)
            if response.status_code == 200: return time.monotonic() - began
            last = response.text
        except httpx.TransportError as e: last = str(e)
        time.sleep(0.05)
    raise AssertionError(f"not ready within {within} s; last response: {last}")

@pytest.fixture(scope="module")
def container(image: str, bundle: Path, markers: dict[str, bytes]) -> Iterator[tuple[str, str]]:
    "A running container, by name and address; removed afterwards."
    name, port = f"rakuten-nb-test-{secrets.token_hex(4)}", free_port()
    try:
        volumes = ("--volume", f"{name}:/data", "--volume", f"{bundle.parent}:/models:ro")
        secret = f"SECRET_KEY={markers['the secret key'].decode()}"
        podman("run", "--detach", "--name", name, *CLOSED, *LIMITS, *volumes, "--env", secret,
               image, "serve", "--host", "127.0.0.1", "--port", port)
        yield name, f"http://127.0.0.1:{port}"
    finally:
        podman("rm", "--force", "--time", 2, name, check=False)
        podman("volume", "rm", "--force", name, check=False)

built = [pytest.mark.heavy, needs("podman"), *([] if BASE else [needs("debootstrap")])]

def marked(test: Callable[..., None]) -> Callable[..., None]:
    "Add every mark of a test that builds the image."
    for mark in built: test = mark(test)
    return test

@marked
def test_a_container_predicts_and_stops_on_a_signal(container: tuple[str, str], sample_catalog: Path) -> None:
    name, url = container
    seconds = ready(url, 30)
    password = secrets.token_urlsafe(16)
    add_user = ("rakuten-nb", "users", "add", "amelie", "--role", "admin", "--password-stdin")
    podman("exec", "--interactive", name, *add_user, input=password)
    picture = next((sample_catalog / "image_train").glob("*.jpg"))
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
        token = client.post("/token", data={"username": "amelie", "password": password})
        assert token.status_code == 200, token.text
        bearing = {"Authorization": f"Bearer {token.json()['access_token']}"}
        files = {"image": (picture.name, picture.read_bytes(), "image/jpeg")}
        answer = client.post("/predict", headers=bearing, data={"designation": "Livre de poche"}, files=files)
        label = {"request_id": answer.json()["request_id"], "prdtypecode": 10}
        feedback = client.post("/feedback", headers=bearing, data=label)
        assert feedback.status_code == 201 and feedback.json()["kept"], feedback.text
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
    "The configuration of an image, and its layers above those of its base as tar files."
    podman("save", "--format", "docker-archive", "--output", folder / "image.tar", image)
    with tarfile.open(folder / "image.tar") as archive: archive.extractall(folder, filter="data")
    manifest = json.loads((folder / "manifest.json").read_bytes())[0]
    below = len(json.loads(podman("image", "inspect", base).stdout)[0]["RootFS"]["Layers"])
    return (folder / manifest["Config"]).read_bytes(), [folder / layer for layer in manifest["Layers"][below:]]

def found_in(file: IO[bytes], markers: dict[str, bytes]) -> list[str]:
    "The markers that a file contains."
    content = file.read()
    return [what for what, marker in markers.items() if marker in content]

@marked
def test_no_layer_contains_a_secret(image: str, base_image: str, markers: dict[str, bytes], tmp_path: Path) -> None:
    config, own = layers(image, base_image, tmp_path)
    assert [what for what, marker in markers.items() if marker in config] == []
    assert own, "expected layers above the base"
    seen = set()
    for layer in own:
        with tarfile.open(layer) as tar:
            for member in tar:
                seen.add(member.name)
                if member.isfile() and (file := tar.extractfile(member)):
                    assert found_in(file, markers) == [], member.name
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rakuten_nb").rglob("*.py")}
    assert modules <= {name.partition("site-packages/")[2] for name in seen}, "the whole package is installed"
    assert [name for name in seen if Path(name).name in (".env", "pip.conf", ".netrc", ".pypirc", ".git")] == []
    assert [name for name in seen if name.startswith(("build/", "root/", "app/", "run/secrets/"))] == []

@marked
def test_the_scan_of_layers_finds_a_present_string(image: str, base_image: str, tmp_path: Path) -> None:
    _, own = layers(image, base_image, tmp_path)
    present = {"the entry point": b"from rakuten_nb.cli import run"}
    hits = 0
    for layer in own:
        with tarfile.open(layer) as tar:
            files = (file for member in tar if member.isfile() and (file := tar.extractfile(member)))
            hits += sum(found_in(file, present) != [] for file in files)
    assert hits == 1
