"""`make demo`: a table for a person, an exit status for a script, and nothing left in any case."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from cascade.bundle.format import read, write
from handlers.demo_images import samples
from tests.conftest import sheet
from tests.data.make import CUSTOMERS
from tests.helpers.domains import with_domain
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.e2e


def start(*arguments: str | Path, columns: int | None = 80) -> "subprocess.Popen[str]":
    known = {"CASCADE_EXECUTOR": "folded", "PATH": "/usr/bin:/bin"} | ({"COLUMNS": str(columns)} if columns else {})
    return subprocess.Popen(
        [sys.executable, "-m", "handlers.demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | known,
    )


def children(pid: int) -> list[str]:
    """The servers that it started; what libraries start while they are imported are none."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(FileNotFoundError):  # it is gone already
            if b"ModelServer" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


@pytest.fixture(scope="module")
def customers(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two customers of the demo, whose domains are those of real images, and the cascade asked by name."""
    store = tmp_path_factory.mktemp("store")
    bundle = read(bundle_path)
    assert bundle.card.domain is not None
    write(bundle, store / "objects" / "1")
    write(with_domain(bundle, sheet("fashion_mnist"), bundle.card.domain.stage), store / "clothes" / "1")
    alone = bundle.card.model_copy(update={"domain": None})
    write(replace(bundle, domain=None, card=alone), store / "paper" / "1")
    return store


def test_images_of_all_customers(customers: Path) -> None:
    """Every image is in the table, in plain text of 100 columns, and the facts are below it."""
    demo = start("--store", customers, columns=None)
    out, err = demo.communicate(timeout=300)
    assert (demo.returncode, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines)) <= 100 and "\x1b" not in out
    rows = [line.split() for line in lines if line.strip().partition("/")[0] in (*CUSTOMERS, "nobody")]
    images = samples()
    assert len(rows) == sum(image.shown for image in images)
    sent = {customer: {row[1] for row in rows[:-2] if row[0].startswith(f"{customer}/")} for customer in CUSTOMERS}
    assert sent["objects"] == {"objects"} and sent["clothes"] == {"clothes"}
    assert all(row[1] == "paper" and {"dispatcher"} < {*row} for row in rows[-2:])
    facts = {line.split()[0]: line for line in lines if line.strip()}
    assert {"backbone", "models", "labels", "dispatch", "throughput", "answers"} <= facts.keys()
    labeled = sum(image.bundle is None and image.label is not None for image in images)
    assert f" of {labeled} are right" in facts["labels"] and f" of {labeled} images" in facts["dispatch"]
    assert "resident once" in facts["backbone"] and f"all {len(rows)} images" in facts["answers"]
    assert "3 resident copies would take" in out


def test_images_of_ones_own(bundle_path: Path, tmp_path: Path) -> None:
    """Nobody knows their labels, and a single bundle answers them without dispatch."""
    shutil.copytree(ROOT / "tests" / "data" / "photos", tmp_path / "mine")
    demo = start(tmp_path / "mine", "--store", bundle_path.parents[1], columns=80)
    out, err = demo.communicate(timeout=300)
    assert (demo.returncode, err) == (0, "")
    photos = sorted(path.stem for path in (tmp_path / "mine").iterdir())
    assert [line.split()[0] for line in out.splitlines() if line.split() and line.split()[0] in photos] == photos
    assert "expert-" in out and "labels" not in out and "throughput" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_failures_are_one_line(bundle_path: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("broken.png").write_bytes(b"not an image")
    cases: tuple[tuple[list[str | Path], str], ...] = (
        (["--store", tmp_path], "no bundle in"),
        ([tmp_path / "nowhere", "--store", bundle_path.parents[1]], "no image in"),
        ([tmp_path, "--store", bundle_path.parents[1]], "broken: not_an_image"),
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
