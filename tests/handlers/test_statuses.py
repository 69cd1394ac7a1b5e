"""Every kind of error that the code can make has an HTTP status."""

import re

from cascade.engine.results import ItemError
from handlers.statuses import STATUSES, error_body, status_of
from tests.helpers.paths import ROOT

KIND = re.compile(r'(?:ItemError|ImageError)\(\s*"(\w+)"')


def test_every_kind_has_a_status() -> None:
    files = [path for package in ("cascade", "handlers") for path in (ROOT / package).rglob("*.py")]
    kinds = {kind for path in files for kind in KIND.findall(path.read_text())} - {"http"}  # made by the client
    assert {"not_an_image", "unknown_bundle", "key_missing", "overloaded"} <= kinds <= STATUSES.keys()


def test_status_and_body() -> None:
    error = ItemError("too_large", "send less")
    assert status_of(error) == 413
    assert error_body(error) == {"error": {"status": 413, "kind": "too_large", "message": "send less"}}
    assert status_of(ItemError("method_not_allowed", "")) == 405
