"""Base class of user-facing errors, and foreign text made safe to print."""


class CascadeError(Exception):
    """An error that the user can fix. The message is one line that says what is wrong and what to do."""


class OutOfMemory(CascadeError):
    """Something does not fit into the memory that it may take; worth another try when there is more room."""


def brief(error: BaseException) -> str:
    """A third-party exception in one line of at most 200 characters: its type and its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def printable(text: str) -> str:
    r"""``text`` with control characters, surrogates and line breaks escaped, as ``\x1b``.

    For text from bundles, images' names and remote servers: a terminal would obey its escape sequences.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
