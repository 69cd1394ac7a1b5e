"""API keys: which bundles a caller may use. The file contains only digests, so reading it reveals no key."""

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
MISSING = ItemError("key_missing", "this server requires an API key: send the header Authorization: Bearer KEY")
UNKNOWN = ItemError("key_unknown", "no such API key: ask the operator of this server for one")
FORBIDDEN = ItemError("key_forbidden", "this API key is for other bundles: ask for one for this bundle")


@dataclass(frozen=True)
class Keys:
    """Pairs of a bundle's name, or ``*`` for every bundle, and the SHA-256 digest of a key for it."""

    pairs: tuple[tuple[str, bytes], ...]

    def allowed(self, authorization: str | None) -> frozenset[str] | ItemError:
        """The bundles that an Authorization header gives access to (``*``: all of them), or what is wrong with it."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return MISSING
        digest = sha256(key.strip().encode("latin-1", "replace")).digest()
        # Every pair is compared, and each in constant time, so the time reveals nothing about the keys.
        allowed = frozenset(bundle for bundle, stored in self.pairs if hmac.compare_digest(stored, digest))
        return allowed or UNKNOWN


def read(path: Path) -> Keys:
    """Read the keys of a file with lines ``BUNDLE SHA256``; ``#`` starts a comment.

    Raises:
        CascadeError: the file cannot be read, has no key, or has another kind of line (which is not shown).
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
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
        raise CascadeError(f"{path} has no key: write lines BUNDLE SHA256, or omit --api-keys")
    return Keys(tuple(pairs))


class Watched:
    """The keys of a file, which is read again when it changes.

    If the changed file is invalid, the log says so and the old keys stay valid: half a file locks nobody out.

    Raises:
        CascadeError: as ``read``, at the first reading.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = self._look()
        self.keys = read(path)

    def refresh(self) -> Keys:
        """The current keys of the file."""
        if (stamp := self._look()) != self._stamp:
            self._stamp = stamp
            try:
                self.keys = read(self.path)
                log.warning("the API keys were read again: %d lines", len(self.keys.pairs))
            except CascadeError as error:
                log.error("%s; the old keys stay valid", error)
        return self.keys

    def _look(self) -> tuple[int, int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
