"""What sources mean, how they are cut into units, and what hostile archives and slow servers may cost."""

import io
import os
import shutil
import tarfile
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import copy
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cascade import sources
from cascade.errors import CascadeError
from cascade.images import ImageError, Limits, decode
from cascade.sources import Unit, again, expand, fetch, plan, read

PHOTOS = sorted((Path(__file__).parents[1] / "data" / "photos").glob("*.png"))
BYTES = [photo.read_bytes() for photo in PHOTOS]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PAUSE", 0.001)


def images(units: list[Unit], limits: Limits = sources.LIMITS) -> dict[str, bytes | str]:
    """Bytes by key, of errors their kind; units are what they are after a way through JSON."""
    found: dict[str, bytes | str] = {}
    for unit in units:
        keys = 0
        for key, load in read(Unit.from_json(unit.to_json()), limits):
            keys += 1
            try:
                value: bytes | str = load()
            except ImageError as error:
                value = error.kind
            assert key not in found
            found[key] = value
        assert unit.count in (None, keys)
    return found


def tar(path: Path, members: dict[str, bytes], **how: Any) -> Path:
    with tarfile.open(path, "w", **how) as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


@contextmanager
def serving(handler: Any) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=partial(server.serve_forever, 0.02))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Quiet(SimpleHTTPRequestHandler):
    """Python's own server, which knows no ranges."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


# Files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "nested" / "deeper").mkdir(parents=True)
    for i, photo in enumerate(PHOTOS):
        copy(photo, (folder, folder / "nested", folder / "nested" / "deeper")[i % 3])
    (folder / "other.gif").write_bytes(b"GIF89a")
    (folder / "broken.png").symlink_to(folder / "gone.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "notes.md").write_text("not searched for")
    return folder


def test_a_folder_is_searched_to_any_depth_and_sorted(folder: Path) -> None:
    found = [Path(name) for name in expand(str(folder))]
    assert len(found) == len(PHOTOS) + 3
    assert found == sorted(found)
    assert folder / "notes.md" not in found and folder / "broken.png" in found and folder / "loop.png" in found


def test_sources_keep_their_order_and_files_stand_for_themselves(folder: Path) -> None:
    named = [folder / "notes.md", folder / "nested", folder / "missing.png", PHOTOS[0]]
    (unit,) = plan(named)
    assert unit.names[0] == str(folder / "notes.md") and unit.count == len(unit.names)
    assert unit.names[-2:] == (str(folder / "missing.png"), str(PHOTOS[0]))
    found = images([unit])
    assert found[str(folder / "missing.png")] == "unreadable" and found[str(PHOTOS[0])] == BYTES[0]


def test_patterns(folder: Path) -> None:
    assert list(expand(f"{folder}/*.gif")) == [str(folder / "other.gif")]
    assert len(list(expand(f"{folder}/**/*-0*.png"))) == len(PHOTOS)
    nested = list(expand(f"{folder}/nest*"))
    assert nested == list(expand(f"{folder}/nested")) and len(nested) == len(set(nested)) > 3


def test_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    odd = tmp_path / "cat[1].png"
    copy(PHOTOS[0], odd)
    assert list(expand(str(odd))) == [str(odd)]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    real, top = tmp_path / "real", tmp_path / "top"
    real.mkdir()
    copy(PHOTOS[0], real / "a.png")
    top.mkdir()
    (top / "link").symlink_to(real)
    (real / "up").symlink_to(real)  # a cycle
    assert list(expand(str(top))) == [str(top / "link" / "a.png")]


def test_a_folder_that_cannot_be_listed_is_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def denied(path: str) -> Any:
        if Path(path).name == "deeper":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)  # chmod does not stop root
    found = images(list(plan([folder / "nested"])))
    assert [Path(key).name for key, value in found.items() if value == "unreadable"] == ["deeper"]


@pytest.mark.parametrize("source", ["nothing", "nothing/*.png", "nothing/x/**", "empty.txt"])
def test_no_images_says_what_to_do(tmp_path: Path, source: str) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "notes.md").write_text("no image")
    (tmp_path / "empty.txt").write_text("# nothing yet\n\n")
    with pytest.raises(CascadeError, match=r"(nothing|empty).* has no images: name image files"):
        list(plan([PHOTOS[0], tmp_path / source]))
    with pytest.raises(CascadeError, match="give files, folders or patterns"):
        list(plan([]))


def test_units_are_of_bounded_size_and_names_survive(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9 \n.png"))
    copy(PHOTOS[0], odd)
    units = list(plan([*PHOTOS, odd], rows=4))
    assert [unit.count for unit in units] == [4, 4, 3]
    assert images(units)[str(odd)] == BYTES[0]
    assert all("\n" not in unit.to_json() for unit in units)


def test_lists_name_anything_but_lists(tmp_path: Path, folder: Path) -> None:
    shard = tar(tmp_path / "shard.tar", {"x.png": BYTES[2]})
    (tmp_path / "list.txt").write_text(
        f"# ours\n{PHOTOS[0]}\n\n  {folder}/nested/deeper \n{shard}\n{tmp_path}/list.txt\n"
    )
    found = images(list(plan([tmp_path / "list.txt"])))
    assert list(found)[0] == str(PHOTOS[0]) and found[f"{shard}#x.png"] == BYTES[2]
    assert list(found)[-1] == f"{tmp_path}/list.txt" and len(found) == 3 + len(list(expand(f"{folder}/nested/deeper")))
    (tmp_path / "long.txt").write_text("x" * 9000)
    with pytest.raises(CascadeError, match="long.txt, line 1: longer than 8192 bytes"):
        list(plan([tmp_path / "long.txt"]))
    with pytest.raises(CascadeError, match="gone.txt can't be read .* one source a line"):
        list(plan([tmp_path / "gone.txt"]))


# Tar


@pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_are_cut_by_their_headers(tmp_path: Path, how: int) -> None:
    """As webdataset writes them, with long names and what is no image between."""
    long = "d/" * 40 + "e" * 30 if how == tarfile.USTAR_FORMAT else "é" * 150
    members = {"0.json": b"{}"} | {f"{long}{i}.png": data for i, data in enumerate(BYTES)} | {"9.cls": b"3"}
    shard = tar(tmp_path / "shard.tar", members, format=how)
    units = list(plan([shard], rows=4))
    assert [unit.count for unit in units] == [4, 4, 2] and units[1].start > 0
    assert images(units) == {f"{shard}#{name}": data for name, data in members.items() if name.endswith(".png")}


def test_members_are_only_read(tmp_path: Path) -> None:
    """Names that lead elsewhere, links, devices and sparse files: none is followed, each is a row."""
    with tarfile.open(tmp_path / "bad.tar", "w") as file:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("dev.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
        for name in ("../../escape.png", "/etc/root.png"):
            info = tarfile.TarInfo(name)
            info.size = len(BYTES[0])
            file.addfile(info, io.BytesIO(BYTES[0]))
    before = sorted(tmp_path.rglob("*"))
    found = images(list(plan([tmp_path / "bad.tar"])))
    assert list(found.values()) == ["unreadable"] * 3 + [BYTES[0]] * 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_member_without_end_costs_nothing(tmp_path: Path) -> None:
    """64 GiB that are a hole on the disk: as an image, and as an extended header that would have to be read."""
    image, header = tarfile.TarInfo("huge.png"), tarfile.TarInfo("long")
    image.size = header.size = 64 * 2**30
    header.type = tarfile.XHDTYPE
    for info, name in ((image, "image.tar"), (header, "header.tar")):
        with (tmp_path / name).open("wb") as file:
            small = tarfile.TarInfo("first.png")
            small.size = len(BYTES[0])
            file.write(small.tobuf() + BYTES[0].ljust(-(-len(BYTES[0]) // 512) * 512, b"\0"))
            file.write(info.tobuf(tarfile.GNU_FORMAT))
            file.truncate(file.tell() + 64 * 2**30 + 1024)
    tracemalloc.start()
    found = images(list(plan([tmp_path / "image.tar", tmp_path / "header.tar"])))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(found.values()) == [BYTES[0], "too_large", BYTES[0], "unreadable"]
    assert peak < 8 * 2**20


def test_what_was_lost_of_a_shard_is_a_row(tmp_path: Path) -> None:
    whole = tar(tmp_path / "whole.tar", {f"{i}.png": data for i, data in enumerate(BYTES[:4])}).read_bytes()
    starts = [whole.index(f"{i}.png".encode()) for i in range(4)]
    for name, data, good in (
        ("cut.tar", whole[: starts[2] + 600], 2),
        ("header.tar", whole[: starts[2]] + b"\xff" * 512 + whole[starts[2] + 512 :], 2),
        ("half.tar", whole[: starts[3] + 100], 3),
    ):
        (tmp_path / name).write_bytes(data)
        found = images(list(plan([tmp_path / name], rows=2)))
        assert list(found.values())[:good] == BYTES[:good]
        assert list(found.values())[-1] == "unreadable" and list(found)[-1] == f"{tmp_path / name}#"
    (tmp_path / "none.tar").write_bytes(BYTES[0])
    for name, text in (("none.tar", "is no tar file"), ("gone.tar", "can't be read"), ("a.tar.gz", "is compressed")):
        with pytest.raises(CascadeError, match=text):
            list(plan([tmp_path / name]))


# Parquet


@pytest.mark.parametrize("kind", ["struct", "image", "only"])
def test_parquet_by_row_groups(tmp_path: Path, kind: str) -> None:
    """As Hugging Face's datasets writes images, and with plain bytes."""
    column: list[Any] = [{"bytes": data, "path": None} for data in BYTES] if kind == "struct" else list(BYTES)
    names = {"struct": "image", "image": "image", "only": "content"}[kind]
    table = pa.table({"label": list(range(10)), names: column})
    pq.write_table(table, path := tmp_path / "images.parquet", row_group_size=3)
    units = list(plan([path], rows=5))
    assert [(unit.start, unit.stop, unit.row, unit.count) for unit in units] == [(0, 2, 0, 6), (2, 4, 6, 4)]
    assert images(units) == {f"{path}#{row}": data for row, data in enumerate(BYTES)}


