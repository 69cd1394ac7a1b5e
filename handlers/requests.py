"""The request and answer format for one image, which both front ends share.

A request is the image itself, or JSON with the image in base64. Bundle, version, mode, fields and priority are headers,
or members of that JSON. The answer is JSON, or the bytes of the embedding.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cascade.engine.results import DISPATCH_MODES, UNKNOWN_CHOICES, ItemError, Options, Prediction
from cascade.engine.tenants import PRIORITIES
from handlers.statuses import error_body

PREFIX = "x-cascade-"
OPTIONS = ("bundle", "version", "mode", "fields", "priority", "dispatch", "unknown")
BINARY = "application/octet-stream"
FIELDS = ("labels", "neighbors", "embedding")
MAX_MEMBERS = 100
"""Most commas and brackets in a JSON body, which has one image and a few options. Small values take 20 times their size
when parsed."""
NOT_FINITE = ItemError("not_finite", "the answer contains NaN or infinity: try cascade verify on the bundle")
COMPRESSED = ItemError("compressed_body", "the body is compressed: send it without Content-Encoding")
BAD_JSON = ItemError("bad_request", 'a JSON body is an object with "image", the file in base64')
COMPLEX_JSON = ItemError("bad_request", f"a JSON body has at most {MAX_MEMBERS} commas and brackets")


def parse(body: bytes, content_type: str, headers: Mapping[str, str]) -> tuple[bytes, Options] | ItemError:
    """Return the image's bytes and the options of one request, or its error.

    Args:
        body: of the request; for a form, of its only part.
        content_type: of the body, or of that part.
        headers: of the request, names in any case.
    """
    if is_compressed(headers):
        return COMPRESSED
    options: dict[str, Any] = {
        name.lower()[len(PREFIX) :]: header_text(value)
        for name, value in headers.items()
        if name.lower().startswith(PREFIX)
    }
    if "json" in content_type.lower():
        if sum(map(body.count, (b",", b"{", b"["))) > MAX_MEMBERS:
            return COMPLEX_JSON
        try:
            options = options | json.loads(body)  # a TypeError unless it is an object
            body = base64.b64decode(options.pop("image"), validate=True)
        except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
            return BAD_JSON
    wanted = _options(options)
    if isinstance(wanted, ItemError):
        return wanted
    return body, replace(wanted, embedding=wanted.embedding or wants_bytes(headers))


def is_compressed(headers: Mapping[str, str]) -> bool:
    """Whether the body has a Content-Encoding. It is refused, since a small body could expand to any size."""
    codings = [value for name, value in headers.items() if name.lower() == "content-encoding"]
    return any(coding.strip().lower() not in ("", "identity") for value in codings for coding in value.split(","))


def header_text(value: str) -> str:
    """Decode a header's value as UTF-8, which clients send; HTTP libraries decode it as latin-1."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def header_bytes(text: str) -> str:
    """The inverse of ``header_text``, for HTTP libraries that encode headers as latin-1."""
    return text.encode().decode("latin-1")


def _options(given: dict[str, Any]) -> Options | ItemError:
    """Check names and types only: the engine knows the bundles, versions and modes."""
    if unknown := sorted(set(given) - set(OPTIONS)):
        return ItemError("unknown_option", f"unknown option {unknown[0][:40]!r}: choose {', '.join(OPTIONS)}")
    fields = given.pop("fields", None)
    if isinstance(fields, str):
        fields = [field.strip() for field in fields.split(",") if field.strip()]
    for name, value in given.items():
        if not isinstance(value, str | None):
            return ItemError("bad_option", f"option {name!r} is a string")
    fields = ["labels", "neighbors"] if fields is None else fields
    if not isinstance(fields, list) or not set(map(str, fields)) <= set(FIELDS):
        return ItemError("bad_option", f"option 'fields' is a list of {', '.join(FIELDS)}")
    priority = given.get("priority")
    if priority not in (None, *PRIORITIES):
        return ItemError("bad_option", f"option 'priority' is one of {', '.join(PRIORITIES)}")
    labels, neighbors = (5 if name in fields else 0 for name in ("labels", "neighbors"))
    how = given.get("dispatch") or Options.dispatch
    dispatch = next((choice for choice in DISPATCH_MODES if choice == how), None)
    if dispatch is None:
        return ItemError("bad_option", f"option 'dispatch' is one of {', '.join(DISPATCH_MODES)}")
    how = given.get("unknown") or Options.unknown
    otherwise = next((choice for choice in UNKNOWN_CHOICES if choice == how), None)
    if otherwise is None:
        return ItemError("bad_option", f"option 'unknown' is one of {', '.join(UNKNOWN_CHOICES)}")
    settled = given.get("bundle"), given.get("version"), given.get("mode")
    return Options(*settled, "embedding" in fields, labels, neighbors, priority, dispatch, unknown=otherwise)


def wants_bytes(headers: Mapping[str, str]) -> bool:
    """Whether a request asks for the bytes of the embedding instead of JSON."""
    accepted = [value for name, value in headers.items() if name.lower() == "accept"]
    return any(kind.partition(";")[0].strip().lower() == BINARY for value in accepted for kind in value.split(","))


def encode(answer: Prediction | ItemError, binary: bool) -> tuple[str | bytes, str, dict[str, str]]:
    """Return body, content type and headers of an answer.

    The body is compact JSON; or with ``binary`` the embedding (float32 [D], little endian), and the rest as headers.
    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    document = error_body(answer) if isinstance(answer, ItemError) else answer.to_json()
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    if not binary or isinstance(answer, ItemError) or answer.embedding is None:
        return text, "application/json", {}
    values = {name: document[name] for name in ("bundle", "version", "mode", "cluster", "confidence", "ood")}
    values["masks"] = ",".join(answer.masks)
    if answer.deferral is not None:
        values |= {"input-size": answer.deferral.input_size, "deferred": str(answer.deferral.deferred).lower()}
    headers = {PREFIX + name: header_bytes(str(value)) for name, value in values.items()}
    return answer.embedding.astype("<f4").tobytes(), BINARY, headers
