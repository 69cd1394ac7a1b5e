"""Train experts in parallel: each is a Ray task, on the cluster of RAY_ADDRESS or on this machine.

    python -m training.ray_experts --run runs/photos
    cascade train photos/ --out model_store/photos/1 --ray     # all stages; this one by Ray

A task does the same as ``python -m training.experts --only K``. Tasks share only the run's folder: every node needs it,
and the images, at the same path. If a task's process or node dies, Ray restarts it, possibly on another node, and it
resumes from its checkpoint.
"""

import json
import os
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from cascade import ray_session
from cascade.cpus import usable
from cascade.errors import CascadeError, brief
from cascade.kernels.materialize import materialize
from training import distributed, experts
from training.checkpoint import DONE
from training.cli import RUN, RunFolder, Watch, stage, start
from training.curve import CURVE
from training.run import Run, resume

RETRIES = 3  # of a task that dies
LOOK = 1.0  # seconds between two reads of the curves
TAIL = 1 << 16  # bytes at the end of a curve that contain its last line
OBJECT_STORE = 80 * 2**20  # bytes, hardly more than Ray's minimum: it is not used
HELP = "Train each expert in a Ray task, on the cluster at RAY_ADDRESS or on this machine."


def train(run: Run) -> None:
    """``experts.train`` with one task per expert; bit-identical with the same number of threads.

    A task takes a GPU if the cluster has any, else as many CPUs as a training in this process has threads.

    Raises:
        CascadeError: Ray is missing or has no node that is large enough, or an expert can't be trained.
    """
    check()
    missing = [k for k in range(run.recipe.clusters) if not (run.folder / f"expert-{k}" / DONE).exists()]
    if not missing:
        return
    _ = run.clusters, run.pixels, run.views  # decode and store everything once
    materialize(run.backbone, run.dispatcher)  # the kernel's first run also sets PyTorch's number of threads
    threads = torch.get_num_threads()
    with ray_session.running(usable(), OBJECT_STORE, log_to_driver=False) as ray:
        task = ray.remote(max_retries=RETRIES, **_needs(ray, len(missing), threads, run.watch))(_one)
        where = str(Path.cwd()), str(run.folder.resolve())
        running = {task.options(name=f"expert-{k}").remote(*where, k): k for k in missing}
        warned: set[tuple[int, str]] = set()
        while running:
            done, _ = ray.wait(list(running), timeout=LOOK)
            for k in running.values():
                _follow(run, k, warned)
            for each in done:
                _result(ray, each, running.pop(each))


def check() -> None:
    """Check the preconditions, before anything is trained.

    Raises:
        CascadeError: Ray is not installed, or torchrun has started several processes.
    """
    if find_spec("ray") is None:
        raise CascadeError("Ray is not installed: pip install 'cascade-vision[ray]'")
    if distributed.world() > 1:
        raise CascadeError("--ray starts its own tasks: omit torchrun, or --ray")


def _one(where: str, folder: str, k: int) -> None:
    """The task."""
    if not Path(where).is_dir() or not Path(folder).is_dir():
        raise CascadeError(f"{where} and {folder} must exist on every node: share them, or start from a shared folder")
    os.chdir(where)  # relative sources are relative to it
    experts.train(resume(Path(folder), Watch(None)), [k])


def _needs(ray: Any, count: int, threads: int, watch: Watch) -> dict[str, Any]:
    """The resources of a task; prints how many tasks run at the same time."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    what, each = ("GPU", 1) if any(node.get("GPU") for node in nodes) else ("CPU", threads)
    fit = sum(int(node.get(what, 0) // each) for node in nodes)
    if not fit:
        raise CascadeError(f"no node of the cluster has {each} CPUs, one for each thread: set NUMBA_NUM_THREADS lower")
    watch.say(f"{count} experts as Ray tasks of {each} {what} each, {min(fit, count)} at a time")
    if what == "GPU":
        return {"num_gpus": 1}
    environment = {name: str(threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    return {"num_cpus": threads, "runtime_env": {"env_vars": environment}}


def _follow(run: Run, k: int, warned: set[tuple[int, str]]) -> None:
    """Show an expert's progress by the last line of its curve, and warn of each problem once."""
    try:
        with open(run.folder / f"expert-{k}" / CURVE, "rb") as curve:
            curve.seek(max(0, curve.seek(0, os.SEEK_END) - TAIL))
            *_, last, _ = [b"", *curve.read().split(b"\n")]
    except FileNotFoundError:
        return
    if not last.startswith(b"{"):
        return
    line = json.loads(last)
    run.watch(f"expert-{k}", line["step"] + 1, run.recipe.expert_steps, line["loss"])
    for what, text in line.get("warnings", {}).items():
        if (k, what) not in warned:
            warnings.warn(f"expert-{k}, step {line['step']}: {text}", stacklevel=3)
            warned.add((k, what))


def _result(ray: Any, task: Any, k: int) -> None:
    """Get the result of a finished task; re-raise its error."""
    try:
        ray.get(task)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, CascadeError):
            raise CascadeError(str(cause)) from error
        raise CascadeError(f"expert {k} was not trained ({brief(cause)}): start again to resume") from error


def command(run: RunFolder = RUN) -> None:
    """Train the experts of a run whose clusters are fitted."""
    with stage() as watch:
        train(resume(run, watch))


if __name__ == "__main__":
    start(command)
