"""API keys: the bundles that a caller may use, and the caller's limits. Only digests are stored, never keys."""

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from cascade.engine.results import ItemError
from cascade.engine.tenants import Tenant

EVERY = "*"
MISSING = ItemError("key_missing", "this server requires an API key: send the header Authorization: Bearer KEY")
UNKNOWN = ItemError("key_unknown", "no such API key: ask the operator of this server for one")
FORBIDDEN = ItemError("key_forbidden", "this API key is for other bundles: ask for one for this bundle")


@dataclass(frozen=True)
class Caller:
    """The sender of a request.

    Attributes:
        bundles: those that it may use; ``*`` stands for all.
        admin: whether it may change what is served.
    """

    bundles: frozenset[str]
    tenant: Tenant
    admin: bool = False


@dataclass(frozen=True)
class Keys:
    """The keys of a server.

    Attributes:
        pairs: a bundle's name, or ``*`` for every bundle, and the SHA-256 digest of a key for it.
        tenants: by digest; a key without one is its own tenant, named after its digest.
        admins: digests of the keys that may change what is served.
    """

    pairs: tuple[tuple[str, bytes], ...]
    tenants: Mapping[bytes, Tenant] = field(default_factory=dict)
    admins: frozenset[bytes] = frozenset()

    def caller(self, authorization: str | None) -> Caller | ItemError:
        """The caller with this Authorization header, or the error in it."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return MISSING
        digest = sha256(key.strip().encode("latin-1", "replace")).digest()
        # Every pair is compared, in constant time each, so that timing reveals nothing about the keys.
        bundles = frozenset(bundle for bundle, stored in self.pairs if hmac.compare_digest(stored, digest))
        if not bundles:
            return UNKNOWN
        return Caller(bundles, self.tenants.get(digest) or Tenant(nameless(digest)), digest in self.admins)

    def allowed(self, authorization: str | None) -> frozenset[str] | ItemError:
        """The bundles that an Authorization header gives access to (``*``: all of them), or the error in it."""
        caller = self.caller(authorization)
        return caller if isinstance(caller, ItemError) else caller.bundles


def nameless(digest: bytes) -> str:
    """The name of a tenant whose key has none; it does not reveal the key."""
    return f"key-{digest.hex()[:8]}"
