"""How Parquet files are split and read, and that a damaged one costs its own rows only."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cascade.errors import CascadeError
from cascade.model.decoding import ImageError, decode
from cascade.offline import parquet_files
from cascade.offline.sources import plan
from tests.helpers.paths import DATA
from tests.helpers.photos import BYTES, images


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
    monkeypatch.setattr(parquet_files, "GROUP", 100)
    for name, text in (
        ("text", "cannot be read as Parquet"),
        ("gone", "cannot be read as Parquet"),
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


def test_a_file_on_which_arrow_aborts_costs_its_own_rows(tmp_path: Path) -> None:
    """Arrow calls terminate() on this mutated file, which would end the whole job."""
    found = images(list(plan([DATA / "abort.parquet", DATA / "photos"])))
    assert "unreadable" in found.values() and BYTES[0] in found.values()


def test_a_footer_that_promises_too_many_rows_is_refused(tmp_path: Path) -> None:
    rows, path = 777, tmp_path / "rows.parquet"
    table = pa.table({"image": pa.array([b"x"] * rows, pa.binary())})
    pq.write_table(table, path, compression="none", store_schema=False)
    raw = path.read_bytes()
    length = int.from_bytes(raw[-8:-4], "little")
    footer = raw[-8 - length : -8].replace(b"\x16" + varint(rows), b"\x16" + varint(2**40))
    path.write_bytes(raw[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(CascadeError, match="row group 0 claims 1099511627776 rows: it is damaged"):
        list(plan([path]))


def varint(number: int) -> bytes:
    """Thrift's encoding of an integer, zigzag."""
    number, out = number << 1, b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])
