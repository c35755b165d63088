"""Tests of the SIGTERM handler, in a separate process; test_ray_train.py sends SIGTERM to a worker of Ray Train."""

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]

HANDLER = """
import os, signal
from infra.compute import preemption
signal.signal(signal.SIGTERM, lambda *_: print("previous handler", flush=True))
preemption.install_handler()
os.kill(os.getpid(), signal.SIGTERM)
with preemption.deferred_sigterm():
    print(preemption.stop_requested(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print(preemption.stop_requested(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGTERM)
with preemption.deferred_sigterm():
    print(preemption.stop_requested(), flush=True)
"""


def test_handler_defers_only_the_first_sigterm_during_training() -> None:
    done = subprocess.run([sys.executable, "-c", HANDLER], cwd=ROOT, capture_output=True, text=True, timeout=60)
    expected = ["previous handler", "False", "True", "previous handler", "previous handler", "False"]
    assert done.stdout.splitlines() == expected, done.stderr


def test_handler_without_a_previous_handler_exits_on_sigterm() -> None:
    script = (
        "import os, signal; from infra.compute import preemption; "
        "preemption.install_handler(); os.kill(os.getpid(), signal.SIGTERM)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
