"""What a command has cost (appendix J): wall time, peak memory, GPU-hours and money."""

import os
import resource
import time
from types import TracebackType
from typing import Any

import torch


class Cost:
    """Measures what lies between entering and leaving it; without a GPU the machine's own hours are paid.

    Args:
        price: of one GPU, or of this machine without one, per hour; 0: money is not told.
    """

    def __init__(self, price: float = 0.0) -> None:
        self.price, self.seconds = price, 0.0

    def __enter__(self) -> "Cost":
        self._begin = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.seconds = time.perf_counter() - self._begin

    def facts(self) -> dict[str, Any]:
        """Wall time in s, peak memory in MB of the process since its start and of the GPU, hours, money."""
        gpus = int(os.environ.get("WORLD_SIZE", 1)) if torch.cuda.is_available() else 0
        hours = self.seconds / 3600 * max(gpus, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        facts: dict[str, Any] = {"wall seconds": round(self.seconds, 1), "peak MB": round(peak / 1e6)}
        if gpus:
            facts["peak GPU MB"] = round(torch.cuda.max_memory_allocated() / 1e6)
        facts["GPU-hours" if gpus else "hours without a GPU"] = round(hours, 4)
        return facts | ({"money": round(hours * self.price, 2)} if self.price else {})
