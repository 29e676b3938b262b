"PostgreSQL and Redis servers for tests, on loopback, that can be stopped, frozen and restarted."
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
    "A server in a temporary folder; a context manager that stops it and removes the folder."
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
        "The command that runs the server in the foreground."

    @abstractmethod
    def answers(self) -> bool:
        "Whether the server accepts connections."

    def run(self, command: list[str]) -> "subprocess.Popen[bytes]":
        "Start a process as the server's owner; its output goes to a file."
        owner = {"user": self.owner, "group": pwd.getpwnam(self.owner).pw_gid, "extra_groups": []} if self.owner else {}
        env = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(self.home)}
        with (self.home / "terminal.log").open("ab") as terminal:
            program = find_program(command[0]) or command[0]
            options = {"stdin": subprocess.DEVNULL, "stdout": terminal, "stderr": terminal, **owner}
            return subprocess.Popen([program, *command[1:]], # type: ignore[call-overload,no-any-return]
                                    cwd=self.home, env=env, **options)

    def start(self) -> Self:
        "Start the server and wait until it accepts connections."
        self.process, deadline = self.run(self.command()), time.monotonic() + START_SECONDS
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.home / "terminal.log").read_text(errors="replace"))
            time.sleep(0.05)
        return self

    def stop(self) -> None:
        "Stop the server and close its connections (fast shutdown)."
        assert self.process
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=60)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        "Stop the server during the block: connections are refused."
        self.stop()
        try: yield
        finally: self.start()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        "Freeze the server during the block: it accepts connections and does not answer."
        assert self.process
        family = [self.process.pid, *children_of(self.process.pid)]
        def send(number: int) -> None:
            for pid in family:
                with suppress(ProcessLookupError): os.kill(pid, number)
        send(signal.SIGSTOP)
        try: yield
        finally: send(signal.SIGCONT)

    def __enter__(self) -> Self: return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process and self.process.poll() is None: self.stop()
        shutil.rmtree(self.home, ignore_errors=True)

class Postgres(Server):
    "PostgreSQL with one superuser and a password."
    program = "postgres"
    user = "rakuten"

    def __init__(self) -> None:
        super().__init__()
        self.password, self.databases = secrets.token_urlsafe(16), 0

    def url(self, database: str, password: str | None = None, port: int | None = None) -> str:
        "The URL of a database, for RAKUTEN_DATABASE_URL."
        return f"postgresql+psycopg://{self.user}:{password or self.password}@127.0.0.1:{port or self.port}/{database}"

    def connect(self) -> psycopg.Connection[tuple[object, ...]]:
        "A connection to the maintenance database."
        return psycopg.connect(self.url("postgres").replace("+psycopg", ""), autocommit=True, connect_timeout=5)

    def new_database(self) -> str:
        "Create an empty database; returns its URL."
        self.databases += 1
        name = f"test_{self.databases}"
        with self.connect() as c: c.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def command(self) -> list[str]:
        "Without fsync: the files need not survive a crash of the machine."
        settings = {"port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": self.home,
                    "fsync": "off", "max_connections": 100}
        options = [option for name, value in settings.items() for option in ("-c", f"{name}={value}")]
        return ["postgres", "-D", str(self.home / "data"), *options]

    def answers(self) -> bool:
        "Whether a login succeeds."
        try: self.connect().close()
        except psycopg.OperationalError: return False
        return True

    def start(self) -> Self:
        "Create the data folder before the first start."
        if not (self.home / "data").exists():
            secret = self.home / "password"
            secret.write_text(self.password)
            if self.owner: shutil.chown(secret, self.owner)
            initdb = self.run(["initdb", "-D", str(self.home / "data"), "-U", self.user, "-E", "UTF8", "--no-locale",
                               "--no-sync", "--auth=scram-sha-256", f"--pwfile={secret}"])
            if initdb.wait(timeout=120): raise RuntimeError((self.home / "terminal.log").read_text(errors="replace"))
            secret.unlink()
        return super().start()

class RedisServer(Server):
    "Redis without persistence."
    program = "redis-server"

    @property
    def url(self) -> str:
        "The URL for RAKUTEN_REDIS_URL."
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> "Redis":
        "A connection to the server."
        return Redis(port=self.port, socket_timeout=5)

    def command(self) -> list[str]:
        "Listens on loopback only."
        return ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
                "--dir", str(self.home)]

    def answers(self) -> bool:
        "Whether a ping succeeds."
        try:
            with self.client() as c: return bool(c.ping())
        except RedisError: return False
