"""A job's folder: what is begun there, refused, replaced, and written in pieces."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cascade.engine.engine import Engine
from cascade.engine.results import Options
from cascade.errors import CascadeError
from cascade.offline import job
from cascade.offline.predict import predict_files
from tests.helpers.photos import PHOTOS


def test_rows_stream_out_in_groups(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "ROW_GROUP", 4)
    predict_files(engine, PHOTOS, tmp_path / "out.parquet", batch=2)
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [4, 4, 2]


def test_other_settings_are_refused(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict_files(engine, PHOTOS[:2], out)
    for sources, settings in (
        (PHOTOS[:3], {}),
        (PHOTOS[:2], {"embedding": "float32"}),
        (PHOTOS[:2], {"rows": 7}),
        (PHOTOS[:2], {"options": Options(mode="dispatcher")}),
        (PHOTOS[:2], {"options": Options(labels=1)}),
    ):
        with pytest.raises(CascadeError, match="was begun with .*give the same options, or name another folder"):
            predict_files(engine, sources, out, **settings)


def test_a_folder_in_use_and_one_of_other_files(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def second(done: int, total: int | None) -> None:
        with pytest.raises(CascadeError, match="is being written by another process"):
            predict_files(engine, PHOTOS[:2], out)

    predict_files(engine, PHOTOS[:2], out, progress=second)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(CascadeError, match="holds thesis.tex but no job"):
        predict_files(engine, PHOTOS[:2], tmp_path / "mine")


def test_the_file_replaces_an_older_one(engine: Engine, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    out.write_text("of last week")
    predict_files(engine, PHOTOS[:1], out)
    assert pq.read_table(out).num_rows == 1 and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("out", ["folder.parquet", "file", "missing/out.parquet", "missing/out"])
def test_out_must_lie_in_a_folder(engine: Engine, tmp_path: Path, out: str) -> None:
    (tmp_path / "folder.parquet").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CascadeError, match="name a folder, or a .parquet file, in a folder that exists"):
        predict_files(engine, PHOTOS, tmp_path / out)
