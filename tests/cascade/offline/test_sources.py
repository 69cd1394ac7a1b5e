"""What sources mean, here and elsewhere, how they are cut into units, and how images are found again."""

import codecs
import os
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from shutil import copy
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cascade.errors import CascadeError
from cascade.model.decoding import ImageError, Limits, decode
from cascade.offline.files import fetch
from cascade.offline.sources import again, expand, plan
from tests.helpers.photos import BYTES, PHOTOS, images, serving, tar


def test_sources_keep_their_order_and_files_stand_for_themselves(folder: Path) -> None:
    named = [folder / "notes.md", folder / "nested", folder / "missing.png", PHOTOS[0]]
    (unit,) = plan(named)
    assert unit.names[0] == str(folder / "notes.md") and unit.count == len(unit.names)
    assert unit.names[-2:] == (str(folder / "missing.png"), str(PHOTOS[0]))
    found = images([unit])
    assert found[str(folder / "missing.png")] == "unreadable" and found[str(PHOTOS[0])] == BYTES[0]


@pytest.mark.parametrize("source", ["nothing", "nothing/*.png", "nothing/x/**", "empty.txt"])
def test_no_images_says_what_to_do(tmp_path: Path, source: str) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "notes.md").write_text("no image")
    (tmp_path / "empty.txt").write_text("# nothing yet\n\n")
    with pytest.raises(CascadeError, match=r"(nothing|empty).* has no images: name image files"):
        list(plan([PHOTOS[0], tmp_path / source]))
    with pytest.raises(CascadeError, match="give files, folders or patterns"):
        list(plan([]))


@pytest.mark.parametrize("name", ["fotos", "fotos/", "photos.old", ""])
def test_a_slip_in_a_folders_name_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CascadeError, match=f"{name} does not exist: name images, folders"):
        list(plan([name]))
    (tmp_path / "list.txt").write_text("fotos\n")
    assert images(plan(["list.txt"])) == {"fotos": "unreadable"}, "a long list goes on"


def test_units_are_of_bounded_size_and_names_survive(tmp_path: Path) -> None:
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9 \n.png"))
    copy(PHOTOS[0], odd)
    units = list(plan([*PHOTOS, odd], rows=4))
    assert [unit.count for unit in units] == [4, 4, 3]
    assert images(units)[str(odd)] == BYTES[0]
    assert all("\n" not in unit.to_json() for unit in units)


def test_lists_name_anything_but_lists(tmp_path: Path, folder: Path) -> None:
    shard = tmp_path / "shard.tar"
    shard.write_bytes(tar({"x.png": BYTES[2]}))
    (tmp_path / "list.txt").write_text(
        f"# ours\n{PHOTOS[0]}\n\n  {folder}/nested/deeper \n{shard}\n{tmp_path}/list.txt\n"
    )
    found = images(list(plan([tmp_path / "list.txt"])))
    assert list(found)[0] == str(PHOTOS[0]) and found[f"{shard}#x.png"] == BYTES[2]
    assert list(found)[-1] == f"{tmp_path}/list.txt" and len(found) == 3 + len(list(expand(f"{folder}/nested/deeper")))
    (tmp_path / "long.txt").write_text("x" * 9000)
    with pytest.raises(CascadeError, match="long.txt, line 1: longer than 8192 bytes"):
        list(plan([tmp_path / "long.txt"]))
    with pytest.raises(CascadeError, match="gone.txt cannot be read .* one source a line"):
        list(plan([tmp_path / "gone.txt"]))


@pytest.fixture
def memory() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    shard = tar({f"{i}.png": data for i, data in enumerate(BYTES[:3])})
    fs.pipe({"/m/a/0.png": BYTES[0], "/m/a/b/1.png": BYTES[1], "/m/a/notes.md": b"x", "/m/s.tar": shard})
    fs.pipe({"/m/list.txt": b"memory://m/a/0.png\nmemory://m/none.png\n"})
    yield "memory://m"
    fs.rm("/m", recursive=True)


