"""`make demo`: a table for a person, an exit status for a script, and nothing left in any case."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.e2e


def start(*arguments: str | Path, columns: int = 80) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "handlers.demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CASCADE_EXECUTOR": "auto", "COLUMNS": str(columns), "PATH": "/usr/bin:/bin"},
    )


def children(pid: int) -> list[str]:
    """The servers that it started; what libraries start while they are imported are none."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(FileNotFoundError):  # it is gone already
            if b"ModelServer" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def test_table_urls_and_metrics(bundle_path: Path) -> None:
    demo = start("--store", bundle_path.parents[1])
    out, err = demo.communicate(timeout=300)
    assert (demo.returncode, err) == (0, "")
    photos = sorted(path.stem for path in ROOT.glob("tests/data/photos/*.png"))
    assert [line.split()[0] for line in out.splitlines() if line.split() and line.split()[0] in photos] == photos
    assert "dispatcher" in out and "expert-" in out
    assert "http://127.0.0.1:" in out and "/predictions/cascade" in out
    (misses,) = [line for line in out.splitlines() if "cascade_mask_misses_total" in line]
    assert float(misses.split()[1]) >= 2
    assert max(map(len, out.split("endpoint")[0].splitlines())) <= 80


def test_failures_are_one_line(bundle_path: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("broken.png").write_bytes(b"not an image")
    cases: tuple[tuple[list[str | Path], str], ...] = (
        (["--store", tmp_path], "no bundle in"),
        ([tmp_path / "nowhere", "--store", bundle_path.parents[1]], "no image in"),
        ([tmp_path, "--store", bundle_path.parents[1]], "broken.png: status 400"),
    )
    demos = [start(*arguments) for arguments, _ in cases]
    said = [demo.communicate(timeout=300)[1] for demo in demos]
    assert [demo.returncode for demo in demos] == [1, 1, 1]
    for err, (_, words) in zip(said, cases, strict=True):
        assert err.startswith("demo: ") and words in err and err.count("\n") == 1


def test_ctrl_c_while_it_starts_leaves_nothing(bundle_path: Path) -> None:
    demo = start("--store", bundle_path.parents[1])
    end = time.monotonic() + 120
    while not (java := children(demo.pid)):
        assert demo.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    demo.send_signal(signal.SIGINT)
    out, err = demo.communicate(timeout=120)
    assert demo.returncode == 130
    assert "Traceback" not in out + err
    end = time.monotonic() + 60
    while Path("/proc", java[0]).exists():
        with suppress(ChildProcessError):  # adopted by us, it is ours to reap
            os.waitpid(int(java[0]), os.WNOHANG)
        assert time.monotonic() < end
        time.sleep(0.02)
