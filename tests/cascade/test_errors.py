"""Foreign text is printed without control characters."""

from cascade.errors import brief, printable


def test_printable_escapes_what_a_terminal_would_obey() -> None:
    assert printable("x\x1b]0;owned\x07\r\n") == "x\\x1b]0;owned\\x07\\r\\n"
    assert printable("caf\udce9.png") == "caf\\udce9.png"
    assert printable("größe 你好.png") == "größe 你好.png"
    assert printable("right-to-left \u202e override") == "right-to-left \\u202e override"


def test_brief_is_one_short_line() -> None:
    assert brief(ValueError("a\nb" * 200)).startswith("ValueError: a ba b") and len(brief(ValueError("x" * 999))) == 200
