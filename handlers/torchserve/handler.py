"""What TorchServe's worker runs: requests in, one engine call for the whole batch, JSON text out.

TorchServe 0.12 fails the whole batch when a handler raises, so whatever is wrong with one request becomes
that request's own status and error body. It also demands exactly one class in this module.
"""

import atexit
import base64
import binascii
import fcntl
import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch

from cascade.engine import Engine, ItemError, Options, Prediction
from cascade.logs import JsonLines
from cascade.registry import load_store

log = logging.getLogger("cascade.torchserve")
REQUEST_ID = re.compile(r"[\w.:-]{1,64}", re.ASCII)
PREFIX = "x-cascade-"
OPTIONS = ("bundle", "version", "mode", "fields")
BINARY = "application/octet-stream"
FIELDS = ("labels", "neighbours", "embedding")
NOT_FINITE = ItemError(500, "not_finite", "the answer has numbers that are none: try cascade verify on the bundle")
STOPPING = ItemError(503, "stopping", "the server is stopping: send the request again, to another replica")


class CascadeHandler:
    """One engine with every bundle of the model store, over one resident backbone."""

    def initialize(self, context: Any) -> None:
        """Load the model store that the `cascade` part of model-config.yaml names, and follow its changes.

        A bundle that cannot be used is left out, and the log says why. Raises CascadeError if none is left.
        """
        settings = context.model_yaml_config["cascade"]
        torch.set_num_threads(settings["threads"])
        self.gate = Path(settings["gate"])
        memory = settings["memory_bytes"]
        self.engine = Engine(settings["budget_bytes"], settings["device"], memory_bytes=memory)
        registry = load_store(self.engine, settings["model_store"], settings["pins"])
        _log_to_stderr(settings["log_level"])
        if registry.trouble:
            log.error("%s; copies on this machine are served", registry.trouble)
        for state in registry.states():
            if state.reason:
                log.error("refused bundle %s/%s: %s", state.name, state.version, state.reason)
        resources = ExitStack()
        resources.enter_context(registry.watching(settings["poll"]))
        atexit.register(resources.close)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str | bytes]:
        """An answer and a status for each request of a batch, in order; never raises for one of them."""
        begin = time.perf_counter()
        headers = [context.get_all_request_header(i) for i in range(len(data))]
        try:
            gate = self.gate.open()
        except FileNotFoundError:  # the entrypoint took it away: no new work, see Server.drain
            answers: list[Any] = [STOPPING] * len(data)
        else:
            with gate:
                fcntl.flock(gate, fcntl.LOCK_SH)
                answers = self.predict([parse(*each) for each in zip(data, headers, strict=True)])
        bodies = []
        for i, answer in enumerate(answers):
            try:
                body, kind, named = _body(answer, wants_bytes(headers[i]))
            except ValueError:
                answer = NOT_FINITE
                body, kind, named = _body(answer, False)
            bodies.append(body)
            context.set_response_content_type(i, kind)
            for name, value in named.items():
                context.set_response_header(i, name, value)
            if isinstance(answer, ItemError):
                context.set_response_status(answer.status, HTTPStatus(answer.status).phrase, i)
            _log(context.get_request_id(i), headers[i], answer, batch=len(data), seconds=time.perf_counter() - begin)
        return bodies

    def predict(self, requests: list[tuple[bytes, Options] | ItemError]) -> list[Any]:
        """One engine call for the requests that could be read; the errors of the others keep their places."""
        readable = [request for request in requests if not isinstance(request, ItemError)]
        answers = iter(self.engine.predict(*map(list, zip(*readable, strict=True))) if readable else ())
        return [request if isinstance(request, ItemError) else next(answers) for request in requests]


def wants_bytes(headers: Mapping[str, Any]) -> bool:
    """Whether a request asks for the embedding as it lies in memory and not for JSON."""
    accepted = [str(value) for name, value in headers.items() if name.lower() == "accept"]
    return any(each.partition(";")[0].strip().lower() == BINARY for value in accepted for each in value.split(","))


