"""The one base of all errors that are meant for a person."""


class CascadeError(Exception):
    """Something the user can mend: the message is one line that says what is wrong and what to do."""
