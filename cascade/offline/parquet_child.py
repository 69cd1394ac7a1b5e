"""The child process that reads Parquet files for ``cascade.offline.parquet_files``; prints to stdout.

parquet_child groups FILE                    JSON: rows and bytes of images of each row group, or an error
parquet_child read FILE START STOP MOST      for each image its length, 8 bytes, and its first MOST bytes
"""

import json
import os
import sys
from typing import IO, TYPE_CHECKING, Any

from cascade.errors import brief
from cascade.offline.files import open_file
from cascade.offline.parquet_files import LENGTH

if TYPE_CHECKING:
    import pyarrow as pa

NAMES = ("image", "img", "bytes", "jpg", "jpeg", "png", "webp")  # of the image column, in order of preference
BATCH = 32  # rows in memory


def groups(where: str) -> dict[str, Any]:
    """Rows and uncompressed bytes of images of each row group, and the size of the file."""
    import pyarrow.parquet as pq

    with open_file(where) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        with pq.ParquetFile(file) as parquet:
            columns = image_columns(parquet.schema_arrow)
            if len(columns) != 1:
                return {"error": f"has {len(columns)} columns of bytes: call the one with the images 'image'"}
            metadata = parquet.metadata
            rows = []
            for group in map(metadata.row_group, range(metadata.num_row_groups)):
                chunks = [group.column(i) for i in range(group.num_columns)]
                images = [c.total_uncompressed_size for c in chunks if c.path_in_schema == columns[0]]
                rows.append((group.num_rows, sum(images)))
            return {"groups": rows, "bytes": size}


def read(where: str, start: int, stop: int, most: int, out: IO[bytes]) -> None:
    """Write the images of row groups ``start`` to ``stop`` to ``out``; null becomes zero bytes."""
    import pyarrow.parquet as pq

    with open_file(where) as file, pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as parquet:
        (name,) = image_columns(parquet.schema_arrow)
        row_groups = list(range(start, stop))
        for batch in parquet.iter_batches(BATCH, row_groups=row_groups, columns=[name], use_threads=False):
            column = batch.column(0)
            for value in column.field("bytes") if name.endswith(".bytes") else column:
                data = (value.as_py() or b"")[:most]
                out.write(LENGTH.pack(len(data)))
                out.write(data)
    out.flush()


def image_columns(schema: "pa.Schema") -> list[str]:
    """The image column: the first one of NAMES, or else all columns of bytes; for a struct, its field ``bytes``."""
    import pyarrow as pa

    def binary(kind: "pa.DataType") -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def path(field: "pa.Field") -> str | None:
        if binary(field.type):
            return str(field.name)
        index = field.type.get_field_index("bytes") if pa.types.is_struct(field.type) else -1
        return f"{field.name}.bytes" if index >= 0 and binary(field.type.field(index).type) else None

    paths = {field.name: name for field in schema if (name := path(field))}
    named = next((paths[name] for name in NAMES if name in paths), None)
    return [named] if named else list(paths.values())


if __name__ == "__main__":
    try:
        match sys.argv[1:]:
            case ["groups", where]:
                print(json.dumps(groups(where)))
            case ["read", where, start, stop, most]:
                read(where, int(start), int(stop), int(most), sys.stdout.buffer)
    except Exception as error:  # a foreign file makes Arrow raise many types; the parent prints the line
        sys.exit(brief(error))
