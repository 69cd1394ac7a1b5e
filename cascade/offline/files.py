"""Find, open and download image files, locally and from fsspec's URLs; reads are bounded.

Prediction and training walk folders with the same rules: `images_in`, SUFFIXES and `is_leftover`.
"""

import glob
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn
from urllib.parse import urlsplit

from cascade.errors import CascadeError, brief, printable
from cascade.model.decoding import LIMITS, ImageError, Limits

Load = Callable[[], bytes]
"""Returns the bytes of one image file, in any thread; raises ImageError if they cannot be read."""

CONNECT, SILENCE, WHOLE = 10, 30, 120  # seconds: to connect, between two bytes, for one image
TRIES, PAUSE = 3, 0.5  # of one remote image; seconds before the second try, doubled for each further one
EXAMPLES = 5  # names in a warning about files that were left out

# A folder is searched for these. Those in the second line cannot be decoded; they become rows with an error, so that a
# folder of GIFs is not reported as empty.
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp"}
    | {".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl"}
)
# Folders that archivers and network drives leave behind, besides all hidden ones.
LEFTOVERS = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information"})

log = logging.getLogger(__name__)


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is hidden or a system's leftover, like ``._x.jpg`` or ``__MACOSX``."""
    return name in LEFTOVERS or (name.startswith(".") and name not in (".", ".."))


@dataclass
class LeftOut:
    """Collects hidden images and folders that a search left out, for one warning."""

    where: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(name)

    def log(self) -> None:
        if self.count:
            names = printable(", ".join(self.examples))
            log.warning("%s: left out %d hidden files or folders: %s", printable(self.where), self.count, names)


@dataclass(frozen=True)
class Held:
    """A Load of bytes in memory."""

    data: bytes

    def __call__(self) -> bytes:
        return self.data


def failing(why: str) -> Load:
    """A Load that raises ImageError, "unreadable"."""

    def fail(message: str) -> NoReturn:
        raise ImageError("unreadable", message)

    return partial(fail, why)


def is_url(name: str) -> bool:
    """Whether a source is a URL rather than a local path."""
    return "://" in name


def is_pattern(name: str) -> bool:
    """Whether a source that does not exist as a file is a glob pattern."""
    return any(c in name for c in "*?[")


def suffix(name: str) -> str:
    """The suffix of a path or URL in lower case, like ``.png``; a URL's query is ignored."""
    return os.path.splitext(urlsplit(name).path if is_url(name) else name)[1].lower()


def open_file(where: str, whole: bool = False) -> AbstractContextManager[IO[bytes]]:
    """Open a local file or a URL for reading.

    Args:
        whole: it will be read once from beginning to end, so that one HTTP request is enough instead of two.
    """
    if not is_url(where):
        return open(where, "rb")
    fs, path = _filesystem(where)
    stream = whole and _scheme(where) in ("http", "https")
    kwargs = {"block_size": 0, "size": 1} if stream else {}  # any size will do: it saves the request for it
    opened: AbstractContextManager[IO[bytes]] = fs.open(path, "rb", **kwargs)
    return opened


def fetch(url: str, limits: Limits = LIMITS) -> bytes:
    """Download a file, up to one byte more than an image may have. Proxies are taken from the environment.

    Raises:
        ImageError: "unreadable", after three tries if the error may be temporary.
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
        except Exception as error:  # each client has its own exceptions
            why = error
            if time.monotonic() > end:
                break
            if attempt < TRIES - 1:
                time.sleep(PAUSE * 2**attempt)
    raise ImageError("unreadable", f"{url} cannot be read ({brief(why)}): check the URL") from why


def find(source: str, patterns: bool = True) -> Iterator[str]:
    """The files that a path, a folder, a pattern or a URL stands for, see ``sources.expand``.

    Args:
        patterns: whether ``*``, ``?`` and ``[`` match; otherwise they are part of a name.

    Raises:
        CascadeError: a URL cannot be listed, or contains a password.
    """
    if is_url(source):
        yield from _remote(source, patterns)
    elif os.path.isdir(source):
        yield from images_in(source)
    elif patterns and is_pattern(source) and not os.path.lexists(source):
        for match in sorted(set(glob.iglob(source, recursive=True)), key=Path):
            if os.path.lexists(match):  # "gone/**" matches "gone/" in some Pythons
                yield from images_in(match) if os.path.isdir(match) else [match]
    else:
        yield source


def images_in(folder: str) -> Iterator[str]:
    """The images below a folder at any depth, by suffix, sorted.

    Links are followed, but no folder is visited twice. Hidden files and leftovers are left out, and named in a warning.
    A folder that cannot be listed, or disappears meanwhile, is yielded itself, so that it becomes an error.
    """
    left_out, seen = LeftOut(folder), set[tuple[int, int]]()
    waiting = [(folder, True)]  # paths, the next one last, and whether they are folders; folders nest without limit
    while waiting:
        path, is_folder = waiting.pop()
        if not is_folder:
            yield path
            continue
        try:
            status = os.stat(path)
            if (identity := (status.st_dev, status.st_ino)) in seen:
                continue
            seen.add(identity)
            waiting += reversed([*_listed(path, left_out)])
        except OSError:
            yield path
    left_out.log()


def _listed(folder: str, left_out: LeftOut) -> Iterator[tuple[str, bool]]:
    """Images and folders in one folder, sorted, and which of them are folders. Raises OSError."""
    with os.scandir(folder) as listed:
        entries = sorted((entry.name, _is_folder(entry)) for entry in listed)
    for name, is_folder in entries:
        path = os.path.join(folder, name)
        if not (is_folder or suffix(name) in SUFFIXES):
            continue
        if is_leftover(name):
            left_out.add(path)
        else:
            yield path, is_folder


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _remote(url: str, patterns: bool) -> Iterator[str]:
    if urlsplit(url).password:
        raise CascadeError("a source's URL contains a password: set it in the environment or fsspec's configuration")
    folder, pattern = url.endswith("/"), patterns and "*" in url
    if not (folder or pattern):
        yield url
        return
    try:
        fs, path = _filesystem(url)
        names = sorted(map(str, fs.glob(path) if pattern else fs.find(path)))
    except Exception as error:
        raise CascadeError(f"{url} cannot be listed ({brief(error)}): check the address") from error
    left_out = LeftOut(url)
    for name in names:
        if not (pattern or suffix(name) in SUFFIXES):
            continue
        if any(map(is_leftover, name.removeprefix(path).split("/"))):
            left_out.add(name)
        else:
            yield str(fs.unstrip_protocol(name))
    left_out.log()


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system and the path in it, with timeouts for servers that do not answer."""
    import fsspec

    options: dict[str, Any] = {}
    match _scheme(url):
        case "http" | "https":
            from fsspec.implementations.http import aiohttp  # the one that fsspec uses

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENCE)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}  # proxies of the environment
        case "s3":
            options["config_kwargs"] = {"connect_timeout": CONNECT, "read_timeout": SILENCE}
        case "gs" | "gcs":
            options["timeout"] = SILENCE
    opened: tuple[Any, str] = fsspec.core.url_to_fs(url, **options)
    return opened


def _scheme(url: str) -> str:
    return url.partition("://")[0].rpartition("::")[2]
