"""A fair queue of waiting images: tenants share the passes, and images are grouped by mask.

Fairness is that of S-LoRA's scheduler (virtual token counters), with image passes as tokens. Each tenant has a counter
of passes received, divided by its weight. Tenants less than ``TURN`` ahead of the least served one are eligible; among
them, images are grouped by mask as if there were a single tenant, and materialized masks come first. So counters of
waiting tenants differ by little more than ``TURN``, and a swapped-in mask serves several images. A tenant whose queue
was empty starts with the counter of the least served one, since idle time earns no credit. It is next unless it was
ahead: a tenant that sends little waits for one pass. Passes are short only while there is such a tenant.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from cascade.engine.engine import Engine
from cascade.engine.items import AnyItem, Item, OpenItem, group_key, passes, trunk
from cascade.engine.results import ItemError, Prediction
from cascade.engine.tenants import Tenant
from cascade.tracing import Trace

Answer = Prediction | ItemError
TURN = 4.0
"""Image passes that a tenant of weight 1 may be ahead of the others, so that a swap (7 ms where a pass of one image
takes 40) costs 4 %. While all of 20 tenants wait, each has its turn within 80 passes, 3 s."""
CALM = 100.0
"""Image passes without a newcomer after which a pass takes a whole turn: it makes only those wait who wait anyway."""


class Promise(Future[Answer]):
    """The answer of one image. It records a cancellation even during a pass, which saves the second pass.

    Attributes:
        given_up: whether it was cancelled.
        first: the answer of the first pass, while the image waits for the second one.
    """

    given_up = False
    first: Prediction | None = None

    def cancel(self) -> bool:
        self.given_up = True
        return super().cancel()


@dataclass(frozen=True, eq=False)
class Waiting:
    """An image in the queue; times in seconds of the monotonic clock.

    Attributes:
        since: when it arrived. queued: when it began to wait for its second pass; None for the first one.
        added: when it was added to the queue, decoded. trace: of its request; None if traces are off.
    """

    item: AnyItem
    tenant: Tenant
    future: Promise
    since: float
    deadline: float
    queued: float | None = None
    added: float = field(default_factory=time.monotonic)
    trace: Trace | None = None

    @property
    def waits_from(self) -> float:
        """When it began to wait for its next pass."""
        return self.since if self.queued is None else self.queued


@dataclass(frozen=True)
class Room:
    """Capacity of a pass: images, and image passes (``cost``), which a single image may exceed."""

    images: int
    cost: float


Group = deque[Waiting]


@dataclass(eq=False)
class _Flow:
    """The images of one tenant, by (trunk, bundle), none empty, each in order of arrival.

    Attributes:
        served: image passes so far, divided by the weight.
        fresh: nothing has been served since the flow was last empty, and it was not ahead then.
    """

    tenant: Tenant
    served: float
    fresh: bool = True
    groups: dict[Hashable, Group] = field(default_factory=dict)


_Choice = tuple[_Flow, Hashable]


class FairQueue:
    """Waiting images of all tenants; not thread-safe."""

    def __init__(self) -> None:
        self._flows: dict[str, _Flow] = {}
        self._clock = 0.0  # the counter of the least served waiting tenant
        self._turn: tuple[Hashable, float] = (None, 0.0)  # the group that was split, and its passes since the swap
        self.calm = 0.0  # image passes since a tenant came that had received little
        self.images = 0
        self.cost = 0.0

    def add(self, waiting: Waiting) -> None:
        """Append an image to its tenant's group."""
        flow = self._flows.get(waiting.tenant.name)
        if flow is None:
            flow = self._flows[waiting.tenant.name] = _Flow(waiting.tenant, self._clock)
            self.calm = 0.0
        elif not flow.groups:
            flow.fresh = flow.served <= self._clock
            flow.served = max(flow.served, self._clock)
        flow.tenant = waiting.tenant  # its weight may have changed
        flow.groups.setdefault(group_key(waiting.item), Group()).append(waiting)
        self.images += 1
        self.cost += passes(waiting.item)

    def take(self, room: Room, engine: Engine, overdue: float) -> list[Waiting]:
        """Take the images of the next pass out of the queue; the images of the first mask come first.

        Args:
            engine: its materialized masks are preferred.
            overdue: if an image arrived before this time, the group of the oldest one comes first, whatever its size.
        """
        active = [flow for flow in self._flows.values() if flow.groups]
        if not active:
            return []
        self._clock = min(flow.served for flow in active)
        self._flows = {n: f for n, f in self._flows.items() if f.groups or f.served > self._clock - TURN}
        allowed = [flow for flow in active if flow.served < self._clock + TURN]
        if self.calm >= CALM:  # one pass for the turn
            room = Room(room.images, max(room.cost, TURN))
        flow, key = self._first(active, allowed, room, engine, overdue)
        taken = self._pull(flow, key, room)
        before = self._turn[1] if self._turn[0] == key else 0.0
        self._turn = (key if key in flow.groups else None, before + _cost(taken))
        taken += self._company(allowed, taken, room, engine)
        self.calm += _cost(taken)
        return taken

    def charge(self, tenant: Tenant, cost: float) -> None:
        """Charge a tenant for passes that were not known when its images were taken."""
        flow = self._flows.get(tenant.name)
        if flow is not None:
            flow.served += cost / flow.tenant.weight

    def remove(self, which: Callable[[Waiting], bool]) -> list[Waiting]:
        """Remove the matching images from the queue and return them."""
        removed: list[Waiting] = []
        for flow in self._flows.values():
            for key in [*flow.groups]:
                remaining = Group()
                for waiting in flow.groups.pop(key):
                    (removed if which(waiting) else remaining).append(waiting)
                if remaining:
                    flow.groups[key] = remaining
        self._count(removed)
        return removed

    def _first(self, active: list[_Flow], allowed: list[_Flow], room: Room, engine: Engine, overdue: float) -> _Choice:
        """Choose the tenant and group that come first."""
        fresh = [flow for flow in allowed if flow.fresh]
        cut, had = self._turn
        turn = [flow for flow in active if cut in flow.groups]
        if turn and not fresh and had < TURN:  # its mask is in place
            return min(turn, key=lambda flow: flow.served), cut
        late = [choice for choice in map(_oldest, fresh or allowed) if _group(choice)[0].since <= overdue]
        if late:
            return min(late, key=lambda choice: (not _ready(_group(choice), engine), _group(choice)[0].since))
        choices = [(flow, key) for flow in fresh or allowed for key in flow.groups]
        return max(choices, key=lambda choice: _worth(_group(choice), room, engine))

    def _company(self, allowed: list[_Flow], first: list[Waiting], room: Room, engine: Engine) -> list[Waiting]:
        """Fill the pass: images under the same mask, then groups that share its plain trunk.

        Groups that share the trunk are never split, since a group in two passes is swapped in twice.
        """
        taken: list[Waiting] = []
        left = _less(room, first)
        key, head = group_key(first[0].item), first[0].item
        for flow in sorted(allowed, key=lambda flow: flow.served):
            if key in flow.groups and left.images > 0 and passes(flow.groups[key][0].item) <= left.cost:
                taken += self._pull(flow, key, left)
                left = _less(room, first + taken)
        if isinstance(head, Item) and head.bundle.dispatcher.start > 0:
            shared = [(flow, k) for flow in allowed for k in flow.groups if k != key and _trunk(flow, k) == trunk(head)]
            for flow, k in sorted(shared, key=lambda c: _worth(_group(c), room, engine), reverse=True):
                group = flow.groups[k]
                if len(group) <= left.images and _cost(group) <= left.cost:
                    taken += self._pull(flow, k, left)
                    left = _less(room, first + taken)
        return taken

    def _pull(self, flow: _Flow, key: Hashable, room: Room) -> list[Waiting]:
        """Take the first images of a group, at least one, out of the queue and charge them to their tenant."""
        group = flow.groups.pop(key)
        taken = [group.popleft()]
        cost = passes(taken[0].item)
        while group and len(taken) < room.images and cost + passes(group[0].item) <= room.cost:
            taken.append(group.popleft())
            cost += passes(taken[-1].item)
        if group:
            flow.groups[key] = group
        flow.served += cost / flow.tenant.weight
        flow.fresh = False
        self._count(taken)
        return taken

    def _count(self, gone: list[Waiting]) -> None:
        self.images -= len(gone)
        self.cost -= _cost(gone)


def _group(choice: _Choice) -> Group:
    flow, key = choice
    return flow.groups[key]


def _trunk(flow: _Flow, key: Hashable) -> Hashable:
    return trunk(flow.groups[key][0].item)


def _cost(images: Iterable[Waiting]) -> float:
    return sum(passes(waiting.item) for waiting in images)


def _less(room: Room, taken: list[Waiting]) -> Room:
    return Room(room.images - len(taken), room.cost - _cost(taken))


def _oldest(flow: _Flow) -> _Choice:
    """The group of the tenant's oldest image."""
    return flow, min(flow.groups, key=lambda key: flow.groups[key][0].since)


def _ready(group: Group, engine: Engine) -> bool:
    """Whether the group needs no mask or a materialized one."""
    item = group[0].item
    return isinstance(item, OpenItem) or item.bundle.dispatcher in engine.weight_cache


def _worth(group: Group, room: Room, engine: Engine) -> tuple[int, bool, float]:
    """Large groups first, then those that are ready, then the oldest."""
    return min(len(group), room.images), _ready(group, engine), -group[0].since
