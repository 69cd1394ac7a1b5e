"""Metadata of images: columns of a CSV or Parquet file of the user's, joined to the rows of an index by ``path``."""

from pathlib import Path
from typing import TYPE_CHECKING

from cascade.errors import CascadeError

if TYPE_CHECKING:
    import pyarrow as pa

OWN = ("id", "path", "cluster", "ood", "label")
"""The columns that every index has."""


def read(path: Path) -> "pa.Table":
    """A table with unique values in ``path``, and any columns of text, numbers, booleans, dates or times.

    NaN and infinity, which JSON does not have, become null.

    Raises:
        CascadeError: the file cannot be read, or has other columns.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else pyarrow.csv.read_csv(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise CascadeError(f"{path} cannot be read ({error}): name a .csv or .parquet file") from None
    names = table.column_names
    if "path" not in names or len(set(names)) < len(names):
        raise CascadeError(f"{path} needs a column path, and unique names of columns")
    if own := sorted({*names} & {*OWN} - {"path"}):
        raise CascadeError(f"{path} has a column {own[0]}, as every index has: rename it")
    if pc.count_distinct(table["path"]).as_py() < len(table):
        raise CascadeError(f"{path} has several rows for a path: leave one each")
    columns = {}
    for name in names:
        column, kind = table[name], table[name].type
        if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_dictionary(kind):
            column = column.cast(pa.string())
        elif pa.types.is_floating(kind):
            column = column.cast(pa.float64())
            column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, pa.float64()))
        elif not (pa.types.is_string(kind) or pa.types.is_null(kind)) and not _is_plain(kind):
            raise CascadeError(f"column {name} of {path} has the type {kind}: use text, numbers, booleans or dates")
        columns[name] = column
    return pa.table(columns)


def joined(rows: "pa.Table", metadata: "pa.Table") -> "pa.Table":
    """``rows`` with the columns of ``metadata``; null where it lacks the path.

    Raises:
        CascadeError: no path is in both tables.
    """
    import pyarrow.compute as pc

    places = pc.index_in(rows["path"], value_set=metadata["path"].combine_chunks())
    if places.null_count == len(rows):
        given, wanted = metadata["path"][0], rows["path"][0]
        raise CascadeError(f"no path of the metadata is among the images: it has {given}, where an image is {wanted}")
    for name in metadata.column_names:
        if name != "path":
            rows = rows.append_column(name, metadata[name].take(places))
    return rows


def _is_plain(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    tests = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_date, pa.types.is_timestamp, pa.types.is_time)
    return any(test(kind) for test in tests)