def test_parquet_rows_without_an_image(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [BYTES[0], None, b""]}), path := tmp_path / "images.parquet")
    found = images(list(plan([path])))
    assert list(found.values()) == [BYTES[0], b"", b""]
    with pytest.raises(ImageError, match="zero bytes"):
        decode(b"")


def test_parquet_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.parquet").write_text("PAR1 or so")
    pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    pq.write_table(pa.table({"a": ["x"]}), tmp_path / "words.parquet")
    pq.write_table(pa.table({"image": BYTES}), tmp_path / "big.parquet")
    monkeypatch.setattr(sources, "GROUP", 100)
    for name, text in (
        ("text", "can't be read as Parquet"),
        ("gone", "can't be read as Parquet"),
        ("two", "has 2 columns of bytes: call the one with the images 'image'"),
        ("words", "has 0 columns of bytes"),
        ("big", "row group 0 has .* bytes of images"),
    ):
        with pytest.raises(CascadeError, match=text):
            list(plan([tmp_path / f"{name}.parquet"]))


def test_parquet_that_is_damaged_later_keeps_its_rows(tmp_path: Path) -> None:
    table = pa.table({"image": BYTES})
    pq.write_table(table, path := tmp_path / "images.parquet", row_group_size=5, compression="none")
    units = list(plan([path], rows=5))
    path.write_bytes(path.read_bytes()[: 3 * len(BYTES[0])])
    assert list(images(units).values()) == ["unreadable"] * 10


