"""Quotas of cgroups of both versions, and the environment's word."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cascade import cpus


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cpus, "CGROUPS", tmp_path)
    monkeypatch.setattr(cpus, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(("own", "above", "count"), [("max", "max", 64), ("150000", "max", 2), ("max", "400000", 4)])
def test_version_2(cgroup: Path, own: str, above: str, count: int) -> None:
    write(cgroup / "membership", "0::/pods/one\n")
    write(cgroup / "pods" / "cpu.max", f"{above} 100000\n")
    write(cgroup / "pods" / "one" / "cpu.max", f"{own} 100000\n")
    assert cpus.cpu_count() == count


@pytest.mark.parametrize("inside", ["", "docker/abc"])
def test_version_1_in_a_container_or_outside(cgroup: Path, inside: str) -> None:
    """A container sees its own cgroup at the root, under a path of the host."""
    write(cgroup / "membership", "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n")
    write(cgroup / "cpu" / inside / "cpu.cfs_quota_us", "50000\n")
    write(cgroup / "cpu" / inside / "cpu.cfs_period_us", "100000\n")
    assert cpus.cgroup_quota() == 0.5 and cpus.cpu_count() == 1


def test_no_quota(cgroup: Path) -> None:
    assert cpus.cgroup_quota() == math.inf and cpus.cpu_count() == 64
    write(cgroup / "membership", "4:cpu:/\n")
    write(cgroup / "cpu" / "cpu.cfs_quota_us", "-1\n")
    write(cgroup / "cpu" / "cpu.cfs_period_us", "100000\n")
    assert cpus.cpu_count() == 64


@pytest.mark.parametrize(("value", "count"), [("3", 3), ("4,2", 4), ("0", 64), ("many", 64), ("", 64)])
def test_omp_num_threads(cgroup: Path, monkeypatch: pytest.MonkeyPatch, value: str, count: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert (cpus.cpu_count(), cpus.usable()) == (count, 64)


@pytest.mark.slow
def test_the_library_keeps_to_it() -> None:
    """PyTorch and numba count the CPUs of the machine; here a quota of one stands in for a container's."""
    program = """
from cascade import cpus
cpus.cgroup_quota = lambda: 1.0
import torch
torch.set_num_threads(4)
from cascade import Engine
Engine()
from cascade.kernels import cpu
import numba
print(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
torch.set_num_threads(1)
cpus.cgroup_quota = lambda: 8.0
Engine()
print(torch.get_num_threads(), "stays lower")
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout == "1 1\n1 stays lower\n"
