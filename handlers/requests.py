"""What both front ends speak for one image: how a request is read, and how an answer is written.

An image as it is, or JSON around it; bundle, version, mode and fields by headers; JSON or the embedding's bytes back.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cascade.engine.results import ItemError, Options, Prediction
from handlers.statuses import error_body

PREFIX = "x-cascade-"
OPTIONS = ("bundle", "version", "mode", "fields")
BINARY = "application/octet-stream"
FIELDS = ("labels", "neighbors", "embedding")
NOT_FINITE = ItemError("not_finite", "the answer has numbers that are none: try cascade verify on the bundle")


def parse(item: Mapping[str, Any], headers: Mapping[str, Any]) -> tuple[bytes, Options] | ItemError:
    """The image's bytes and the options of one request.

    Args:
        item: what TorchServe makes of the body: one value (raw, or the one part of a form), or none.
        headers: as sent, names in the client's case; and for the body's name a dict with its content-type.
    """
    if len(item) > 1:
        return ItemError("bad_request", f"send one image a request, not {len(item)} form parts")
    name, body = next(iter(item.items()), ("body", b""))
    body = body.encode() if isinstance(body, str) else bytes(body)
    options = {k.lower()[len(PREFIX) :]: v for k, v in headers.items() if k.lower().startswith(PREFIX)}
    about = headers.get(name)  # of a form's part that is named like a header, the header
    if isinstance(about, Mapping) and "json" in about.get("content-type", "").lower():
        try:
            options = options | json.loads(body)  # a TypeError for all but an object
            body = base64.b64decode(options.pop("image"), validate=True)
        except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
            return ItemError("bad_request", 'a JSON body is an object with "image", the image\'s bytes in base64')
    wish = _options(options)
    if isinstance(wish, ItemError):
        return wish
    return body, replace(wish, embedding=wish.embedding or wants_bytes(headers))


def _options(given: dict[str, Any]) -> Options | ItemError:
    """Only names and types are checked: whether a bundle, version or mode exists is for the engine to say."""
    if unknown := sorted(set(given) - set(OPTIONS)):
        return ItemError("unknown_option", f"unknown option {unknown[0][:40]!r}: there are {', '.join(OPTIONS)}")
    fields = given.pop("fields", ["labels", "neighbors"])
    if isinstance(fields, str):
        fields = [field.strip() for field in fields.split(",") if field.strip()]
    for name, value in given.items():
        if not isinstance(value, str):
            return ItemError("bad_option", f"option {name!r} takes a text")
    if not isinstance(fields, list) or not set(map(str, fields)) <= set(FIELDS):
        return ItemError("bad_option", f"option 'fields' takes some of {', '.join(FIELDS)}")
    counts = [5 if name in fields else 0 for name in ("labels", "neighbors")]
    return Options(given.get("bundle"), given.get("version"), given.get("mode"), "embedding" in fields, *counts)


def wants_bytes(headers: Mapping[str, Any]) -> bool:
    """Whether a request asks for the embedding as it lies in memory and not for JSON."""
    accepted = [str(value) for name, value in headers.items() if name.lower() == "accept"]
    return any(each.partition(";")[0].strip().lower() == BINARY for value in accepted for each in value.split(","))


def encode(answer: Prediction | ItemError, binary: bool) -> tuple[str | bytes, str, dict[str, str]]:
    """Body, content type and headers: compact JSON, or the embedding (float32, little endian) and the rest as headers.

    Raises ValueError for a NaN or an infinity, which JSON has not.
    """
    whole = error_body(answer) if isinstance(answer, ItemError) else answer.to_json()
    text = json.dumps(whole, separators=(",", ":"), allow_nan=False)
    if not binary or isinstance(answer, ItemError) or answer.embedding is None:
        return text, "application/json", {}
    rest = {name: whole[name] for name in ("bundle", "version", "mode", "cluster", "confidence", "ood")}
    headers = {name: str(value) for name, value in rest.items()} | {"masks": ",".join(answer.masks)}
    return answer.embedding.astype("<f4").tobytes(), BINARY, {PREFIX + name: v for name, v in headers.items()}
