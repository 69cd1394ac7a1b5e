"""Spans of a batch: a request's own in the trace of its caller, and in each of these traces those of the pass."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from cascade import tracing
from cascade.engine import pass_spans
from cascade.engine.decoders import Decoders
from cascade.engine.engine import Engine
from cascade.engine.results import ItemError, Options, Prediction
from cascade.tracing import Trace


@contextmanager
def opened(headers: Sequence[Mapping[str, str]]) -> Iterator[list[tuple[Any, Trace | None]]]:
    """Open the span of each request; yields it and what belongs to it. Both are None if traces are off."""
    with ExitStack() as stack:
        requests = []
        for own in headers:
            named = {name.lower().encode(): value.encode() for name, value in own.items()}
            requests.append((stack.enter_context(tracing.request("POST", named)), tracing.begin(cold=False)))
        yield requests


def predict(
    engine: Engine, decoders: Decoders, images: list[bytes], wishes: list[Options], traces: list[Trace | None]
) -> list[Prediction | ItemError]:
    """``Engine.predict`` with the spans ``decode``, ``pass`` and ``swap``."""
    begun, prepared = 0.0, []

    def decode(prepare: Callable[[Any, Options], Any], images: Sequence[Any], options: Sequence[Options]) -> Any:
        nonlocal begun, prepared

        def decode_one(image: tuple[bytes, Trace | None], wish: Options) -> Any:
            with tracing.span("decode", image[1]):
                return prepare(image[0], wish)

        prepared = decoders.map(decode_one, [*zip(images, traces, strict=True)], options)
        begun = time.monotonic()
        return prepared

    with tracing.parts() as parts:
        answers = engine.predict(images, wishes, decode)
    passed = [
        (trace, (answer.bundle, answer.version) if isinstance(answer, Prediction) else ("", ""))
        for trace, item, answer in zip(traces, prepared, answers, strict=False)
        if not isinstance(item, ItemError)
    ]
    pass_spans.record_pass(passed, begun, time.monotonic(), parts)
    return answers
