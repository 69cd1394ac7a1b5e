"""API keys: who may use which bundle, and files that make no sense."""

from pathlib import Path

import pytest

from cascade.errors import CascadeError
from handlers.asgi import keys
from handlers.asgi.keys import MISSING, UNKNOWN, Keys, Watched
from tests.helpers.keys import digest


@pytest.fixture
def opened(tmp_path: Path) -> Keys:
    lines = [
        "# who has what",
        f"birds {digest('one')}",
        "",
        f"ships\t{digest('one').upper()}   # the same caller",
        f"birds {digest('two')}",
        f"* {digest('all')}",
    ]
    path = tmp_path / "keys"
    path.write_text("\n".join(lines))
    return keys.read(path)


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("Bearer one", {"birds", "ships"}),
        ("bearer two", {"birds"}),
        ("Bearer all", {"*"}),
        ("Bearer three", UNKNOWN),
        ("Bearer " + digest("one"), UNKNOWN),
        ("Bearer \xe9\u20ac", UNKNOWN),
        ("Bearer", MISSING),
        ("Bearer ", MISSING),
        ("Basic one", MISSING),
        ("one", MISSING),
        ("", MISSING),
        (None, MISSING),
    ],
)
def test_allowed(opened: Keys, header: str | None, allowed: object) -> None:
    assert opened.allowed(header) == allowed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("# nothing\n", "has no key"),
        (f"birds {digest('one')}\nbirds secret", "line 2: write BUNDLE"),
        (digest("one"), "line 1"),
        (f"birds {digest('one')[:-1]}", "line 1"),
        (f"birds {digest('one')} more", "line 1"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(CascadeError, match=message) as e:
        keys.read(path)
    assert "secret" not in str(e.value), "what stands there may be a key"


def test_a_file_that_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text(f"birds {digest('one')}\n")
    watched = Watched(path)
    assert watched.refresh().allowed("Bearer one") == {"birds"} and not caplog.records
    path.write_text(f"ships {digest('two')}  # in another hand\n")
    assert watched.refresh().allowed("Bearer one") == UNKNOWN
    assert watched.keys.allowed("Bearer two") == {"ships"}
    for change in (lambda: path.write_text("birds secret\n"), path.unlink):
        caplog.clear()
        change()
        assert [watched.refresh().allowed("Bearer two") for _ in range(3)] == [{"ships"}] * 3
        (record,) = caplog.records
        assert record.levelname == "ERROR" and "the old keys stay valid" in record.message
        assert "secret" not in record.message
    path.write_text(f"birds {digest('three')}\n")
    assert watched.refresh().allowed("Bearer three") == {"birds"}
    with pytest.raises(CascadeError):
        Watched(tmp_path / "nothing")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="cannot be read"):
        keys.read(tmp_path / "keys")
