"""What folders, patterns and URLs mean, and what slow servers may cost."""

import errno
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import copy
from typing import Any

import pytest

from cascade.model.decoding import ImageError, Limits
from cascade.offline import files
from cascade.offline.files import fetch, find, images_in
from cascade.offline.sources import plan
from tests.helpers.photos import BAD, BYTES, PHOTOS, images, serving


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PAUSE", 0.001)


def test_a_folder_is_searched_to_any_depth_and_sorted(folder: Path) -> None:
    found = [Path(name) for name in find(str(folder))]
    assert len(found) == len(PHOTOS) + len(BAD)
    assert found == sorted(found)
    assert folder / "notes.md" not in found and {folder / name for name in BAD} <= set(found)


def test_patterns(folder: Path) -> None:
    assert list(find(f"{folder}/*.gif")) == [str(folder / "other.gif")]
    assert len(list(find(f"{folder}/**/*-0*.png"))) == len(PHOTOS)
    nested = list(find(f"{folder}/nest*"))
    assert nested == list(find(f"{folder}/nested")) and len(nested) == len(set(nested)) > 3


def test_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    odd = tmp_path / "cat[1].png"
    copy(PHOTOS[0], odd)
    assert list(find(str(odd))) == [str(odd)]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    real, top = tmp_path / "real", tmp_path / "top"
    real.mkdir()
    copy(PHOTOS[0], real / "a.png")
    top.mkdir()
    (top / "link").symlink_to(real)
    (real / "up").symlink_to(real)  # a cycle
    assert list(find(str(top))) == [str(top / "link" / "a.png")]


def test_a_folder_that_cannot_be_listed_is_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def denied(path: str) -> Any:
        if Path(path).name == "deeper":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)  # chmod does not stop root
    found = images(list(plan([folder / "nested"])))
    assert [Path(key).name for key, value in found.items() if value == "unreadable"] == ["deeper"]


class Bad(BaseHTTPRequestHandler):
    """Fails twice, then works; or sends without end, or not at all."""

    failures = 2

    def do_GET(self) -> None:
        if self.path == "/flaky.png" and Bad.failures:
            Bad.failures -= 1
            self.send_error(503)
            return
        self.send_response(200)
        self.end_headers()
        try:
            while self.path == "/endless.png":
                self.wfile.write(bytes(2**16))
            if self.path == "/silent.png":
                self.server.silence.wait()  # type: ignore[attr-defined]
            self.wfile.write(BYTES[0])
        except (TimeoutError, ConnectionError):
            pass

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_servers_that_fail_never_end_or_never_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    Bad.failures, silence = 2, threading.Event()
    monkeypatch.setattr(ThreadingHTTPServer, "silence", silence, raising=False)
    with serving(Bad) as url:
        try:
            assert fetch(f"{url}/flaky.png") == BYTES[0] and Bad.failures == 0
            assert len(fetch(f"{url}/endless.png", Limits(max_bytes=2**18))) == 2**18 + 1
            monkeypatch.setattr(files, "SILENCE", 0.2)
            with pytest.raises(ImageError, match="Timeout"):
                fetch(f"{url}/silent.png")
        finally:
            silence.set()


def test_a_folder_that_goes_away_meanwhile_costs_the_others_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As below /proc, where it may happen while a link is followed."""
    before, stat = [*images_in(str(folder))], os.stat

    def gone(path: str, *arguments: object, **more: object) -> os.stat_result:
        if str(path).endswith("gone"):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)
        return stat(path, *arguments, **more)  # type: ignore[arg-type]

    (folder / "gone").mkdir()
    monkeypatch.setattr(os, "stat", gone)
    found = [*images_in(str(folder))]
    assert str(folder / "gone") in found and sorted(before) == sorted(set(found) - {str(folder / "gone")})


def test_folders_nest_without_limit(tmp_path: Path) -> None:
    path = str(tmp_path)
    for _ in range(1100):  # deeper than Python calls itself
        os.mkdir(path := f"{path}/d")
    Path(path, "a.png").touch()
    try:
        assert [*images_in(str(tmp_path))] == [f"{path}/a.png"]
    finally:  # shutil.rmtree would not get that deep
        os.unlink(f"{path}/a.png")
        while path != str(tmp_path):
            os.rmdir(path)
            path = os.path.dirname(path)


def test_leftovers_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "._a.png", ".thumbnails/a.png", "__MACOSX/._a.png", "@eaDir/a.png", ".DS_Store", "b/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(PHOTOS[0], tmp_path / name)
    assert list(find(str(tmp_path))) == [str(tmp_path / "a.png"), str(tmp_path / "b" / "c.png")]
    assert "left out 4 hidden files or folders: " in caplog.text and "__MACOSX" in caplog.text
    assert list(find(str(tmp_path / "__MACOSX" / "._a.png"))) == [str(tmp_path / "__MACOSX" / "._a.png")], (
        "named itself"
    )


def test_images_at_urls_are_fetched_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(BYTES[0])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving(Proxy) as url:
        monkeypatch.setenv("http_proxy", url)
        assert fetch("http://images.invalid/cat.png") == BYTES[0]
    assert seen == ["http://images.invalid/cat.png"]
