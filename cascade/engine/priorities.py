"""Two levels of priority, each a fair queue: batch work uses the passes that interactive work leaves."""

from collections.abc import Callable

from cascade.engine.engine import Engine
from cascade.engine.fair_queue import FairQueue, Room, Waiting
from cascade.engine.tenants import PRIORITIES, Priority

SHARE = 10
"""One in this many passes goes to batch work even if interactive work is waiting, so that it never starves."""


class PriorityQueue:
    """Waiting images by priority and tenant; not thread-safe."""

    def __init__(self) -> None:
        self._levels: dict[Priority, FairQueue] = {priority: FairQueue() for priority in PRIORITIES}
        self._passed_over = 0  # passes since the last one for batch work, while some is waiting

    @property
    def images(self) -> int:
        return sum(level.images for level in self._levels.values())

    @property
    def cost(self) -> float:
        """Image passes of the waiting images."""
        return sum(level.cost for level in self._levels.values())

    def add(self, waiting: Waiting) -> None:
        """Add an image to its request's level, or else its tenant's."""
        self._level(waiting).add(waiting)

    def take(self, room: Room, engine: Engine, overdue: float) -> list[Waiting]:
        """Take the images of the next pass; arguments as in ``FairQueue.take``."""
        return self._next().take(room, engine, overdue)

    def charge(self, waiting: Waiting, cost: float) -> None:
        """Charge the image's tenant for passes that were not known when the image was taken."""
        self._level(waiting).charge(waiting.tenant, cost)

    def remove(self, which: Callable[[Waiting], bool]) -> list[Waiting]:
        """Remove the matching images from all levels and return them."""
        return [waiting for level in self._levels.values() for waiting in level.remove(which)]

    def _level(self, waiting: Waiting) -> FairQueue:
        return self._levels[waiting.item.options.priority or waiting.tenant.priority]

    def _next(self) -> FairQueue:
        interactive, batch = self._levels["interactive"], self._levels["batch"]
        if batch.images and (not interactive.images or self._passed_over >= SHARE - 1):
            self._passed_over = 0
            return batch
        self._passed_over = self._passed_over + 1 if batch.images else 0
        if interactive.images:
            batch.calm = 0.0  # its passes stay short, since interactive work waits for their end
        return interactive