# Elsewhere


@pytest.fixture
def memory() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as file:
        for i, data in enumerate(BYTES[:3]):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    table = io.BytesIO()
    pq.write_table(pa.table({"image": BYTES[:4]}), table, row_group_size=2)
    fs.pipe({"/m/a/0.png": BYTES[0], "/m/a/b/1.png": BYTES[1], "/m/a/notes.md": b"x", "/m/s.tar": shard.getvalue()})
    fs.pipe({"/m/t.parquet": table.getvalue(), "/m/list.txt": b"memory://m/a/0.png\nmemory://m/none.png\n"})
    yield "memory://m"
    fs.rm("/m", recursive=True)


def test_every_kind_at_a_url(memory: str) -> None:
    units = list(plan([f"{memory}/a/", f"{memory}/*.tar", f"{memory}/t.parquet", f"{memory}/list.txt"], rows=2))
    assert [unit.count for unit in units] == [2, None, 2, 2, 2]
    found: list[tuple[str, bytes | str]] = [pair for unit in units for pair in images([unit]).items()]
    assert [value for _, value in found] == [*BYTES[:2], *BYTES[:3], *BYTES[:4], BYTES[0], "unreadable"]
    assert found[0][0] == "memory:///m/a/0.png" and found[2][0] == "memory:///m/s.tar#0.png"
    with pytest.raises(CascadeError, match="holds a password"):
        list(plan(["ftp://me:secret@host/x.png"]))
    with pytest.raises(CascadeError, match="can't be listed"):
        list(plan(["nowhere://x/"]))


