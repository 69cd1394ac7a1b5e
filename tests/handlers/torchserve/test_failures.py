"""Reasons travel from a worker to the entrypoint, and dead workers are seen."""

import subprocess
import sys
from pathlib import Path

from handlers.torchserve.failures import LONGEST, Failures, report, workers

WORKER = "import time; print(flush=True); time.sleep(600)"


def test_reasons_arrive_in_order_and_are_bounded(tmp_path: Path) -> None:
    failures = Failures(tmp_path / "failures")
    try:
        assert failures.read() == []
        report(tmp_path / "failures", "no bundle in store: is it mounted?")
        report(str(tmp_path / "failures"), "x" * 2 * LONGEST)
        assert failures.read() == ["no bundle in store: is it mounted?", "x" * LONGEST]
        assert failures.read() == []
        for number in range(10_000):  # nobody reads: a worker does not wait for that
            report(tmp_path / "failures", str(number))
        assert failures.read()[0] == "0"
    finally:
        failures.close()
    report(tmp_path / "failures", "nobody listens")
    report(tmp_path / "nowhere", "nobody listens")


def test_living_workers_of_a_parent(tmp_path: Path) -> None:
    script = tmp_path / "model_service_worker.py"
    script.write_text(WORKER)
    command = [
        sys.executable,
        "-c",
        "import subprocess, sys, time;"
        "worker = subprocess.Popen([sys.executable, sys.argv[1]], stdout=subprocess.PIPE);"
        "other = subprocess.Popen(['sleep', '600']);"
        "worker.stdout.readline(); print(worker.pid, flush=True); input(); worker.kill(); print(flush=True); input();"
        "worker.wait(); other.kill()",
        str(script),
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin and parent.stdout
        pid = int(parent.stdout.readline())
        assert workers(parent.pid) == {pid}
        parent.stdin.write("\n")
        parent.stdin.flush()
        parent.stdout.readline()
        while Path(f"/proc/{pid}/cmdline").read_bytes():
            pass
        assert workers(parent.pid) == set(), "a zombie is dead"
        parent.stdin.write("\n")
        parent.stdin.flush()
    assert workers(parent.pid) == set()
