"""A process that has imported the command line and forks for every command that a test runs.

Each command is still a process of its own, with its own environment, folder, output and exit code. It only saves the
import of pandas, scikit-learn and ONNX Runtime, which takes longer than most commands. No thread and no model exists
before the fork.
"""
import atexit
import json
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

READY = "ready"
# Imported before the fork. TensorFlow is not: it starts threads, which a fork would lose.
PRELOAD = ("rakuten_nb.cli", "rakuten_nb.evaluation.report", "rakuten_nb.models.image", "rakuten_nb.models.text_linear",
           "rakuten_nb.models.training", "sklearn.svm", "sklearn.linear_model", "sklearn.model_selection", "datasketch")

class ForkServer:
    "Runs `rakuten-nb` commands; one at a time."
    def __init__(self, env: dict[str, str]):
        self.lock = threading.Lock()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: subprocess.Popen[str] = subprocess.Popen([sys.executable, __file__], env=env, **pipes)
        assert self._line() == READY

    def _line(self) -> str:
        "The next line of the server."
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def run(self, args: tuple[object, ...], env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
        "Run one command."
        with self.lock, tempfile.TemporaryDirectory() as folder:
            out, err = (Path(folder) / name for name in ("out", "err"))
            command = {"argv": [str(a) for a in args], "env": env, "cwd": str(cwd), "out": str(out), "err": str(err)}
            assert self.process.stdin
            print(json.dumps(command), file=self.process.stdin, flush=True)
            code = int(self._line())
            texts = (path.read_text(encoding="utf-8", errors="replace") for path in (out, err))
            return subprocess.CompletedProcess(command["argv"], code, *texts)

    def close(self) -> None:
        "End the server."
        if self.process.stdin: self.process.stdin.close()
        self.process.wait(timeout=20)

def run_command(command: dict[str, Any]) -> int: # exit code
    "The child process: take over environment, folder and output, then run the command line."
    os.chdir(command["cwd"])
    os.environ.clear()
    os.environ.update(command["env"])
    for number, path in ((0, os.devnull), (1, command["out"]), (2, command["err"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), number)
    sys.argv = ["rakuten-nb", *command["argv"]]
    from rakuten_nb.cli import run
    try: run()
    except SystemExit as e: return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

def child(command: dict[str, Any]) -> None:
    "Run a command and end the process as the interpreter would."
    code = run_command(command)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr): stream.flush()
    os._exit(code)

def serve() -> None:
    "Fork for each line of standard input; print the exit code."
    import importlib
    for name in PRELOAD: importlib.import_module(name)
    print(READY, flush=True)
    for line in sys.stdin:
        if (pid := os.fork()) == 0: child(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

if __name__ == "__main__": serve()
