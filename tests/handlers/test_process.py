"""Children end with all their descendants: when told to, and when we are killed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from handlers import process
from tests.helpers.paths import ROOT

# A shell whose grandchildren ignore SIGTERM, as a worker in a long native call does.
TREE = ["/bin/sh", "-c", "trap '' TERM; sleep 1000 & (sleep 1000; :) & echo started; wait"]


def members(group: int) -> list[int]:
    """Processes of the group, zombies among them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group:
            found.append(int(stat.parent.name))
    return found


def gone(group: int, within: float = 60) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        with contextlib.suppress(ChildProcessError):  # adopted by us, it is ours to reap
            os.waitpid(-group, os.WNOHANG)
        if not members(group):
            return True
        time.sleep(0.01)
    return False


def test_our_modules_run_whatever_the_working_folder_holds(tmp_path: Path) -> None:
    """A user's own package may be called `handlers` or `training`, too."""
    for package in ("handlers", "training", "cascade"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('not ours')")
    command = process.python("handlers.health")
    command[command.index("-m") :] = ["-c", "import cascade, handlers, training; print('ours')"]
    for search in ("", os.pathsep):
        env = {**os.environ, "PYTHONPATH": search}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "environ", env)
            done = subprocess.run(command, env=process.environment(), cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout == "ours\n", done.stderr


def started(folder: Path) -> "subprocess.Popen[bytes]":
    with (folder / "out").open("wb") as out:
        tree = process.start(TREE, os.environ, folder, out, out)
    while b"started" not in (folder / "out").read_bytes():
        time.sleep(0.01)
    return tree


def test_kill_leaves_no_descendant_and_no_zombie(tmp_path: Path) -> None:
    tree = started(tmp_path)
    assert len(members(tree.pid)) >= 3
    assert os.getsid(tree.pid) == tree.pid, "a session of its own, out of the terminal's reach"
    process.kill(tree)
    assert tree.returncode == -signal.SIGKILL
    assert members(tree.pid) == []


def test_kill_after_the_leader_died(tmp_path: Path) -> None:
    tree = started(tmp_path)
    os.kill(tree.pid, signal.SIGKILL)
    tree.wait()
    assert members(tree.pid)
    process.kill(tree)
    assert members(tree.pid) == []
    process.kill(tree)


def test_start_names_the_command_that_is_missing(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        child = process.start(["/no/such/program"], os.environ, tmp_path, out, out)
    assert child.wait() != 0
    assert "FileNotFoundError" in (tmp_path / "out").read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_child_dies_with_its_parent(number: int) -> None:
    parent = """
import os, sys, time
from pathlib import Path
from handlers import process
err = sys.stderr.buffer
child = process.start(["/bin/sleep", "1000"], os.environ, Path("/"), err, err)
while Path(f"/proc/{child.pid}/comm").read_text() != "sleep\\n":
    time.sleep(0.01)
print(child.pid, flush=True)
time.sleep(1000)
"""
    command = [sys.executable, "-c", parent]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as ours:
        assert ours.stdout is not None
        child = int(ours.stdout.readline())
        assert members(child) == [child]
        ours.send_signal(number)
    assert gone(child)
