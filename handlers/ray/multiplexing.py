"""Tells Serve's proxies which bundles are in a replica's memory, so that requests go where their bundle is.

Bundles are loaded and evicted by ``cascade.engine.on_demand``, as in the other front ends. Serve's ``multiplexed``,
which was made for loading models, only carries the names.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ray import serve

from cascade.engine.on_demand import OnDemandRegistry
from handlers.ray.middleware import App, Receive, Send, bundle_of


def telling(app: App, registry: OnDemandRegistry) -> App:
    """The application, which also tells Serve the names of the bundles that answered, once memory is full.

    Until then every replica may hold every bundle, and requests are spread evenly. Serve keeps as many names as fit, by
    LRU, so its list is that of the registry.
    """
    tell: Callable[[str], Awaitable[str]] | None = None

    async def serve_one(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        nonlocal tell
        await app(scope, receive, send)
        named = bundle_of(scope, scope["headers"]) if scope["type"] == "http" else None
        if not registry.crowded or named is None or named.decode(errors="replace") not in registry.engine.names:
            return
        if tell is None:
            tell = serve.multiplexed(_name, max_num_models_per_replica=len(registry.engine.names))
        await tell(named.decode())

    return serve_one


async def _name(bundle: str) -> str:
    return bundle
