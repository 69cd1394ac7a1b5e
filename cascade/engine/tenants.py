"""Who shares an engine: tenants, their weights and their limits."""

from dataclasses import dataclass
from typing import Literal, get_args

Priority = Literal["interactive", "batch"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)


@dataclass(frozen=True)
class Tenant:
    """A customer of the engine, with a share of its passes and bounds of its own; None is no bound.

    Attributes:
        name: of the customer; equal names share their limits.
        weight: its share of the passes while others wait, in proportion to theirs.
        priority: of its images, unless a request names another one.
        rate: images a second, of which one second's worth may come at once.
        concurrency: requests in progress.
        queued: images that wait or are decoded.
        keyed: it has a key; else it is a bundle, and is counted as one.
    """

    name: str
    weight: float = 1.0
    priority: Priority = "interactive"
    rate: float | None = None
    concurrency: int | None = None
    queued: int | None = None
    keyed: bool = True
