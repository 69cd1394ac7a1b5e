"""How tar shards are split and read, and what hostile ones may cost."""

import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from cascade.errors import CascadeError
from cascade.offline.sources import plan
from tests.helpers.photos import BYTES, images, tar


@pytest.mark.parametrize("how", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_are_cut_by_their_headers(tmp_path: Path, how: int) -> None:
    """As webdataset writes them, with long names and what is no image between."""
    long = "d/" * 40 + "e" * 30 if how == tarfile.USTAR_FORMAT else "é" * 150
    members = {"0.json": b"{}"} | {f"{long}{i}.png": data for i, data in enumerate(BYTES)} | {"9.cls": b"3"}
    shard = tmp_path / "shard.tar"
    shard.write_bytes(tar(members, how))
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
    whole = tar({f"{i}.png": data for i, data in enumerate(BYTES[:4])})
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
    for name, text in (("none.tar", "is not a tar file"), ("gone.tar", "can't be read"), ("a.tar.gz", "is compressed")):
        with pytest.raises(CascadeError, match=text):
            list(plan([tmp_path / name]))


def header(name: str, size: int) -> bytes:
    """A tar header that gives any size, negative ones too."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    block[148:156] = b" " * 8
    block[148:156] = (f"{sum(block):06o}\0 ").encode()
    return bytes(block)


@pytest.mark.parametrize("size", [-1, -512, -(2**40)])
def test_a_member_of_negative_size_is_one_image_that_cannot_be_loaded(tmp_path: Path, size: int) -> None:
    good = tar({"a.png": BYTES[0]})
    good = good[: 512 + -(-len(BYTES[0]) // 512) * 512]
    with (shard := tmp_path / "s.tar").open("wb") as file:
        file.write(good + header("b.png", size) + bytes(1024))
        file.truncate(2 * 2**30)  # a hole on the disk
    assert list(images(list(plan([shard]))).values()) == [BYTES[0], "unreadable"]


def test_leftovers_in_a_shard_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = tmp_path / "s.tar"
    shard.write_bytes(
        tar({"./._a.png": b"fork", "./a.png": BYTES[0], "__MACOSX/._a.png": b"fork", "../b.png": BYTES[1]})
    )
    assert list(images(list(plan([shard])))) == [f"{shard}#./a.png", f"{shard}#../b.png"]
    assert "left out 2 hidden files or folders: ./._a.png" in caplog.text
