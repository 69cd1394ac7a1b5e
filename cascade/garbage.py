"""Garbage collection in a process that serves for a long time."""

import atexit
import gc


def exempt_loaded() -> None:
    """Exempt all objects that exist now from garbage collection. Call it once a server has loaded its store.

    A full collection visits every object while all threads wait: 0.4 s for the 640,000 of PyTorch and other libraries,
    once in about 4,000 requests. Exempt objects are still freed when their last reference goes.
    """
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or else extension modules report leaks when the process ends
