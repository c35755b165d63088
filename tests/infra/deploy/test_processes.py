"""Tests of background processes that are recorded by process id and start time."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infra.deploy import processes
from infra.deploy.processes import Service, Started, read_started, start, start_time, stop
from infra.errors import StageError

SLEEP = Service(name="sleep", command=["sleep", "60"], settle_s=0.1)


def test_start_twice_keeps_the_process_and_stop_ends_it(tmp_path: Path) -> None:
    (first,) = start([SLEEP], tmp_path)
    assert start([SLEEP], tmp_path) == [first]
    assert stop(tmp_path) == ["sleep"]
    assert start_time(first.pid) is None
    assert read_started(tmp_path) == []


def test_stop_leaves_a_later_process_with_the_same_id(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        begun = start_time(other.pid) or 0
        processes._record(tmp_path, [Started(name="sleep", pid=other.pid, started=begun - 1)])
        assert stop(tmp_path) == []
        assert other.poll() is None
        other.kill()


def test_start_with_a_command_that_ends_fails_with_its_last_line_and_stops_the_others(tmp_path: Path) -> None:
    fails = Service(name="bad", command=[sys.executable, "-c", "print('no such option'); raise SystemExit(2)"])
    with pytest.raises(StageError, match=r"bad does not start \(no such option\); see .*bad.log"):
        start([SLEEP, dataclasses.replace(fails, settle_s=20.0)], tmp_path)
    assert read_started(tmp_path) == []


def test_start_on_a_port_in_use_fails_and_stops_the_others(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(StageError, match=f"port of server is in use: {port}"):
            start([SLEEP, dataclasses.replace(SLEEP, name="server", port=port)], tmp_path)
    assert read_started(tmp_path) == []
    assert start_time(os.getpid()) is not None
