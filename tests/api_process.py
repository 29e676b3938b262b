"The API as a process of its own on loopback, and a client for it."
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from rakuten_nb.store.database import Store, open_store
from rakuten_nb.store.users import add_user, find_user, hash_password

KEY = "a key that is long enough for tests, and for nothing else"
PASSWORD = "a password that is long enough"
USERS = {"marie": "user", "rose": "reviewer", "root": "admin"}
START_SECONDS = 60.0 # generous for a busy machine; `rakuten-nb bench` measures the start

def free_port() -> int:
    "A port of loopback that is not in use."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])

class ApiProcess:
    "A running API; a context manager that ends it."
    def __init__(self, env: dict[str, str], home: Path, bundle: Path, **settings: str):
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.port = home, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        own = {"SECRET_KEY": KEY, "RAKUTEN_BUNDLE": str(bundle), "RAKUTEN_DATA_DIR": str(home / "data"),
               "RAKUTEN_LOG_DIR": str(home / "logs"), "RAKUTEN_RATE_LIMIT_PREDICT": "100000/minute",
               "RAKUTEN_AUDIT_SHARE": "0"} # no random review, unless a test asks for it
        self.env = env | own | settings
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=self.url, timeout=30)

    @property
    def database_url(self) -> str:
        "The URL of its database."
        return self.env.get("RAKUTEN_DATABASE_URL") or f"sqlite:///{self.home}/data/rakuten.sqlite"

    def store(self) -> Store:
        "Its store, opened by the test as well."
        return open_store(self.database_url)

    def start(self, wait: bool = True) -> "ApiProcess":
        "Start it with `uvicorn`; its output goes to a file."
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--no-access-log"]
        command = [sys.executable, "-m", "uvicorn", "rakuten_nb.serving.api:app", *options]
        with (self.home / "terminal.log").open("ab") as terminal:
            self.process = subprocess.Popen(command, env=self.env, cwd=self.home, stdout=terminal, stderr=terminal)
        if wait: self.wait_until("/health", {200})
        return self

    def wait_until(self, route: str, statuses: set[int]) -> httpx.Response:
        "The first response of a route with one of these statuses."
        began, last = time.monotonic(), "nothing"
        while time.monotonic() - began < START_SECONDS:
            assert self.process and self.process.poll() is None, self.terminal()
            try:
                if (answer := self.client.get(route)).status_code in statuses: return answer
                last = answer.text
            except httpx.TransportError as e: last = repr(e)
            time.sleep(0.05)
        raise AssertionError(f"{route}: {last}\n{self.terminal()}")

    def terminal(self) -> str:
        "The output of the process."
        return (self.home / "terminal.log").read_text(errors="replace")

    def log(self) -> str:
        "The content of its log files."
        return "".join(p.read_text(encoding="utf-8") for p in (self.home / "logs").glob("serving_logger.log*"))

    def add_users(self, **users: str) -> None:
        "Add users by name and role, all with `PASSWORD`."
        store = self.store()
        for name, role in users.items(): add_user(store, name, hash_password(PASSWORD, rounds=4), role)
        store.close()

    def generation(self, name: str) -> int:
        "The generation of a user, which tokens carry."
        store = self.store()
        user = find_user(store, name)
        store.close()
        assert user
        return user.generation

    def token(self, name: str = "marie", **fields: str) -> dict[str, str]:
        "The header of a user who has logged in."
        answer = self.client.post("/token", data={"username": name, "password": PASSWORD, **fields})
        assert answer.status_code == 200, answer.text
        return {"Authorization": f"Bearer {answer.json()['access_token']}"}

    def predict(
        self, headers: dict[str, str], title: str = "", description: str = "", picture: bytes | None = None,
        **fields: Any,
    ) -> httpx.Response:
        "Send a product to `POST /predict`."
        data = {"designation": title, "description": description, **fields}
        files = {"image": picture} if picture is not None else None
        return self.client.post("/predict", data=data, files=files, headers=headers)

    def stop(self, number: int = 15) -> int:
        "End the process by a signal and return its exit code."
        assert self.process
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def __enter__(self) -> "ApiProcess": return self.start()

    def __exit__(self, *_: object) -> None:
        self.client.close()
        if self.process and self.process.poll() is None: self.stop()

class JobWorker:
    "`rakuten-nb jobs worker` in a process of its own."
    def __init__(self, api: ApiProcess):
        command = [sys.executable, "-m", "rakuten_nb.cli", "jobs", "worker"]
        with (api.home / "worker.log").open("ab") as terminal:
            self.process = subprocess.Popen(command, env=api.env, cwd=api.home, stdout=terminal, stderr=terminal)

    def stop(self, number: int = signal.SIGTERM) -> int:
        "Send a signal and wait; returns the exit code."
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

def memory_mb(pid: int) -> float:
    "The peak resident memory of a process, in MiB."
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

def children_of(pid: int) -> list[int]:
    "The child processes of a process."
    children = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError): # a process that has ended meanwhile
            if f"PPid:\t{pid}\n" in status.read_text(): children.append(int(status.parent.name))
    return children
