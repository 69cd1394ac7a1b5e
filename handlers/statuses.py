"""The HTTP status of each kind of error. ``cascade`` knows kinds only; this is the one place that maps them."""

from http import HTTPStatus
from typing import Any

from cascade.engine.results import ItemError

STATUSES: dict[str, int] = {
    # HTTP's own errors, by their phrase: bad_request 400, not_found 404, method_not_allowed 405, ...
    **{status.phrase.lower().replace(" ", "_"): int(status) for status in HTTPStatus if status >= 400},
    # The image.
    "empty": 400,
    "not_an_image": 400,
    "truncated": 400,
    "unreadable": 400,
    "bad_pixels": 400,
    "too_large": 413,
    "too_wide": 413,
    "too_many_pixels": 413,
    "too_complex": 413,
    # The request.
    "bundle_missing": 400,
    "unknown_domain": 422,
    "unknown_bundle": 404,
    "unknown_version": 404,
    "unknown_mode": 400,
    "mode_missing": 400,
    "bad_option": 400,
    "unknown_option": 400,
    "too_many_images": 413,
    "body_too_large": 413,
    "json_too_large": 413,
    "compressed_body": 415,
    "unknown_host": 421,
    "slow_body": 408,
    "hung_up": 400,
    "no_bank": 404,
    "no_thumbnail": 404,
    "unknown_mask": 404,
    "other_backbone": 409,
    "index_bundle": 409,
    "index_stale": 409,
    # The caller.
    "key_missing": 401,
    "key_unknown": 401,
    "key_forbidden": 403,
    "over_rate": 429,
    "over_concurrency": 429,
    "over_queue": 429,
    "key_not_admin": 403,
    # Management.
    "management_off": 404,
    "keeping_off": 404,
    "no_unknown": 404,
    "bad_bundle": 400,
    "load_failed": 400,
    "version_exists": 409,
    "store_not_writable": 409,
    # The server.
    "overloaded": 503,
    "deadline": 503,
    "stopping": 503,
    "away": 503,
    "bundle_unavailable": 503,
    "failed": 500,
    "not_finite": 500,
}


def status_of(error: ItemError) -> int:
    """The HTTP status of an error."""
    return STATUSES[error.kind]


def error_body(error: ItemError, path: str = "/v1") -> dict[str, Any]:
    """The JSON body of an error: ``{"error": {"status", "kind", "message"}}``; a plain string below /v2."""
    if path.startswith("/v2"):
        return {"error": f"{error.kind}: {error.message}"}
    return {"error": {"status": status_of(error), "kind": error.kind, "message": error.message}}
