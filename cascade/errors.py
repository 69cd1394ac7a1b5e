"""Base class of user-facing errors, and foreign text made safe to print."""


class CascadeError(Exception):
    """An error that the user can fix. The message is one line that says what is wrong and what to do."""


class OutOfMemory(CascadeError):
    """Something does not fit into its memory limit; a retry may succeed when more memory is free."""


def brief(error: BaseException) -> str:
    """A third-party exception in one line of at most 200 characters: its type and its message."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def printable(text: str) -> str:
    r"""``text`` with control characters, surrogates and line breaks escaped, as ``\x1b``.

    For text from bundles, image names and remote servers, whose escape sequences a terminal would execute.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
