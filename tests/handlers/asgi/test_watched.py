"""Files that change, and those that become invalid."""

from pathlib import Path

import pytest

from cascade.errors import CascadeError
from handlers.asgi.watched import Watched


def number(*paths: Path) -> int:
    try:
        return sum(int(path.read_text()) for path in paths)
    except (OSError, ValueError) as error:
        raise CascadeError("no number") from error


def test_a_file_that_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("1")
    two.write_text("10")
    watched = Watched(number, one, two)
    assert watched.refresh() == 11 and not caplog.records
    two.write_text("200")
    assert watched.refresh() == watched.value == 201
    for change in (lambda: one.write_text("secret"), two.unlink):
        caplog.clear()
        change()
        assert [watched.refresh() for _ in range(3)] == [201] * 3
        (record,) = caplog.records
        assert record.levelname == "ERROR" and record.message == "no number; what was read before stays valid"
    one.write_text("1")
    two.write_text("3000")
    assert watched.refresh() == 3001
    with pytest.raises(CascadeError):
        Watched(number, tmp_path / "nothing")
