"""The file of API keys: one line per key and bundle, with the limits of the tenant that owns the key.

    BUNDLE SHA256 [name=TENANT] [weight=2] [priority=batch] [rate=50] [concurrency=8] [queued=64] [role=admin]

A tenant is a name, and may have several keys; its limits may be on any of their lines.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade.engine.tenants import PRIORITIES, Tenant
from cascade.errors import CascadeError
from handlers.asgi.keys import EVERY, Keys, nameless

LINE = re.compile(r"(\S+)\s+([0-9a-fA-F]{64})((?:\s+[a-z]+=\S+)*)")
NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
WEIGHTS = (0.1, 10.0)
"""A wider range would let a tenant with a small weight wait for very long."""
MOST = 1_000_000  # of any limit


class _LineError(ValueError):
    """An invalid line. The message does not quote the line, which may contain a key."""


def _number(least: float, most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise _LineError(f"a number from {least:g} to {most:g}")
        return value

    return parse


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 8 and 1 <= int(text) <= MOST):
        raise _LineError(f"a whole number from 1 to {MOST}")
    return int(text)


def _choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise _LineError(" or ".join(choices))
        return text

    return parse


def _name(text: str) -> str:
    if not NAME.fullmatch(text):
        raise _LineError("up to 64 letters, digits and ._-")
    return text


LIMITS: dict[str, Callable[[str], Any]] = {
    "weight": _number(*WEIGHTS),
    "priority": _choice(*PRIORITIES),
    "rate": _number(0.01, MOST),
    "concurrency": _count,
    "queued": _count,
}
OPTIONS: dict[str, Callable[[str], Any]] = {"name": _name, "role": _choice("admin"), **LIMITS}


@dataclass
class _Read:
    """Parser state: the keys and limits in the lines read so far."""

    pairs: list[tuple[str, bytes]] = field(default_factory=list)
    names: dict[bytes, str] = field(default_factory=dict)
    limits: dict[bytes, dict[str, Any]] = field(default_factory=dict)
    admins: set[bytes] = field(default_factory=set)

    def add(self, text: str) -> None:
        """Add a line. Raises _LineError."""
        line = LINE.fullmatch(text)
        if line is None:
            raise _LineError("write BUNDLE (or *) and the key's SHA-256 digest in hex, then options like weight=2")
        bundle, digest = line[1], bytes.fromhex(line[2])
        self.pairs.append((bundle, digest))
        for option in line[3].split():
            name, _, value = option.partition("=")
            if name not in OPTIONS:
                raise _LineError(f"options are {', '.join(OPTIONS)}")
            try:
                parsed = OPTIONS[name](value)
            except _LineError as error:
                raise _LineError(f"{name} is {error}") from None
            if name == "role":
                if bundle != EVERY:
                    raise _LineError("role=admin needs the bundle *")
                self.admins.add(digest)
            elif name == "name":
                _same(self.names.setdefault(digest, parsed), parsed, name)
            else:
                _same(self.limits.setdefault(digest, {}).setdefault(name, parsed), parsed, name)

    def keys(self) -> Keys:
        """All keys. Raises _LineError if two keys of a tenant have different limits."""
        merged: dict[str, dict[str, Any]] = {}
        for digest, limits in self.limits.items():
            tenant = merged.setdefault(self._name(digest), {})
            for name, value in limits.items():
                _same(tenant.setdefault(name, value), value, name)
        digests = {digest for _, digest in self.pairs}
        tenants = {digest: Tenant(self._name(digest), **merged.get(self._name(digest), {})) for digest in digests}
        return Keys(tuple(self.pairs), tenants, frozenset(self.admins))

    def _name(self, digest: bytes) -> str:
        return self.names.get(digest) or nameless(digest)


def _same(first: Any, second: Any, name: str) -> None:
    if first != second:
        raise _LineError(f"another line gives this tenant another {name}: write it once")


def read(path: Path) -> Keys:
    """Read the keys of a file with lines ``BUNDLE SHA256 [OPTION=VALUE ...]``; ``#`` starts a comment.

    Raises:
        CascadeError: the file cannot be read, has no key, or has another kind of line (which is not shown).
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise CascadeError(f"API keys cannot be read from {path} ({e}): pass a file of lines BUNDLE SHA256") from e
    reader = _Read()
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        try:
            if text:
                reader.add(text)
        except _LineError as error:
            raise CascadeError(f"{path}, line {number}: {error}") from None
    if not reader.pairs:
        raise CascadeError(f"{path} has no key: write lines BUNDLE SHA256, or omit --api-keys")
    try:
        return reader.keys()
    except _LineError as error:
        raise CascadeError(f"{path}: {error}") from None
