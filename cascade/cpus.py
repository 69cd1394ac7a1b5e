"""How many CPUs this process may use: a container often has fewer than the machine."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cpu_count() -> int:
    """Threads to use: ``OMP_NUM_THREADS`` if it is set, else one per usable CPU."""
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    if threads.isdecimal() and int(threads) > 0:
        return int(threads)
    return usable()


def usable() -> int:
    """CPUs allowed by the affinity mask and the cgroup's quota; at least 1."""
    return max(1, math.ceil(min(len(os.sched_getaffinity(0)), cgroup_quota())))


def limit_threads() -> None:
    """Lower PyTorch's threads to ``cpu_count``: it respects the affinity mask, but not a container's quota."""
    import torch

    if torch.get_num_threads() > (count := cpu_count()):
        torch.set_num_threads(count)


def cgroup_quota() -> float:
    """CPUs that the cgroup (version 1 or 2) and its ancestors may use; infinity without a quota."""
    try:
        memberships = [line.split(":", 2) for line in MEMBERSHIP.read_text().splitlines()]
    except OSError:
        return math.inf
    quotas = [math.inf]
    for _, controllers, path in memberships:
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS if not controllers else CGROUPS / "cpu"
        leaf = root / path.lstrip("/")
        # In a container the path may be the host's, while the cgroup itself is mounted at the root.
        for folder in {root, leaf, *leaf.parents}:
            if folder.is_relative_to(root):
                quotas.append(_version_2(folder) if not controllers else _version_1(folder))
    return min(quotas)


def _version_2(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return math.inf
    return math.inf if quota == "max" else int(quota) / int(period)


def _version_1(folder: Path) -> float:
    try:
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    except (OSError, ValueError):
        return math.inf
    return quota / period if quota > 0 else math.inf
