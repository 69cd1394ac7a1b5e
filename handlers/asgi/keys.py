"""API keys: which bundles a caller may use, and with which limits. Only digests, so reading them reveals no key."""

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
    """Who sends a request.

    Attributes:
        bundles: that it may use; ``*`` stands for all.
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
        tenants: by digest; a key without one is a tenant of its own, named after its digest.
        admins: digests of the keys that may change what is served.
    """

    pairs: tuple[tuple[str, bytes], ...]
    tenants: Mapping[bytes, Tenant] = field(default_factory=dict)
    admins: frozenset[bytes] = frozenset()

    def caller(self, authorization: str | None) -> Caller | ItemError:
        """Who sends this Authorization header, or what is wrong with it."""
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return MISSING
        digest = sha256(key.strip().encode("latin-1", "replace")).digest()
        # Every pair is compared, and each in constant time, so the time reveals nothing about the keys.
        bundles = frozenset(bundle for bundle, stored in self.pairs if hmac.compare_digest(stored, digest))
        if not bundles:
            return UNKNOWN
        return Caller(bundles, self.tenants.get(digest) or Tenant(nameless(digest)), digest in self.admins)

    def allowed(self, authorization: str | None) -> frozenset[str] | ItemError:
        """The bundles that an Authorization header gives access to (``*``: all of them), or what is wrong with it."""
        caller = self.caller(authorization)
        return caller if isinstance(caller, ItemError) else caller.bundles


def nameless(digest: bytes) -> str:
    """What a tenant is called whose key has no name; nobody can find the key by it."""
    return f"key-{digest.hex()[:8]}"
