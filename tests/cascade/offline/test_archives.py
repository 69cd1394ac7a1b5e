"""How shards and Parquet files are cut and read, and what hostile ones may cost."""

import io
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cascade.errors import CascadeError
from cascade.model.preprocessing import ImageError, decode
from cascade.offline import archives
from cascade.offline.sources import plan
from tests.helpers.photos import BYTES, images, tar

# Tar


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
    monkeypatch.setattr(archives, "GROUP", 100)
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
