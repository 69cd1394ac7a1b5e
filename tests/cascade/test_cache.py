"""Where caches are, with and without a home, and what leaves them."""

import os
import time
from pathlib import Path

import pytest

from cascade.bundle.store import Store
from cascade.cache import UNUSED, cache_folder, used
from cascade.engine.executors.selection import path


def test_environment_and_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_folder() == Path("/cache/cascade")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/users/ada")
    assert cache_folder() == Path("/users/ada/.cache/cascade")


def test_a_user_without_home_and_passwd_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert cache_folder().parent == tmp_path
    cache = Store("memory://m").cache
    assert path().is_relative_to(tmp_path)
    assert cache is not None and cache.is_relative_to(tmp_path)


def unused(path: Path, seconds: float = UNUSED + 60) -> Path:
    """The file or folder as it is when nobody has used it for so long."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def test_copies_of_stores_that_nobody_uses_leave(tmp_path: Path) -> None:
    """A store in use keeps its copies, however long it runs."""
    served = Store("memory://served", tmp_path)
    assert served.cache is not None
    for folder in (served.cache, tmp_path / "0123456789abcdef", tmp_path / "data"):
        (folder / "demo" / "1").mkdir(parents=True)
        unused(folder)
    served.fs.mkdirs("/served", exist_ok=True)
    served.look()
    Store("memory://other", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {served.cache.name, "data"}


def test_used_is_no_error_where_nothing_is(tmp_path: Path) -> None:
    used(tmp_path / "nothing")
    assert not list(tmp_path.iterdir())
