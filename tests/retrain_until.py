"""Run `rakuten-nb retrain` and kill the process in one of its steps, as `kill -9` does: STEP [ARGUMENTS OF RETRAIN…]

The step does its work; the process dies before the result is stored. In the step `train` it dies in the middle of the
pipeline."""
import os
import signal
import sys
from typing import Any

from rakuten_nb.cli import run
from rakuten_nb.operations import retrain

def die() -> None:
    "End this process at once."
    os.kill(os.getpid(), signal.SIGKILL)

def killed_in(step: str) -> None:
    "Replace a step by one that does not survive its work."
    work_on = retrain.STEP_FUNCTIONS[step]
    def step_function(work: retrain.Work) -> dict[str, Any]:
        if step == "train": work.show = lambda line: die() if line.startswith("Running stage") else None
        work_on(work)
        die()
        return {}
    retrain.STEP_FUNCTIONS[step] = step_function

killed_in(sys.argv[1])
sys.argv = ["rakuten-nb", "retrain", *sys.argv[2:]]
run()
