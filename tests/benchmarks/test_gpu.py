"""The GPU's measurements run to their end: here on a CPU, where their figures mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_features
from benchmarks.report import Rows
from tests.helpers.gpu_on_cpu import stub
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

FIGURES = {
    "swap": {
        "swap_share_of_bandwidth_gpu",
        "delta_share_of_bandwidth_gpu",
        "swap_launches_gpu",
        "swap_over_copy_gpu",
    },
    "mixed_distinct": {"mixed_distinct_gpu", "mixed_distinct_by_swaps_gpu"},
    "identical": {"identical_over_unmasked_gpu", "identical_over_unmasked_executor_gpu"},
    "mixed_uniform": {"mixed_uniform_gpu", "mixed_uniform_over_unmasked_gpu"},
    "cascades": {
        "conditional_passes_last_stage_gpu",
        "conditional_passes_all_gpu",
        "unconditional_passes_last_stage_gpu",
    },
    "executors": {"bf16_over_float32_gpu", "onnx_over_float32_gpu", "bf16_error_gpu"},  # no TF32 on a CPU
    "loading": {"load_first_seconds_gpu", "load_next_seconds_gpu"},
    "dispatch": {"named_over_dispatched_gpu"},
    "deferral": {"adaptive_over_full_gpu", "adaptive_over_fast_gpu"},
}


def once(ways: gpu.Ways, rounds: int, runs: int) -> dict[str, list[float]]:
    """``gpu.seconds``, without warming up and without repetition."""
    for way in ways.values():
        way(0)
    return {name: [1.0] for name in ways}


@pytest.mark.parametrize("name", FIGURES)
def test_a_measurement(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch.setattr)
    for module in (gpu, gpu_features):
        monkeypatch.setattr(module, "seconds", once)
    figures = getattr(gpu, name)("test_resnet", "folded", 1, Rows(name))
    assert set(figures) == FIGURES[name]
    assert all(figure.value > 0 for key, figure in figures.items() if "launches" not in key)


def test_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch.setattr)
    figures = gpu.scale("test_resnet", "folded", 6, 1, Rows("scale"))
    assert set(figures) == {"scale_5_to_6_gpu", "scale_p95_wait_seconds_gpu"}


def first_run(out: Path, **environment: str) -> list[dict[str, object]]:
    """The script's steps, as it recorded them."""
    everything = {**os.environ, "DRY_RUN": "1", "OUT": str(out), "PYTHON": sys.executable, **environment}
    script = ROOT / "benchmarks" / "gpu_first_run.sh"
    done = subprocess.run(["bash", script], env=everything, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]


def test_the_first_run(tmp_path: Path) -> None:
    """Tests that skip, a measurement that is recorded, and no other step."""
    steps = first_run(tmp_path, STEPS="engine swap")
    assert [(step["step"], step["status"]) for step in steps] == [("engine", 0), ("swap", 0)]
    assert "skipped" in (tmp_path / "engine.log").read_text()
    report = json.loads((tmp_path / "swap.json").read_text())
    assert set(report["figures"]) == FIGURES["swap"]


def test_the_first_run_ends_in_time() -> None:
    """The limits of all steps, and every step is one that runs by default."""
    text = (ROOT / "benchmarks" / "gpu_first_run.sh").read_text()
    words = [line.split() for line in text.splitlines()]
    limits = {
        w[1]: int(w[2]) for w in words if len(w) > 2 and w[0] in ("step", "pytests", "measure") and w[2].isdigit()
    }
    assert sum(limits.values()) < 9 * 60
    default = text.partition("STEPS=${STEPS:-")[2].partition("}")[0].replace("\\", "").split()
    assert set(limits) - {"machine"} == set(default)


def test_a_step_that_hangs_is_ended(tmp_path: Path) -> None:
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nsleep 60\n")
    hanging.chmod(0o755)
    script = (ROOT / "benchmarks" / "gpu_first_run.sh").read_text().replace("measure swap 30", "measure swap 1")
    copy = ROOT / "benchmarks" / "gpu_first_run.sh"
    short = tmp_path / "benchmarks" / copy.name
    short.parent.mkdir()
    short.write_text(script)
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": str(hanging), "STEPS": "swap"}
    subprocess.run(["bash", short], env=environment, check=True, capture_output=True)
    (step,) = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert step["step"] == "swap" and step["status"] == 124