def test_every_kind_at_a_url(memory: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": BYTES[:4]}), tmp_path / "t.parquet", row_group_size=2)
    units = list(
        plan([f"{memory}/a/", f"{memory}/*.tar", f"file://{tmp_path}/t.parquet", f"{memory}/list.txt"], rows=2)
    )
    assert [unit.count for unit in units] == [2, None, 2, 2, 2]
    found: list[tuple[str, bytes | str]] = [pair for unit in units for pair in images([unit]).items()]
    assert [value for _, value in found] == [*BYTES[:2], *BYTES[:3], *BYTES[:4], BYTES[0], "unreadable"]
    assert found[0][0] == "memory:///m/a/0.png" and found[2][0] == "memory:///m/s.tar#0.png"
    with pytest.raises(CascadeError, match="contains a password"):
        list(plan(["ftp://me:secret@host/x.png"]))
    with pytest.raises(CascadeError, match="cannot be listed"):
        list(plan(["nowhere://x/"]))


class Quiet(SimpleHTTPRequestHandler):
    """Python's own server, which knows no ranges."""

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_over_http(tmp_path: Path) -> None:
    """A server without ranges: files, a shard in one stream, a list of both."""
    copy(PHOTOS[0], tmp_path / "a b.png")
    members = {"big.bin": bytes(2 * 2**20)} | {f"{i}.png": data for i, data in enumerate(BYTES)}
    (tmp_path / "s.tar").write_bytes(tar(members))
    with serving(partial(Quiet, directory=str(tmp_path))) as url:
        (tmp_path / "list.txt").write_text(f"{url}/a%20b.png?signed=x\n{url}/gone.png\n{url}/s.tar\n{url}/none.tar\n")
        found = images(list(plan([f"{url}/list.txt"])))
        assert list(found.values()) == [BYTES[0], "unreadable", *BYTES, "unreadable"]
        with pytest.raises(ImageError, match="the limit is"):
            decode(fetch(f"{url}/s.tar", small := Limits(max_bytes=1000)), small)
        assert len(fetch(f"{url}/s.tar", small)) == 1001


def test_images_are_found_again_by_their_keys(tmp_path: Path, memory: str) -> None:
    shard = tmp_path / "shard.tar"
    shard.write_bytes(tar({f"{i}.png": data for i, data in enumerate(BYTES)}))
    pq.write_table(pa.table({"image": BYTES}), table := tmp_path / "t.parquet", row_group_size=3)
    wanted = {
        f"{shard}#7.png": BYTES[7],
        f"{table}#4": BYTES[4],
        str(PHOTOS[1]): BYTES[1],
        f"{memory}/a/0.png": BYTES[0],
    }
    gone = [f"{shard}#x.png", f"{table}#99", f"{table}#x", f"{tmp_path}/no.tar#1.png"]
    assert {key: load() for key, load in again([*gone, *wanted, *wanted])} == wanted


def test_a_list_holds_names_and_no_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy(PHOTOS[0], tmp_path / "img1.png")
    lines = [
        f"{tmp_path}/img[1].png",
        f"{tmp_path}/what?.png",
        f"{tmp_path}/*.png",
        "http://images.invalid/b.png?crop=10*20",
    ]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert list(expand(str(tmp_path / "list.txt"))) == lines


def test_lists_as_windows_writes_them(tmp_path: Path) -> None:
    lines = f"{PHOTOS[0]}\r\n{PHOTOS[1]}\r\n"
    (tmp_path / "bom.txt").write_bytes(codecs.BOM_UTF8 + lines.encode())
    assert list(images(plan([tmp_path / "bom.txt"])).values()) == BYTES[:2]
    (tmp_path / "utf16.txt").write_bytes(lines.encode("utf-16"))
    with pytest.raises(CascadeError, match="utf16.txt is UTF-16: save it as UTF-8"):
        list(plan([tmp_path / "utf16.txt"]))
    (tmp_path / "nul.txt").write_bytes(f"{PHOTOS[0]}\nx\0.png\n".encode())
    assert list(images(plan([tmp_path / "nul.txt"])).values()) == [BYTES[0], "unreadable"]
