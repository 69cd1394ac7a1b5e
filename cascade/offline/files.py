"""Files of this machine and at URLs that fsspec knows: found, opened, fetched; what is read at a time is bounded."""

import glob
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from cascade.errors import CascadeError, brief
from cascade.model.preprocessing import LIMITS, ImageError, Limits

Load = Callable[[], bytes]
"""Gives the bytes of one image file, in any thread; raises ImageError where they can't be had."""

CONNECT, SILENCE, WHOLE = 10, 30, 120  # seconds: for a connection, between two bytes, for one image
TRIES, PAUSE = 3, 0.5  # of one image that is elsewhere; seconds before the second try, then twice as many

# What a folder is searched for. Those in the second line cannot be decoded and become rows with an error,
# lest a folder of GIFs pass for an empty one.
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp"}
    | {".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl"}
)


@dataclass(frozen=True)
class Held:
    """A Load of what is in memory already."""

    data: bytes

    def __call__(self) -> bytes:
        return self.data


def is_url(name: str) -> bool:
    """Whether a source is a URL and no path of this machine."""
    return "://" in name


def is_pattern(name: str) -> bool:
    """Whether a source that nothing is called stands for what it matches."""
    return any(c in name for c in "*?[")


def suffix(name: str) -> str:
    """Of a path or URL, as ``.png``: in lower case, without a URL's query."""
    return os.path.splitext(urlsplit(name).path if is_url(name) else name)[1].lower()


def open_file(where: str, whole: bool = False) -> AbstractContextManager[IO[bytes]]:
    """A file of this machine or at a URL, for reading.

    Args:
        whole: it will be read once from beginning to end: one request where HTTP would take two.
    """
    if not is_url(where):
        return open(where, "rb")
    fs, path = _filesystem(where)
    stream = whole and _scheme(where) in ("http", "https")
    kwargs = {"block_size": 0, "size": 1} if stream else {}  # a size, whatever it is, saves asking for it
    opened: AbstractContextManager[IO[bytes]] = fs.open(path, "rb", **kwargs)
    return opened


def fetch(url: str, limits: Limits = LIMITS) -> bytes:
    """The file at a URL, at most one byte more than an image may have.

    Raises:
        ImageError: "unreadable", after three tries where another one may help.
    """
    end = time.monotonic() + WHOLE
    for attempt in range(TRIES):
        try:
            with open_file(url, whole=True) as file:
                parts, left = [], limits.max_bytes + 1
                while left > 0 and (part := file.read(min(left, 2**20))):
                    parts.append(part)
                    left -= len(part)
                    if time.monotonic() > end:
                        raise TimeoutError(f"more than {WHOLE} s")
                return b"".join(parts)
        except (FileNotFoundError, PermissionError, ValueError, ImportError) as error:
            why: Exception = error
            break
        except Exception as error:  # each client has classes of its own
            why = error
            if time.monotonic() > end:
                break
            if attempt < TRIES - 1:
                time.sleep(PAUSE * 2**attempt)
    raise ImageError("unreadable", f"{url} cannot be read ({brief(why)}): check the URL") from why


def find(source: str) -> Iterator[str]:
    """The files that a path, a folder, a pattern or a URL of one of these means, see ``sources.expand``.

    Raises:
        CascadeError: a URL can't be listed, or holds a password.
    """
    if is_url(source):
        yield from _elsewhere(source)
    elif os.path.isdir(source):
        yield from _images_in(source, set())
    elif is_pattern(source) and not os.path.lexists(source):
        for match in sorted(set(glob.iglob(source, recursive=True)), key=Path):
            if os.path.lexists(match):  # "gone/**" matches "gone/" in some Pythons
                yield from _images_in(match, set()) if os.path.isdir(match) else [match]
    else:
        yield source


def _images_in(folder: str, seen: set[str]) -> Iterator[str]:
    """Files and folders by name, so that paths come sorted; a link to a folder counts where it is met first."""
    if (real := os.path.realpath(folder)) in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as listed:
            entries = sorted((e.name, _is_folder(e)) for e in listed)
    except OSError:
        yield folder
        return
    for name, is_folder in entries:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _images_in(path, seen)
        elif suffix(name) in SUFFIXES:
            yield path


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _elsewhere(url: str) -> Iterator[str]:
    if urlsplit(url).password:
        raise CascadeError("a source's URL holds a password: give it by the environment or fsspec's configuration")
    folder, pattern = url.endswith("/"), "*" in url
    if not (folder or pattern):
        yield url
        return
    try:
        fs, path = _filesystem(url)
        names = sorted(map(str, fs.glob(path) if pattern else fs.find(path)))
    except Exception as error:
        raise CascadeError(f"{url} can't be listed ({brief(error)}): is it in reach?") from error
    for name in names:
        if pattern or suffix(name) in SUFFIXES:
            yield str(fs.unstrip_protocol(name))


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it, with times after which a silent server is given up."""
    import fsspec

    options: dict[str, Any] = {}
    match _scheme(url):
        case "http" | "https":
            from fsspec.implementations.http import aiohttp  # what fsspec itself takes these times as

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE)
            options["client_kwargs"] = {"timeout": timeout}
        case "s3":
            options["config_kwargs"] = {"connect_timeout": CONNECT, "read_timeout": SILENCE}
        case "gs" | "gcs":
            options["timeout"] = SILENCE
    opened: tuple[Any, str] = fsspec.core.url_to_fs(url, **options)
    return opened


def _scheme(url: str) -> str:
    return url.partition("://")[0].rpartition("::")[2]