def test_over_http(tmp_path: Path) -> None:
    """A server without ranges: files, a shard in one stream, a list of both."""
    shutil.copy(PHOTOS[0], tmp_path / "a b.png")
    tar(tmp_path / "s.tar", {"big.bin": bytes(2 * 2**20)} | {f"{i}.png": data for i, data in enumerate(BYTES)})
    with serving(partial(Quiet, directory=str(tmp_path))) as url:
        (tmp_path / "list.txt").write_text(f"{url}/a%20b.png?signed=x\n{url}/gone.png\n{url}/s.tar\n{url}/none.tar\n")
        found = images(list(plan([f"{url}/list.txt"])))
        assert list(found.values()) == [BYTES[0], "unreadable", *BYTES, "unreadable"]
        with pytest.raises(ImageError, match="the limit is"):
            decode(fetch(f"{url}/s.tar", small := Limits(max_bytes=1000)), small)
        assert len(fetch(f"{url}/s.tar", small)) == 1001


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
    monkeypatch.setattr(sources, "SILENCE", 0.2)
    Bad.failures, silence = 2, threading.Event()
    monkeypatch.setattr(ThreadingHTTPServer, "silence", silence, raising=False)
    with serving(Bad) as url:
        try:
            assert fetch(f"{url}/flaky.png") == BYTES[0] and Bad.failures == 0
            assert len(fetch(f"{url}/endless.png", Limits(max_bytes=2**18))) == 2**18 + 1
            with pytest.raises(ImageError, match="Timeout"):
                fetch(f"{url}/silent.png")
        finally:
            silence.set()


# Once more


def test_images_are_found_again_by_their_keys(tmp_path: Path, memory: str) -> None:
    shard = tar(tmp_path / "shard.tar", {f"{i}.png": data for i, data in enumerate(BYTES)})
    pq.write_table(pa.table({"image": BYTES}), table := tmp_path / "t.parquet", row_group_size=3)
    wanted = {
        f"{shard}#7.png": BYTES[7],
        f"{table}#4": BYTES[4],
        str(PHOTOS[1]): BYTES[1],
        f"{memory}/a/0.png": BYTES[0],
    }
    gone = [f"{shard}#x.png", f"{table}#99", f"{table}#x", f"{tmp_path}/no.tar#1.png"]
    assert {key: load() for key, load in again([*gone, *wanted, *wanted])} == wanted
