"""Keep images that no bundle fits, so that the next bundle can be trained on them: the option ``--keep-unknown``.

A folder of JPEG files, each with its embedding at the stage of dispatch in the comment. The folder is bounded in images
and bytes; the oldest images are removed first. Images are reduced and written in a thread of their own. Several
processes may share a folder.
"""

import base64
import hashlib
import io
import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from cascade import atomic, metrics
from cascade.engine.dispatch_table import Space
from cascade.errors import CascadeError
from cascade.model.decoding import LIMITS, ImageError, Limits, decode

TEACHER = 2
"""Kept images are twice as large as the network's input, as training without labels has a teacher at that size."""
MAX_ASPECT = 2  # longer over shorter side; what is beyond is cut off
QUALITY = 92
WAITING = 32  # images that wait to be written; further ones are dropped
NAME = re.compile(r"[0-9]{13}-[0-9a-f]{16}\.jpg")
"""Milliseconds since 1970, and a hash of the image as it was sent."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """A kept image: the name and the size in bytes of its file, and when it was sent, Unix seconds."""

    name: str
    bytes: int

    @property
    def time(self) -> float:
        return int(self.name[:13]) / 1000


@dataclass(frozen=True)
class Origin:
    """What the server knew about a kept image.

    Attributes:
        backbone, source: name and weight source of the backbone that dispatched it. fingerprint: of its weights.
        stage, preprocessing: of the dispatch.
        embedding: pooled activations at this stage, float16 [D].
    """

    backbone: str
    source: str
    fingerprint: str
    stage: int
    preprocessing: dict[str, Any]
    embedding: np.ndarray

    @classmethod
    def of(cls, space: Space, embedding: np.ndarray) -> Self:
        """The origin of an image with this embedding, float [D]."""
        backbone = space.targets[0].backbone
        name, source = backbone.name, backbone.source
        shape = space.preprocessing.to_json()
        return cls(name, source, space.fingerprint, space.stage, shape, embedding.astype("<f2"))

    def to_comment(self) -> bytes:
        embedding = base64.b64encode(self.embedding.tobytes()).decode()
        return json.dumps(self.__dict__ | {"embedding": embedding}, separators=(",", ":")).encode()

    @classmethod
    def from_comment(cls, comment: bytes) -> Self:
        """The inverse of ``to_comment``. Raises ValueError."""
        try:
            data = json.loads(comment)
            embedding = np.frombuffer(base64.b64decode(data["embedding"], validate=True), "<f2")
            backbone, source, fingerprint = (str(data[name]) for name in ("backbone", "source", "fingerprint"))
            return cls(backbone, source, fingerprint, int(data["stage"]), dict(data["preprocessing"]), embedding)
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(str(error)) from None


class UnknownImages:
    """The folder of kept images: ``with engine.keeping_unknown(folder, 2000, 2**28): ...``.

    Args:
        folder: is created, for this user alone.
        most_images, most_bytes: bounds of what is kept.
        limits: for decoding.

    Raises:
        CascadeError: the folder can't be written.
    """

    def __init__(self, folder: Path, most_images: int, most_bytes: int, limits: Limits = LIMITS) -> None:
        self.folder, self.limits = folder, limits
        self.most_images, self.most_bytes = most_images, most_bytes
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for leftover in folder.glob(".*.tmp"):  # of a process that was killed
                if time.time() - leftover.stat().st_mtime > atomic.ABANDONED:
                    leftover.unlink(missing_ok=True)
        except OSError as error:
            raise atomic.not_written(folder, error) from error
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise CascadeError(f"unknown images can't be kept in {folder}: give the server access, or another folder")
        self._failing = False
        self._queue: queue.Queue[tuple[bytes, int, Origin] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="cascade-unknown", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def offer(self, file: bytes, space: Space, embedding: np.ndarray) -> None:
        """Keep an image; returns at once. If too many are waiting, it is dropped.

        Args:
            file: the encoded image. space: the one that came closest. embedding: in this space, float [D].
        """
        side = TEACHER * space.preprocessing.resized_side
        try:
            self._queue.put_nowait((file, side, Origin.of(space, embedding)))
        except queue.Full:
            metrics.UNKNOWN_KEPT.labels("dropped").inc()

    def listed(self) -> list[Kept]:
        """The kept images, oldest first."""
        try:
            entries = [*os.scandir(self.folder)]
        except FileNotFoundError:  # removed by its owner
            return []
        found = []
        for entry in entries:
            with suppress(FileNotFoundError):  # evicted meanwhile
                if NAME.fullmatch(entry.name):
                    found.append(Kept(entry.name, entry.stat().st_size))
        return sorted(found, key=lambda kept: kept.name)

    def read(self, name: str) -> bytes | None:
        """The file of a kept image; None if there is none of this name."""
        try:
            return (self.folder / name).read_bytes() if NAME.fullmatch(name) else None
        except FileNotFoundError:
            return None

    def close(self) -> None:
        """Write what is waiting, and end the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        for file, side, origin in iter(self._queue.get, None):
            try:
                result = "kept" if self._keep(file, side, origin) else "repeated"
                self._failing = False
            except (ImageError, OSError) as error:
                result = "failed"
                if not self._failing:  # once, not for every image
                    self._failing = True
                    reason = error.strerror if isinstance(error, OSError) else error.kind
                    log.warning("unknown images can't be kept: %s", reason)
            metrics.UNKNOWN_KEPT.labels(result).inc()

    def _keep(self, file: bytes, side: int, origin: Origin) -> bool:
        """Write an image and remove the oldest ones beyond the bounds. Returns False if it is there already."""
        kept, digest = self.listed(), hashlib.sha256(file).hexdigest()[:16]
        if any(digest in each.name for each in kept):
            return False
        name = f"{time.time_ns() // 10**6:013d}-{digest}.jpg"
        small = reduced(decode(file, self.limits), side)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        small.save(out := io.BytesIO(), "jpeg", quality=QUALITY, subsampling=0, comment=origin.to_comment())
        with atomic.file(self.folder / name) as beside:
            beside.write_bytes(out.getvalue())
        kept.append(Kept(name, len(out.getvalue())))
        for old in _beyond(kept, self.most_images, self.most_bytes):
            (self.folder / old.name).unlink(missing_ok=True)
        return True


def reduced(image: Image.Image, side: int) -> Image.Image:
    """The image with a shorter side of at most ``side`` pixels and a longer one of ``MAX_ASPECT`` times that."""
    width, height = image.size
    most = MAX_ASPECT * min(width, height)
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    image = image.crop((left, top, left + min(width, most), top + min(height, most)))
    scale = min(1.0, side / min(image.size))
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def origin_of(file: bytes) -> Origin | None:
    """The origin of a kept image's file; None for other images. Raises ImageError if it is no image."""
    comment = Image.open(io.BytesIO(file)).info.get("comment", b"") if file.startswith(b"\xff\xd8\xff") else b""
    try:
        return Origin.from_comment(comment)
    except ValueError:
        return None


def _beyond(kept: list[Kept], most_images: int, room: int) -> Iterator[Kept]:
    """The oldest images beyond the bounds; ``kept`` has the oldest first."""
    for newer, each in enumerate(reversed(kept)):
        room -= each.bytes
        if newer >= most_images or room < 0:
            yield each
