"""API keys: which bundles a caller may use. The file holds digests only, so that who reads it learns no key."""

import hmac
import logging
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from cascade.engine.results import ItemError
from cascade.errors import CascadeError

log = logging.getLogger(__name__)
EVERY = "*"
LINE = re.compile(r"(\S+)\s+([0-9a-fA-F]{64})")
MISSING = ItemError("key_missing", "this server wants an API key: send the header Authorization: Bearer KEY")
UNKNOWN = ItemError("key_unknown", "no such API key: ask who runs this server for one")
FORBIDDEN = ItemError("key_forbidden", "this API key is for other bundles: ask for one for this bundle")


@dataclass(frozen=True)
class Keys:
    """Pairs of a bundle's name, or ``*`` for every bundle, and the SHA-256 digest of a key for it."""

    pairs: tuple[tuple[str, bytes], ...]

    def allowed(self, authorization: str | None) -> frozenset[str] | ItemError:
        """The bundles that the value of an Authorization header opens (``*``: all of them)."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return MISSING
        digest = sha256(key.strip().encode("latin-1", "replace")).digest()
        # Every pair is compared, and each in constant time: how long it takes tells nothing about the keys.
        found = frozenset(bundle for bundle, each in self.pairs if hmac.compare_digest(each, digest))
        return found or UNKNOWN


def read(path: Path) -> Keys:
    """The keys of a file: a line each, ``BUNDLE SHA256``; ``#`` starts a comment.

    Raises:
        CascadeError: the file cannot be read, holds no key, or a line is no such pair (the line is not shown).
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise CascadeError(f"API keys cannot be read from {path} ({e}): give a file of lines BUNDLE SHA256") from e
    pairs = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        pair = LINE.fullmatch(text)
        if pair is None:
            raise CascadeError(f"{path}, line {number}: write BUNDLE (or *) and the key's SHA-256 digest in hex")
        pairs.append((pair[1], bytes.fromhex(pair[2])))
    if not pairs:
        raise CascadeError(f"{path} holds no key: write lines BUNDLE SHA256, or leave --api-keys away")
    return Keys(tuple(pairs))


class Watched:
    """The keys of a file, which is read again when it changes.

    A change that makes no sense is logged, and the keys from before it stay: half a file locks nobody out.

    Raises:
        CascadeError: as ``read``, for the file as it is at first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = self._look()
        self.keys = read(path)

    def refresh(self) -> Keys:
        """The keys as the file has them now."""
        if (stamp := self._look()) != self._stamp:
            self._stamp = stamp
            try:
                self.keys = read(self.path)
                log.warning("the API keys were read anew: %d lines", len(self.keys.pairs))
            except CascadeError as error:
                log.error("%s; the keys from before stay", error)
        return self.keys

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