def _body(answer: Prediction | ItemError, binary: bool) -> tuple[str | bytes, str, dict[str, str]]:
    """Body, content type and headers: compact JSON, or the embedding (float32, little endian) and the rest as headers.

    Raises ValueError for a NaN or an infinity, which JSON has not.
    """
    whole = answer.to_json()
    text = json.dumps(whole, separators=(",", ":"), allow_nan=False)
    if not binary or isinstance(answer, ItemError) or answer.embedding is None:
        return text, "application/json", {}
    rest = {name: whole[name] for name in ("bundle", "version", "mode", "cluster", "confidence", "ood")}
    headers = {name: str(value) for name, value in rest.items()} | {"masks": ",".join(answer.masks)}
    return answer.embedding.astype("<f4").tobytes(), BINARY, {PREFIX + name: v for name, v in headers.items()}


def _log(request_id: str | None, headers: Mapping[str, Any], answer: Prediction | ItemError, **batch: float) -> None:
    """One line for a request: level info, error where the fault is ours. TorchServe answers with the same id."""
    about: dict[str, Any] = {"request_id": request_id}
    theirs = next((str(value) for name, value in headers.items() if name.lower() == "x-request-id"), "")
    if REQUEST_ID.fullmatch(theirs):
        about["client_request_id"] = theirs
    if isinstance(answer, ItemError):
        about |= {"status": answer.status, "error": answer.kind}
    else:
        about |= {"status": 200, "bundle": answer.bundle, "version": answer.version, "cluster": answer.cluster}
    about |= {"batch": batch["batch"], "ms": round(1000 * batch["seconds"], 1)}
    log.log(logging.ERROR if about["status"] == 500 else logging.INFO, "request", extra={"about": about})


def parse(item: Mapping[str, Any], headers: Mapping[str, Any]) -> tuple[bytes, Options] | ItemError:
    """The image's bytes and the options of one request.

    Args:
        item: what TorchServe makes of the body: one value (raw, or the one part of a form), or none.
        headers: as sent, names in the client's case; and for the body's name a dict with its content-type.
    """
    if len(item) > 1:
        return ItemError(400, "bad_request", f"send one image a request, not {len(item)} form parts")
    name, body = next(iter(item.items()), ("body", b""))
    body = body.encode() if isinstance(body, str) else bytes(body)
    options = {k.lower()[len(PREFIX) :]: v for k, v in headers.items() if k.lower().startswith(PREFIX)}
    about = headers.get(name)  # of a form's part that is named like a header, the header
    if isinstance(about, Mapping) and "json" in about.get("content-type", "").lower():
        try:
            options = options | json.loads(body)  # a TypeError for all but an object
            body = base64.b64decode(options.pop("image"), validate=True)
        except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
            return ItemError(400, "bad_request", 'a JSON body is an object with "image", the image\'s bytes in base64')
    wish = _options(options)
    return (
        wish if isinstance(wish, ItemError) else (body, replace(wish, embedding=wish.embedding or wants_bytes(headers)))
    )


def _options(given: dict[str, Any]) -> Options | ItemError:
    """Only names and types are checked: whether a bundle, version or mode exists is for the engine to say."""
    if unknown := sorted(set(given) - set(OPTIONS)):
        return ItemError(400, "unknown_option", f"unknown option {unknown[0][:40]!r}: there are {', '.join(OPTIONS)}")
    fields = given.pop("fields", ["labels", "neighbours"])
    if isinstance(fields, str):
        fields = [field.strip() for field in fields.split(",") if field.strip()]
    for name, value in given.items():
        if not isinstance(value, str):
            return ItemError(400, "bad_option", f"option {name!r} takes a text")
    if not isinstance(fields, list) or not set(map(str, fields)) <= set(FIELDS):
        return ItemError(400, "bad_option", f"option 'fields' takes some of {', '.join(FIELDS)}")
    counts = [5 if name in fields else 0 for name in ("labels", "neighbours")]
    return Options(given.get("bundle"), given.get("version"), given.get("mode"), "embedding" in fields, *counts)


def _log_to_stderr(level: str) -> None:
    """Ours from ``level`` on, of all others warnings, to stderr as JSON. TorchServe's worker has a line a request.

    Java takes what a worker writes to stderr for a warning, and log4j2.xml shows warnings to who serves.
    """
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    logging.getLogger("cascade").setLevel(level.upper())
    for handler in root.handlers:
        handler.setFormatter(JsonLines())
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)
