"""Spans of a pass, in the trace of each request that has images in it: ``queue``, ``pass``, and ``swap`` inside it."""

from collections.abc import Sequence

from cascade import tracing
from cascade.bundle.store import Identity
from cascade.engine.fair_queue import Waiting
from cascade.tracing import Part, Trace


def record_queue(batch: Sequence[Waiting], begun: float) -> None:
    """Record how long images waited for a pass. ``begun``: when it began, monotonic seconds."""
    for waiting in batch:
        if waiting.trace is not None:
            tracing.record(Part("queue", waiting.added, begun), waiting.trace)


def record_pass(
    images: Sequence[tuple[Trace | None, Identity]], begun: float, ended: float, parts: Sequence[Part]
) -> None:
    """Record a pass that is over.

    Args:
        images: the trace of each image, and its bundle and version.
        begun, ended: monotonic seconds. parts: of the pass.
    """
    traces: dict[int, tuple[Trace, list[Identity]]] = {}
    for trace, identity in images:
        if trace is not None:
            traces.setdefault(id(trace), (trace, []))[1].append(identity)
    for trace, own in traces.values():
        bundles, versions = zip(*sorted(set(own)), strict=True)
        attributes = {
            "bundle": ",".join(bundles),
            "version": ",".join(versions),
            "images": len(own),
            "batch_images": len(images),
            "cold_load": trace.cold,
        }
        whole = tracing.record(Part("pass", begun, ended, attributes), trace)
        for part in parts:
            tracing.record(part, trace, whole)
