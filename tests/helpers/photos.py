"""The ten photographs of tests/data as sources, and the images that sources give."""

import io
import tarfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any

from cascade.model.decoding import LIMITS, ImageError, Limits
from cascade.offline.sources import Unit, read
from tests.helpers.paths import DATA

PHOTOS = sorted((DATA / "photos").glob("*.png"))
BYTES = [photo.read_bytes() for photo in PHOTOS]

BAD = {
    "empty.jpg": "empty",
    "text.jpeg": "not_an_image",
    "cut.png": "truncated",
    "other.gif": "not_an_image",
    "broken.png": "unreadable",
    "loop.png": "unreadable",
    "pipe.webp": "unreadable",
}
"""What goes wrong in the fixture ``folder``: names of files, kinds of their errors."""


def tar(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar file with ``members``."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=format) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return whole.getvalue()


def images(units: Iterable[Unit], limits: Limits = LIMITS) -> dict[str, bytes | str]:
    """Bytes by key, of errors their kind; units are what they are after a way through JSON."""
    found: dict[str, bytes | str] = {}
    for unit in units:
        keys = 0
        for key, load in read(Unit.from_json(unit.to_json()), limits):
            keys += 1
            try:
                value: bytes | str = load()
            except ImageError as error:
                value = error.kind
            assert key not in found
            found[key] = value
        assert unit.count in (None, keys)
    return found


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    """A server of this machine; gives its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=partial(server.serve_forever, 0.02))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
