"""The handler that TorchServe's worker runs: requests in, one engine call per batch, JSON out.

TorchServe 0.12 fails the whole batch when a handler raises, so a bad request gets its own status and error body.
TorchServe also requires that this module defines exactly one class.
"""

import atexit
import fcntl
import logging
import math
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch

from cascade import metrics, tracing
from cascade.engine.decoders import Decoders
from cascade.engine.engine import Engine
from cascade.engine.results import ItemError, Options, Prediction
from cascade.engine.stores import load_store
from cascade.errors import CascadeError
from cascade.garbage import exempt_loaded
from cascade.logs import log_to_stderr
from cascade.malloc_trim import Heap
from cascade.tracing import Trace
from handlers import requests, spans
from handlers.statuses import status_of
from handlers.torchserve import failures
from handlers.torchserve import spans as batch_spans

log = logging.getLogger("cascade.torchserve")
PATH = "/predictions/cascade"
REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
STOPPING = ItemError("stopping", "the server is stopping: send the request again, to another replica")


class CascadeHandler:
    """An engine with every bundle of the model store, over one resident backbone."""

    def initialize(self, context: Any) -> None:
        """Load the model store from the `cascade` section of model-config.yaml, and follow its changes.

        A bundle that cannot be used is left out, and the reason logged. If none is left, the reason is sent to the
        entrypoint, and CascadeError is raised.
        """
        settings = context.model_yaml_config["cascade"]
        try:
            self._load(settings)
        except CascadeError as error:
            failures.report(settings["failures"], str(error))
            raise

    def _load(self, settings: dict[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        self.gate = Path(settings["gate"])
        memory = settings["memory_bytes"]
        self.engine = Engine(settings["budget_bytes"], settings["device"], memory_bytes=memory)
        on_demand = settings["on_demand"]
        registry = load_store(self.engine, settings["model_store"], settings["pins"], on_demand=on_demand)
        log_to_stderr(settings["log_level"])  # Java logs each line of stderr as a warning, which log4j2.xml passes on
        if tracing.start():
            log.info("traces go to the OTLP endpoint of the environment")
        if metrics.TROUBLE:
            log.error(metrics.TROUBLE)
        if registry.trouble:
            log.error("%s; copies on this machine are served", registry.trouble)
        for state in registry.states():
            if state.reason:
                log.error("refused bundle %s/%s: %s", state.name, state.version, state.reason)
        resources = ExitStack()
        # TorchServe sends the next batch after this one is answered, so decoding can use all cores.
        self.decoders = Decoders(settings["threads"], self.engine.limits.max_seconds)
        resources.callback(self.decoders.close)
        bounds = settings["keep_images"], settings["keep_bytes"]
        resources.enter_context(self.engine.keeping_unknown(settings["keep_unknown"], *bounds))
        resources.enter_context(registry.watching(settings["poll"]))
        atexit.register(resources.close)
        self.memory = Heap()
        exempt_loaded()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str | bytes]:
        """Answer each request of a batch, in order, and set its status; a bad request never raises."""
        headers = [context.get_all_request_header(i) for i in range(len(data))]
        with batch_spans.opened([_plain(own) for own in headers]) as traced:
            bodies = self._handle(data, headers, traced, context)
        self.memory.give_back()
        return bodies

    def _handle(
        self,
        data: list[dict[str, Any]],
        headers: list[Any],
        traced: list[tuple[Any, Trace | None]],
        context: Any,
    ) -> list[str | bytes]:
        """``handle`` inside the spans of the requests."""
        begin = time.perf_counter()
        try:
            gate = self.gate.open()
        except FileNotFoundError:  # removed by the entrypoint, which is draining: refuse new work
            answers: list[Any] = [STOPPING] * len(data)
            tracing.stop()  # this process will be killed
        else:
            with gate:
                fcntl.flock(gate, fcntl.LOCK_SH)
                parsed = [_parse(*request) for request in zip(data, headers, strict=True)]
                answers = self.predict(parsed, [trace for _, trace in traced])
        bodies: list[str | bytes] = []
        for i, answer in enumerate(answers):
            try:
                body, kind, named = requests.encode(answer, requests.wants_bytes(_plain(headers[i])))
            except ValueError:
                answer = requests.NOT_FINITE
                body, kind, named = requests.encode(answer, False)
            bodies.append(body)
            context.set_response_content_type(i, kind)
            for name, value in named.items():
                context.set_response_header(i, name, value)
            if isinstance(answer, ItemError):
                status = status_of(answer)
                context.set_response_status(status, HTTPStatus(status).phrase, i)
                if answer.retry_after:
                    context.set_response_header(i, "Retry-After", str(math.ceil(answer.retry_after)))
            seconds = time.perf_counter() - begin
            fields = _log(context.get_request_id(i), headers[i], answer, batch=len(data), seconds=seconds)
            if traced[i][0] is not None:
                spans.describe(traced[i][0], PATH, fields | {"method": "POST", "path": PATH})
        return bodies

    def predict(
        self, requests: list[tuple[bytes, Options] | ItemError], traces: Sequence[Trace | None]
    ) -> list[Prediction | ItemError]:
        """Predict the valid requests in one engine call; the errors of the others keep their places."""
        readable = [(r, t) for r, t in zip(requests, traces, strict=True) if not isinstance(r, ItemError)]
        images, wishes = [image for (image, _), _ in readable], [wish for (_, wish), _ in readable]
        own = [trace for _, trace in readable]
        answers = iter(batch_spans.predict(self.engine, self.decoders, images, wishes, own) if readable else ())
        return [request if isinstance(request, ItemError) else next(answers) for request in requests]


def _parse(item: Mapping[str, Any], headers: Mapping[str, Any]) -> tuple[bytes, Options] | ItemError:
    """``requests.parse`` for TorchServe's form of a request.

    Args:
        item: one value (the raw body, or the only part of a form), or none.
        headers: as sent, names in the client's case; and under the name of a form's part, a dict with its content-type.
    """
    if len(item) > 1:
        return ItemError("bad_request", f"send one image per request, not {len(item)} form parts")
    name, body = next(iter(item.items()), ("body", b""))
    part = headers.get(name)  # a plain string where the part has the name of a header
    if isinstance(part, Mapping) and name.lower().startswith(requests.PREFIX):  # it has hidden a header of this name
        return ItemError("bad_option", f"give the form's part another name than {name}")
    content_type = part.get("content-type", "") if isinstance(part, Mapping) else ""
    body = body.encode() if isinstance(body, str) else bytes(body)
    return requests.parse(body, content_type, _plain(headers))


def _plain(headers: Mapping[str, Any]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if isinstance(value, str)}


def _log(
    request_id: str | None, headers: Mapping[str, Any], answer: Prediction | ItemError, **batch: float
) -> dict[str, Any]:
    """Log one line per request, and return its fields. Its level is info, or error if the fault is ours.

    TorchServe answers with the same id.
    """
    fields: dict[str, Any] = {"request_id": request_id}
    theirs = next((str(value) for name, value in headers.items() if name.lower() == "x-request-id"), "")
    if REQUEST_ID.fullmatch(theirs):
        fields["client_request_id"] = theirs
    if isinstance(answer, ItemError):
        fields |= {"status": status_of(answer), "error": answer.kind}
    else:
        fields |= {"status": 200, "bundle": answer.bundle, "version": answer.version, "cluster": answer.cluster}
    fields |= {"batch": batch["batch"], "ms": round(1000 * batch["seconds"], 1)}
    log.log(logging.ERROR if fields["status"] == 500 else logging.INFO, "request", extra={"fields": fields})
    return fields
