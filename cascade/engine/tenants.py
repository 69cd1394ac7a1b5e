"""Tenants that share an engine, with their weights and limits."""

from dataclasses import dataclass
from typing import Literal, get_args

Priority = Literal["interactive", "batch"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)


@dataclass(frozen=True)
class Tenant:
    """A customer of the engine, with its share of the passes and its limits; None means no limit.

    Attributes:
        name: of the customer; equal names share their limits.
        weight: its share of the passes while others wait, in proportion to theirs.
        priority: of its images, unless a request names another one.
        rate: images per second, with a burst of one second's worth.
        concurrency: requests in progress.
        queued: images waiting or being decoded.
        keyed: it has a key; otherwise it is a bundle, and is counted as one.
    """

    name: str
    weight: float = 1.0
    priority: Priority = "interactive"
    rate: float | None = None
    concurrency: int | None = None
    queued: int | None = None
    keyed: bool = True
