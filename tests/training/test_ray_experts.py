"""Experts as Ray tasks: what is asked of a cluster, shown, and refused. The tasks themselves run in tests/e2e."""

import json
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cascade.errors import CascadeError
from tests.conftest import need
from tests.helpers.training import Recorder
from training import distributed, pipeline, ray_experts
from training.checkpoint import DONE
from training.curve import CURVE
from training.recipe import Recipe
from training.run import Run

pytestmark = pytest.mark.slow


class ProgressRecorder(Recorder):
    """Keeps the progress too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, int, float]] = []

    def __call__(self, name: str, step: int, steps: int, loss: float) -> None:
        self.seen.append((name, step, steps, loss))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, Recipe("photos", clusters=2, expert_steps=100), ProgressRecorder())


def cluster(*nodes: dict[str, float]) -> Any:
    """Stands for a Ray whose nodes have these resources: no test machine has them."""
    listed = [{"Alive": True, "Resources": node} for node in nodes]
    return SimpleNamespace(nodes=lambda: [*listed, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}])


def test_a_task_takes_a_gpu_or_as_many_cpus_as_there_are_threads() -> None:
    recorder = ProgressRecorder()
    assert ray_experts._needs(cluster({"CPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}), 5, 2, recorder) == {"num_gpus": 1}
    environment = {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}
    want = {"num_cpus": 2, "runtime_env": {"env_vars": environment}}
    assert ray_experts._needs(cluster({}, {"CPU": 3.0}, {"CPU": 8.0}), 4, 2, recorder) == want
    assert recorder.said == [
        "5 experts as Ray tasks of 1 GPU each, 2 at a time",
        "4 experts as Ray tasks of 2 CPU each, 4 at a time",
    ]
    with pytest.raises(CascadeError, match="no node of the cluster has 2 CPUs, .* set NUMBA_NUM_THREADS lower"):
        ray_experts._needs(cluster({"CPU": 1.0}, {"CPU": 1.0}), 4, 2, recorder)


def test_curves_are_followed(run: Run) -> None:
    """To the last whole line; what goes wrong is said once."""
    recorder, warned = run.watch, set[tuple[int, str]]()
    assert isinstance(recorder, ProgressRecorder)
    ray_experts._follow(run, 1, warned)  # it has not begun
    curve = run.folder / "expert-1" / CURVE
    curve.parent.mkdir()
    for nothing in ("", '{"step": 0', "x" * ray_experts.TAIL + "}\n"):
        curve.write_text(nothing)
        ray_experts._follow(run, 1, warned)
    assert recorder.seen == []
    lines = [{"step": 0, "loss": 3.5}, {"step": 49, "loss": 2.5, "warnings": {"embedding": "collapses"}}]
    curve.write_text("\n".join([*map(json.dumps, lines), '{"step": 50, "lo']))
    with pytest.warns(UserWarning, match="expert-1, step 49: collapses") as told:
        ray_experts._follow(run, 1, warned)
        ray_experts._follow(run, 1, warned)
    assert recorder.seen == [("expert-1", 50, 100, 2.5)] * 2 and len(told) == 1


def test_a_tasks_error_is_one_line() -> None:
    """Ours as it is; another one with what to do."""
    need(find_spec("ray"), "Ray is not installed")
    import ray

    def failing(error: Exception) -> Any:
        def get(task: object) -> None:
            raise error

        return SimpleNamespace(get=get, exceptions=ray.exceptions)

    def of_a_task(cause: Exception) -> Exception:
        return ray.exceptions.RayTaskError("_one", "Traceback\n  of\n  many lines", cause).as_instanceof_cause()

    for error, message in (
        (of_a_task(CascadeError("the loss of expert-1 became nan")), "^the loss of expert-1 became nan$"),
        (of_a_task(OSError("no space")), r"^expert 1 was not trained \(OSError: no space\): start again to resume$"),
        (ray.exceptions.WorkerCrashedError(), r"^expert 1 was not trained \(WorkerCrashedError: [^\n]*to resume$"),
    ):
        with pytest.raises(CascadeError, match=message):
            ray_experts._result(failing(error), object(), 1)


def test_what_stops_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CascadeError, match="gone and .* must exist on every node"):
        ray_experts._one(str(tmp_path / "gone"), str(tmp_path), 0)
    monkeypatch.setattr(ray_experts, "find_spec", lambda name: name)
    with pytest.raises(CascadeError, match="run python -m training.clusters first"):
        ray_experts.train(run)
    for k in range(2):
        (run.folder / f"expert-{k}").mkdir()
        (run.folder / f"expert-{k}" / DONE).touch()
    ray_experts.train(run)  # there is nothing to do
    monkeypatch.setattr(ray_experts, "find_spec", lambda name: None)
    for train in (ray_experts.train, partial(pipeline.train, out=tmp_path / "store" / "a" / "1", ray=True)):
        with pytest.raises(CascadeError, match="Ray is not installed: pip install 'cascade-vision"):
            train(run)
    monkeypatch.setattr(ray_experts, "find_spec", lambda name: name)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(CascadeError, match="omit torchrun, or --ray"):
        ray_experts.train(run)
