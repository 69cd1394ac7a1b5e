"""The one base of all errors that are meant for a person."""


class CascadeError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and what to do."""


def brief(error: BaseException) -> str:
    """Somebody else's error for a message of ours: its kind and what it says, in one line of bounded length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
