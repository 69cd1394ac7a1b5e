"""Admission: how many images may wait, of all tenants together and of each.

A tenant may hold as many places of the queue as are still free (the dynamic thresholds of Choudhury and Hahne). One
tenant thus fills half of the queue, two a third each, and a newcomer always finds room. What is over a tenant's own
share or limits is refused as its own excess; only a queue without room is an overload of the server.
"""

from dataclasses import dataclass, replace

from cascade.engine.results import ItemError
from cascade.engine.tenants import Tenant

OVERLOADED = ItemError("overloaded", "more images wait than can be answered soon: send it again later")
OVER_RATE = ItemError("over_rate", "more images a second than this tenant may send: send them more slowly")
OVER_CONCURRENCY = ItemError("over_concurrency", "more requests at a time than this tenant may send: wait for answers")
OVER_QUEUE = ItemError("over_queue", "this tenant's share of the queue is full: wait for answers")
SWEEP = 64
"""Tenants that are remembered before the first sweep of those that are idle."""


@dataclass
class _Use:
    """What one tenant uses. ``tokens``: images that it may send at once, as of ``since`` (monotonic)."""

    tokens: float
    since: float
    queued: int = 0
    requests: int = 0
    idle_from: float = 0.0  # when the tokens are all there again


class Admission:
    """Counts places in the queue; not thread-safe. Times are seconds of one monotonic clock.

    Args:
        queue: images that may wait or be decoded at a time.
    """

    def __init__(self, queue: int) -> None:
        self.queue = queue
        self.images = 0
        self._uses: dict[str, _Use] = {}
        self._sweep_at = SWEEP

    def enter(self, tenant: Tenant, images: int, now: float, alone: bool = False) -> ItemError | None:
        """Give a request of ``images`` its places, or say why not.

        Args:
            alone: no other tenant can come, so the whole queue is this one's.
        """
        use = self._use(tenant, now)
        free = self.queue - self.images
        if images > free:
            return OVERLOADED
        if not alone and use.queued + images > free:
            return OVER_QUEUE
        if tenant.queued is not None and use.queued + images > tenant.queued:
            return OVER_QUEUE
        if tenant.concurrency is not None and use.requests >= tenant.concurrency:
            return OVER_CONCURRENCY
        if tenant.rate is not None and (wait := self._spend(use, tenant.rate, images, now)) > 0:
            return replace(OVER_RATE, retry_after=wait)
        use.queued += images
        use.requests += 1
        self.images += images
        return None

    def reenter(self, tenant: Tenant) -> None:
        """One image of the tenant has its place again, for a second pass: it was admitted before."""
        self._uses[tenant.name].queued += 1
        self.images += 1

    def leave(self, tenant: Tenant) -> None:
        """One image of the tenant has left the queue."""
        self._uses[tenant.name].queued -= 1
        self.images -= 1

    def finish(self, tenant: Tenant) -> None:
        """One request of the tenant has its answers."""
        self._uses[tenant.name].requests -= 1

    def _spend(self, use: _Use, rate: float, images: int, now: float) -> float:
        """Seconds until there are tokens for the images; 0 if there are, which are then gone.

        A request of more images than the bucket holds needs a full one, and leaves a debt.
        """
        burst = max(1.0, rate)
        use.tokens = min(burst, use.tokens + (now - use.since) * rate)
        use.since = now
        needed = min(float(images), burst)
        if use.tokens < needed:
            return (needed - use.tokens) / rate
        use.tokens -= images
        use.idle_from = now + (burst - use.tokens) / rate
        return 0.0

    def _use(self, tenant: Tenant, now: float) -> _Use:
        if tenant.name not in self._uses:
            if len(self._uses) >= self._sweep_at:
                self._uses = {n: u for n, u in self._uses.items() if u.queued or u.requests or u.idle_from > now}
                self._sweep_at = max(SWEEP, 2 * len(self._uses))
            self._uses[tenant.name] = _Use(max(1.0, tenant.rate or 0.0), now)
        return self._uses[tenant.name]
