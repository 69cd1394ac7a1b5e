"""The cost of training (appendix J): wall time, peak memory, GPU-hours, and money for a given price.

with Cost(price=2.0) as cost:
    ...
print(cost.line())
"""

import os
import resource
import sys
import time
from typing import Any

import torch


class Cost:
    """Measures this process between entering and leaving the context; earlier runs are not included.

    Args:
        price: per hour, of one GPU, or of this machine if it has none; 0 to leave money out.
    """

    def __init__(self, price: float = 0.0) -> None:
        self.price, self.seconds = price, 0.0

    def __enter__(self) -> "Cost":
        self._begin = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begin

    def facts(self) -> dict[str, Any]:
        """Wall time in s; peak memory in MB of this process since its start, and of its GPU; hours; money.

        Hours are summed over all GPUs for which ``torchrun`` has started processes.
        """
        gpus = int(os.environ.get("WORLD_SIZE", 1)) if torch.cuda.is_available() else 0
        hours = self.seconds / 3600 * max(gpus, 1)
        facts: dict[str, Any] = {"wall seconds": round(self.seconds, 1), "peak MB": round(peak_bytes() / 1e6)}
        if gpus:
            facts["peak GPU MB"] = round(torch.cuda.max_memory_allocated() / 1e6)
        facts["GPU-hours" if gpus else "hours without a GPU"] = round(hours, 4)
        return facts | ({"money": round(hours * self.price, 2)} if self.price else {})

    def line(self) -> str:
        """The facts as one line of text."""
        return "cost: " + ", ".join(f"{name} {value}" for name, value in self.facts().items())


def peak_bytes() -> int:
    """Peak memory of this process in bytes; Linux reports kB, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
