"A PostgreSQL and a Redis of the tests' own, on loopback, that can be stopped, frozen and started again."
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import psycopg
from api_process import START_SECONDS, children_of, free_port
from conftest import find_program
from redis import Redis
from redis.exceptions import RedisError

UNPRIVILEGED = ("postgres", "nobody") # PostgreSQL refuses to run as root

class Server(ABC):
    "A server in a folder of its own under the system's temporary one; a context that ends it and clears up."
    program: str

    def __init__(self) -> None:
        self.home, self.port = Path(tempfile.mkdtemp(prefix=f"{self.program}-")), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.owner: str | None = None
        if os.geteuid() == 0:
            names = {entry.pw_name for entry in pwd.getpwall()}
            self.owner = next(name for name in UNPRIVILEGED if name in names)
            shutil.chown(self.home, self.owner)

    @abstractmethod
    def command(self) -> list[str]:
        "How it is started in the foreground."

    @abstractmethod
    def answers(self) -> bool:
        "Whether it does."

    def run(self, command: list[str]) -> "subprocess.Popen[bytes]":
        "A process of the server's owner, its terminal in a file."
        as_owner = {"user": self.owner, "group": pwd.getpwnam(self.owner).pw_gid, "extra_groups": []} if self.owner else {}
        env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(self.home)}
        with (self.home / "terminal.log").open("ab") as terminal:
            return subprocess.Popen([find_program(command[0]) or command[0], *command[1:]], stdin=subprocess.DEVNULL, stdout=terminal, stderr=terminal,
                                    cwd=self.home, env=env, **as_owner) # type: ignore[call-overload]

    def start(self) -> Self:
        "Start it and wait until it answers."
        self.process, deadline = self.run(self.command()), time.monotonic() + START_SECONDS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline: raise RuntimeError((self.home / "terminal.log").read_text(errors="replace"))
            time.sleep(0.05)
        return self

    def stop(self) -> None:
        "End it at once, its clients' connections too, but in order."
        assert self.process
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=60)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        "It is away meanwhile: whoever connects is refused."
        self.stop()
        try: yield
        finally: self.start()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        "It takes connections meanwhile, and says nothing."
        assert self.process
        family = [self.process.pid, *children_of(self.process.pid)]
        def tell(number: int) -> None:
            for pid in family:
                with suppress(ProcessLookupError): os.kill(pid, number)
        tell(signal.SIGSTOP)
        try: yield
        finally: tell(signal.SIGCONT)

    def __enter__(self) -> Self: return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process and self.process.poll() is None: self.stop()
        shutil.rmtree(self.home, ignore_errors=True)

class Postgres(Server):
    "PostgreSQL with one superuser, who has a password."
    program = "postgres"
    user = "rakuten"

    def __init__(self) -> None:
        super().__init__()
        self.password, self.databases = secrets.token_urlsafe(16), 0

    def url(self, database: str, password: str | None = None, port: int | None = None) -> str:
        "Where a database is, as the settings want it."
        return f"postgresql+psycopg://{self.user}:{password or self.password}@127.0.0.1:{port or self.port}/{database}"

    def connect(self) -> psycopg.Connection[tuple[object, ...]]:
        "A connection of one's own, beside the store's."
        return psycopg.connect(self.url("postgres").replace("+psycopg", ""), autocommit=True, connect_timeout=5)

    def new_database(self) -> str:
        "The URL of an empty database."
        self.databases += 1
        name = f"test_{self.databases}"
        with self.connect() as c: c.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def command(self) -> list[str]:
        "Files that need not survive the machine are not synchronised."
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": self.home, "fsync": "off", "max_connections": 100}
        return ["postgres", "-D", str(self.home / "data"), *(word for k, v in settings.items() for word in ("-c", f"{k}={v}"))]

    def answers(self) -> bool:
        "Whether somebody can log in."
        try: self.connect().close()
        except psycopg.OperationalError: return False
        return True

    def start(self) -> Self:
        "The first time, make its data folder."
        if not (self.home / "data").exists():
            secret = self.home / "password"
            secret.write_text(self.password)
            if self.owner: shutil.chown(secret, self.owner)
            made = self.run(["initdb", "-D", str(self.home / "data"), "-U", self.user, "-E", "UTF8", "--no-locale", "--no-sync", "--auth=scram-sha-256",
                             f"--pwfile={secret}"])
            if made.wait(timeout=120): raise RuntimeError((self.home / "terminal.log").read_text(errors="replace"))
            secret.unlink()
        return super().start()

class RedisServer(Server):
    "Redis that keeps nothing on disk."
    program = "redis-server"

    @property
    def url(self) -> str:
        "Where it is, as the settings want it."
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> "Redis":
        "A connection of one's own, beside the API's."
        return Redis(port=self.port, socket_timeout=5)

    def command(self) -> list[str]:
        "Loopback only."
        return ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(self.home)]

    def answers(self) -> bool:
        "Whether it does."
        try:
            with self.client() as c: return bool(c.ping())
        except RedisError: return False
