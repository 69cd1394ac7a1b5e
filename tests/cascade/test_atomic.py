"""Whole or not there: at every step that may fail; tests/training/test_loop.py kills processes in between."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cascade import atomic
from cascade.errors import CascadeError

FULL = OSError(errno.ENOSPC, "No space left on device")


def test_the_new_one_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic.file(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    with atomic.folder(tmp_path / "deep" / "b") as beside:
        (beside / "c").write_text("c")
        assert not (tmp_path / "deep" / "b").exists()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == ["a.txt", "deep", "deep/b", "deep/b/c"]
    assert path.read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("step", ["block", "fsync", "rename"])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=repr)
def test_what_fails_leaves_nothing(
    kind: str, step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    name = "replace" if kind == "file" else "rename"
    with monkeypatch.context() as patch, pytest.raises(type(error)) as raised:
        if step != "block":
            patch.setattr(os if step == "fsync" else Path, step if step == "fsync" else name, fail)
        with getattr(atomic, kind)(tmp_path / "a") as beside:
            (beside if kind == "file" else beside / "b").write_text("half")
            if step == "block":
                fail()
    assert raised.value is error and not list(tmp_path.iterdir())


def test_an_error_for_who_named_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def lines() -> Iterator[str]:
        yield "half"
        raise FULL

    for path in (tmp_path / "gone" / "a", tmp_path):
        with pytest.raises(
            CascadeError, match=f"^{path} could not be written .*: free disk space, or choose another path$"
        ):
            atomic.write_bytes(path, [b"new"])
    with pytest.raises(CascadeError, match="No space left on device"):
        atomic.write_text(tmp_path / "a", lines())
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
    atomic.write_text(tmp_path / "a", ["é", "\n"])
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa9\n"


def test_what_a_killed_process_left_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "a"
    if not (child := os.fork()):
        with atomic.file(path, alone=True) as beside:
            beside.write_text("a first try, which was longer")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert not path.exists() and len(list(tmp_path.iterdir())) == 1
    with atomic.file(path, alone=True) as beside:
        beside.write_text("a second one")
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and path.read_text() == "a second one"


def test_devices_and_links_are_written_through(tmp_path: Path) -> None:
    pipe, link, target = tmp_path / "pipe", tmp_path / "link.txt", tmp_path / "elsewhere" / "target.txt"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        atomic.write_text(pipe, ["a report\n"])
        assert os.read(reader, 100) == b"a report\n" and pipe.is_fifo()
    finally:
        os.close(reader)
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    atomic.write_text(link, ["new"])
    assert link.is_symlink() and target.read_text() == "new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "link.txt", "pipe", "target.txt"]


def test_what_a_killed_process_left_of_a_folder_is_removed_an_hour_later(tmp_path: Path) -> None:
    old, young, other = (tmp_path / f".{name}-0a1b2c3d.tmp" for name in ("1.123", "1.124", "2.123"))
    for leftover in (old, young, other):
        leftover.mkdir()
        (leftover / "masks").touch()
    for path in (old / "masks", old, other / "masks", other):
        os.utime(path, (1, 1))
    with atomic.folder(tmp_path / "1") as beside:
        (beside / "masks").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["1", young.name, other.name])
