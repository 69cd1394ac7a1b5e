"""Where caches are, with and without a home."""

from pathlib import Path

import pytest

from cascade.bundle.store import Store
from cascade.cache import cache_folder
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
