"""Experts beside each other, as Ray tasks and by a launcher: the masks are those of one after the other, to the bit."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

from cascade.kernels.materialize import materialize
from cascade.model.masks import Mask, pack
from tests.conftest import need
from tests.helpers.paths import ROOT
from tests.helpers.torments import until
from training import clusters, dispatcher, experts
from training.checkpoint import CHECKPOINT, DONE
from training.cli import Watch
from training.curve import CURVE
from training.recipe import Recipe
from training.run import begin, resume

pytestmark = pytest.mark.e2e
CLUSTERS, STEPS, EVERY = 2, 150, 50  # a checkpoint after 50 steps, the loop's default
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def runs(cifar_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of runs: `begun` with dispatcher and clusters, `alone` with the experts, too, in this process."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = Recipe(
        str(cifar_folder),
        backbone="test_resnet",
        source="random:0",
        size=32,
        mask_from="layer4",
        draws=1,
        steps=6,
        expert_steps=STEPS,
        batch=16,
        lr=0.02,
        local_crops=0,
        prototypes=40,
        clusters=CLUSTERS,
        router="centroid",
    )
    run = begin(folder / "begun", recipe, Watch(None))
    bits = torch.ones(run.backbone.weights.numel(), dtype=torch.bool)
    materialize(run.backbone, Mask("all", 0, pack(bits)))  # the kernel, when it first runs, sets everybody's threads
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dispatcher.train(run)
    clusters.fit(run)
    shutil.copytree(folder / "begun", folder / "alone")
    experts.train(resume(folder / "alone", Watch(None)))
    torch.set_num_threads(threads)
    yield folder


def the_same_as_alone(run: Path) -> None:
    """What each expert ended with, to the byte; and that it is more than what it began with."""
    found = [(run / f"expert-{k}" / DONE).read_bytes() for k in range(CLUSTERS)]
    assert found == [(run.parent / "alone" / f"expert-{k}" / DONE).read_bytes() for k in range(CLUSTERS)]
    assert len({*found, (run / "dispatcher" / DONE).read_bytes()}) == CLUSTERS + 1
    assert not list(run.rglob("*.tmp")) and not list(run.rglob(CHECKPOINT))


def test_a_task_dies_and_goes_on_from_its_checkpoint(runs: Path) -> None:
    need(find_spec("ray"), "Ray is not installed")
    run = shutil.copytree(runs / "begun", runs / "tasks")
    folder = Path(tempfile.mkdtemp(prefix="e2e-", dir="/tmp"))  # short: Ray's sockets lie in it
    command = [sys.executable, "-m", "training.ray_experts", "--run", str(run)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | ENVIRONMENT | {"TMPDIR": str(folder)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ray may end its whole process group
    )
    assert process.stderr is not None
    try:
        until(lambda: list(run.glob(f"expert-*/{CURVE}")) or process.poll() is not None, 300)
        assert process.poll() is None, process.stderr.read()
        expert = next(run.glob(f"expert-*/{CURVE}")).parent
        started = psutil.Process(process.pid).children(recursive=True)
        (task,) = (each for each in started if _has_open(each, expert / CURVE))
        until(lambda: (expert / CHECKPOINT).exists() or process.poll() is not None)
        task.kill()  # at once: the rest of its steps takes a second or two
        started = psutil.Process(process.pid).children(recursive=True)
        before = timed(expert)
        assert not (expert / DONE).exists(), "in the midst of it"
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert f"{CLUSTERS} experts as Ray tasks of 1 CPU each" in " ".join(said.split())
        assert timed(expert) == before, "what was done is not done again"
        the_same_as_alone(run)
        until(lambda: not any(each.is_running() for each in started))
        assert not list(folder.iterdir())
    finally:
        for each in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            each.kill()
        process.kill()
        process.wait()
        process.stderr.close()
        shutil.rmtree(folder)


def timed(expert: Path) -> float:
    """The speed of the steps before the first checkpoint, which no second time has to three places."""
    line = json.loads((expert / CURVE).read_text().splitlines()[EVERY - 1])
    return float(line["steps_per_s"])


def _has_open(process: psutil.Process, path: Path) -> bool:
    try:
        return str(path) in [file.path for file in process.open_files()]
    except psutil.Error:
        return False


@pytest.mark.soak
def test_a_launcher_starts_a_process_for_each(runs: Path) -> None:
    """The line of docs/training.md."""
    run = shutil.copytree(runs / "begun", runs / "launched")
    shutil.rmtree(runs / "cache")  # all of them want it, one makes it
    line = f"seq 0 {CLUSTERS - 1} | xargs -P 2 -I K {sys.executable} -m training.experts --run {run} --only K"
    done = subprocess.run(
        ["bash", "-c", line], cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    the_same_as_alone(run)
    assert [path.suffix for path in (runs / "cache").iterdir()] == [".npy"] * 2, "images and features"
