"""API keys."""

from hashlib import sha256


def digest(key: str) -> str:
    """As a keys file has it."""
    return sha256(key.encode()).hexdigest()
