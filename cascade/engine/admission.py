"""Admission control: how many images may wait, in total and per tenant.

A tenant may hold as many places in the queue as are still free (the dynamic thresholds of Choudhury and Hahne). So one
tenant fills at most half of the queue, two fill a third each, and a newcomer always finds room. Images above a tenant's
share or limits are refused as that tenant's excess; only a full queue counts as an overload of the server.
"""

from dataclasses import dataclass, replace

from cascade.engine.results import ItemError
from cascade.engine.tenants import Tenant

OVERLOADED = ItemError("overloaded", "too many images are waiting: send it again later")
OVER_RATE = ItemError("over_rate", "more images per second than this tenant may send: send them more slowly")
OVER_CONCURRENCY = ItemError("over_concurrency", "more requests at once than this tenant may send: wait for answers")
OVER_QUEUE = ItemError("over_queue", "this tenant's share of the queue is full: wait for answers")
SWEEP = 64
"""Tenants remembered before idle ones are swept for the first time."""


@dataclass
class _Use:
    """Usage of one tenant. ``tokens``: images that it may send at once, as of ``since`` (monotonic)."""

    tokens: float
    since: float
    queued: int = 0
    requests: int = 0
    idle_from: float = 0.0  # when the token bucket is full again


class Admission:
    """Counts places in the queue; not thread-safe. Times are seconds of one monotonic clock.

    Args:
        queue: images that may wait or be decoded at the same time.
    """

    def __init__(self, queue: int) -> None:
        self.queue = queue
        self.images = 0
        self._uses: dict[str, _Use] = {}
        self._sweep_at = SWEEP

    def enter(self, tenant: Tenant, images: int, now: float, alone: bool = False) -> ItemError | None:
        """Reserve places for a request of ``images``, or return the reason for a refusal.

        Args:
            alone: no other tenant exists, so this one may use the whole queue.
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
        """Return an admitted image of the tenant to the queue, for its second pass."""
        self._uses[tenant.name].queued += 1
        self.images += 1

    def leave(self, tenant: Tenant) -> None:
        """Count an image of the tenant that has left the queue."""
        self._uses[tenant.name].queued -= 1
        self.images -= 1

    def finish(self, tenant: Tenant) -> None:
        """Count a request of the tenant that has been answered."""
        self._uses[tenant.name].requests -= 1

    def _spend(self, use: _Use, rate: float, images: int, now: float) -> float:
        """Take tokens for the images and return 0; if there are too few, return the seconds until there are enough.

        A request of more images than the bucket holds needs a full bucket, and leaves a debt.
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
