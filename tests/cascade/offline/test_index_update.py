"""A living index: rows come and go without a rebuild, ids are never reused, and SIGKILL changes nothing."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

import cascade
from cascade.bundle.format import write
from cascade.cli.main import app
from cascade.engine.engine import Engine
from cascade.engine.results import Options
from cascade.errors import CascadeError
from cascade.offline.index import Kind, add, add_images, build, memory, read, remove, search
from cascade.offline.index.files import changing
from cascade.offline.index.live import LiveIndex
from cascade.offline.index.memory import unit
from cascade.offline.index.where import matching
from cascade.offline.predict import predict_files
from tests.helpers.bundles import handmade
from tests.helpers.paths import ROOT

KINDS: tuple[Kind, ...] = ("flat", "ivf", "hnsw")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, cifar: list[Image.Image]) -> Path:
    return write(handmade(cifar[:40]), tmp_path_factory.mktemp("store") / "hand" / "1")


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return cascade.load(bundle)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, cifar: list[Image.Image]) -> Path:
    """old/000.png to old/079.png, new/080.png to new/119.png."""
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(cifar[:120]):
        (folder / ("old" if i < 80 else "new")).mkdir(exist_ok=True)
        image.save(folder / ("old" if i < 80 else "new") / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def predicted(engine: Engine, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("predicted")
    for name in ("old", "new"):
        predict_files(engine, [photos / name], out / name, embedding="float32")
    return {name: out / name for name in ("old", "new")}


@pytest.fixture
def folder(predicted: dict[str, Path], tmp_path: Path) -> Path:
    """An index over old/."""
    build(predicted["old"], tmp_path / "index")
    return tmp_path / "index"


def embeddings(*predictions: Path) -> dict[str, np.ndarray]:
    """By the name of the image."""
    rows = [row for out in predictions for row in pq.read_table(out).to_pylist()]
    return dict(zip((Path(r["path"]).name for r in rows), unit(np.array([r["embedding"] for r in rows])), strict=True))


def paths(folder: Path) -> dict[int, str]:
    """Names of images by id."""
    rows = read(folder).rows
    return {i: Path(path).name for i, path in zip(rows["id"].to_pylist(), rows["path"].to_pylist(), strict=True)}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result.stdout


def table(path: Path, rows: list[dict[str, object]]) -> Path:
    """A CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def prices(photos: Path, tmp_path: Path) -> Path:
    """Metadata of every second image, and of one that does not exist."""
    rows: list[dict[str, object]] = [
        {"path": path, "price": i / 2 if i != 4 else "nan", "stock": i, "name": f"a {'cat' if i % 4 else 'dog'}, {i}"}
        for i, path in enumerate(sorted(photos.rglob("*.png"), key=lambda path: path.name))
        if i % 2 == 0
    ]
    return table(tmp_path / "prices.csv", [*rows, {"path": "none.png", "price": 0, "stock": 1, "name": ""}])


# Add and remove


@pytest.mark.parametrize("kind", KINDS)
def test_after_updates_every_kind_finds_what_a_product_finds(
    predicted: dict[str, Path], tmp_path: Path, kind: Kind
) -> None:
    build(predicted["old"], folder := tmp_path / "index", kind)
    change = remove(folder, [3, 70, 71])
    assert (change.added, change.removed, change.about.rows) == (0, 3, 77)
    change = add(folder, predicted["new"])
    assert (change.added, change.removed, change.about.rows, change.about.next_id) == (40, 0, 117, 120)
    assert remove(folder, [79, 80]).about.rows == 115
    index, vectors = read(folder), embeddings(*predicted.values())
    if kind == "ivf":
        index.vectors.nprobe = index.vectors.nlist
    want = {i: f"{i:03d}.png" for i in range(120) if i not in (3, 70, 71, 79, 80)}
    assert paths(folder) == want
    x = np.stack([vectors[name] for name in want.values()])
    similarities, ids = index.nearest(x, 5)
    np.testing.assert_allclose(similarities, np.sort(x @ x.T)[:, :-6:-1], atol=1e-5)
    np.testing.assert_array_equal(ids[:, 0], index.ids)
    np.testing.assert_allclose(np.concatenate([block for _, block in index.chunks(50)]), x, atol=1e-6)
    if kind != "hnsw":  # where a removed vector is gone at once
        assert index.vectors.ntotal == 115


def test_a_graph_with_many_dead_vectors_is_built_again(predicted: dict[str, Path], tmp_path: Path) -> None:
    build(predicted["old"], folder := tmp_path / "index", "hnsw")
    remove(folder, range(10))
    assert read(folder).vectors.ntotal == 80
    remove(folder, range(10, 20))
    assert read(folder).vectors.ntotal == 60 == read(folder).about.rows
    add(folder, predicted["new"])
    index, vectors = read(folder), embeddings(*predicted.values())
    assert [index.nearest(vectors[f"{i:03d}.png"][None], 1)[1].item() for i in (20, 79, 80, 119)] == [20, 79, 80, 119]


def test_ids_are_never_reused(folder: Path, predicted: dict[str, Path]) -> None:
    add(folder, predicted["new"])
    remove(folder, range(80, 120))
    again = add(folder, predicted["new"])
    assert (again.added, again.removed, again.about.next_id) == (40, 0, 160)
    assert [*paths(folder)] == [*range(80), *range(120, 160)]
    twice = add(folder, predicted["new"])  # as after a kill: no row is there twice
    assert (twice.added, twice.removed, twice.about.rows) == (40, 40, 120)
    assert [*paths(folder)] == [*range(80), *range(160, 200)]


def test_images_are_added_by_the_bundle_of_the_index(folder: Path, engine: Engine, photos: Path) -> None:
    change = add_images(folder, engine, [photos / "new" / "090.png", photos / "new" / "091.png"])
    assert (change.added, change.about.rows) == (2, 82) and [*paths(folder)][-2:] == [80, 81]
    (found,) = search(read(folder), engine, [photos / "new" / "091.png"], 1)
    assert (found[0]["id"], Path(found[0]["path"]).name) == (81, "091.png")
    assert files(folder) == ["index-2.faiss", "index.json", "rows-2.parquet"]


def test_what_can_not_be_changed(
    folder: Path, predicted: dict[str, Path], engine: Engine, photos: Path, cifar: list[Image.Image], tmp_path: Path
) -> None:

    predict_files(engine, [photos / "new" / "080.png"], other := tmp_path / "o", Options(mode="dispatcher"))
    predict_files(
        engine, [photos / "new" / "080.png"], mode := tmp_path / "m", Options(mode="dispatcher"), embedding="float16"
    )
    stranger = Engine()
    stranger.add(handmade(cifar[:40], seed=1))
    before = files(folder), (folder / "index.json").read_text()
    with changing(folder), pytest.raises(CascadeError, match="is being changed by another process"):
        remove(folder, [1])
    for text, act in (
        ("has no row with the id 80: nothing was removed", lambda: remove(folder, [1, 80])),
        ("these are all rows", lambda: remove(folder, where=["id>=0"])),
        ("has no embeddings of ours", lambda: add(folder, other)),
        ("was made by another bundle or mode", lambda: add(folder, mode)),
        ("made with another bundle called hand/1", lambda: add_images(folder, stranger, [photos])),
        ("is no index", lambda: add(tmp_path, predicted["new"])),
        ("name a new folder, or add to it", lambda: build(predicted["old"], folder)),
    ):
        with pytest.raises(CascadeError, match=text):
            act()
    assert (files(folder), (folder / "index.json").read_text()) == before
    assert remove(folder, where=["id<0"]).removed == 0


def test_an_index_of_an_older_format_is_refused(folder: Path) -> None:
    card = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(card | {"format": 1}))
    with pytest.raises(CascadeError, match="has a format that this version does not know: build the index again"):
        read(folder)


# Metadata and conditions


def test_metadata_is_in_answers_and_filters(
    predicted: dict[str, Path], prices: Path, engine: Engine, photos: Path, tmp_path: Path
) -> None:
    build(predicted["old"], folder := tmp_path / "index", metadata=prices)
    add(folder, predicted["new"], prices)
    index = read(folder)
    (found,) = search(index, engine, [photos / "new" / "090.png"], 1)
    assert found[0]["metadata"] == {"price": 45.0, "stock": 90, "name": "a cat, 90"} and found[0]["id"] == 90
    assert set(found[0]) == {"id", "path", "cluster", "ood", "label", "similarity", "metadata"}
    for where, want in (
        (["price<3"], [0, 2]),  # 4 has no price
        (["price <= 3", "stock!=2"], [0, 6]),
        (["name=a dog, 8"], [8]),
        (["name~dog", "stock>=100"], [100, 104, 108, 112, 116]),
        (["path~/new/", "stock > 115"], [116, 118]),
        (["id=7"], [7]),
        (["stock=1"], []),
    ):
        assert matching(index.rows, where).tolist() == want, where
    (found,) = search(index, engine, [photos / "new" / "090.png"], 99, index.matching(["name~dog"]))
    assert {each["id"] for each in found} == {*range(0, 120, 4)} - {4} | {4}
    assert search(index, engine, [photos / "new" / "090.png"], 5, index.matching(["stock=1"])) == [[]]


@pytest.mark.parametrize("kind", KINDS)
def test_wide_filters_are_searched_by_faiss(
    predicted: dict[str, Path], tmp_path: Path, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compared row by row if few rows fit is the same."""
    build(predicted["old"], folder := tmp_path / "index", kind)
    remove(folder, [1, 2])
    index, x = read(folder), np.stack([*embeddings(predicted["old"]).values()])
    among = index.matching(["id>=20"])
    want = index.nearest(x, 6, among)
    monkeypatch.setattr(memory, "FEW", 10)
    monkeypatch.setattr("cascade.offline.index.vectors.probes", lambda vectors: vectors.nlist)
    got = index.nearest(x, 6, among)
    np.testing.assert_allclose(got[0], want[0], atol=1e-5)
    assert got[1].min() >= 20 and (got[1] == want[1]).mean() > 0.99


def test_bad_conditions(folder: Path) -> None:
    rows = read(folder).rows
    for where, text in (
        (["price"], "is no condition: write for example"),
        (["=1"], "is no condition"),
        (["price<1"], "the index has no column 'price': choose one of id, path, cluster, ood, label"),
        (["id=many"], "'many' does not fit column id, which has the type int64"),
        (["id~1"], "column id has no text"),
        (["id=1"] * 17, "at most 16"),
    ):
        with pytest.raises(CascadeError, match=text):
            matching(rows, where)


def test_bad_metadata(predicted: dict[str, Path], photos: Path, tmp_path: Path, prices: Path) -> None:
    path = str(photos / "old" / "000.png")
    nested = tmp_path / "n.parquet"
    pq.write_table(pa.table({"path": [path], "tags": [["a"]]}), nested)
    for file, text in (
        (table(tmp_path / "a.csv", [{"file": path}]), "needs a column path"),
        (table(tmp_path / "b.csv", [{"path": path, "id": 1}]), "has a column id, as every index has: rename it"),
        (table(tmp_path / "c.csv", [{"path": path}, {"path": path}]), "several rows for a path"),
        (table(tmp_path / "d.csv", [{"path": "000.png", "x": 1}]), "no path of the metadata is among the images"),
        (nested, "column tags of .* has the type list"),
        (tmp_path / "none.csv", "cannot be read"),
    ):
        with pytest.raises(CascadeError, match=text):
            build(predicted["old"], tmp_path / "index", metadata=file)
        assert not (tmp_path / "index").exists()
    build(predicted["old"], tmp_path / "index", metadata=prices)
    other = table(tmp_path / "e.csv", [{"path": photos / "new" / "080.png", "stock": "many"}])
    with pytest.raises(CascadeError, match="has other types than the index"):
        add(tmp_path / "index", predicted["new"], other)
    assert len(paths(tmp_path / "index")) == 80


def test_a_new_column_is_empty_in_older_rows(folder: Path, predicted: dict[str, Path], prices: Path) -> None:
    add(folder, predicted["new"], prices)
    rows = read(folder).rows.to_pylist()
    assert rows[0]["stock"] is None and rows[80]["stock"] == 80


def test_commands(folder: Path, bundle: Path, photos: Path, prices: Path) -> None:
    new = photos / "new" / "090.png"
    with_bundle = ("--bundle", bundle)
    text = invoke("index", "add", folder, new, "--metadata", prices, *with_bundle)
    assert text == f"1 rows added, 0 replaced, 81 in {folder}\n"
    lines = invoke("index", "search", folder, new, "-k", 1, "--where", "stock>5", *with_bundle).splitlines()
    assert lines[1].startswith(f"  1.000  80  {new}") and lines[1].endswith("price=45.0  stock=90  name=a cat, 90")
    assert invoke("index", "remove", folder, 0, 5) == f"2 rows removed, 79 in {folder}\n"
    assert invoke("index", "remove", folder, "--where", "path~/new/") == f"1 rows removed, 78 in {folder}\n"
    for arguments, message in (
        (("add", folder), "name images, or --predictions, but not both"),
        (("remove", folder), "name ids, or --where, but not both"),
        (("search", folder, new, "--where", "id=1", "--device", "cuda"), "--where searches on the CPU"),
    ):
        result = CliRunner().invoke(app, ["index", *map(str, arguments)])
        assert result.exit_code == 1 and message in result.stderr


# Crashes, and readers meanwhile

KILLED = """
import os, sys
from pathlib import Path
import cascade
from cascade.offline import predict
from cascade.offline.index import add_images, files, update

bundle, images, index = map(Path, sys.argv[1:])
engine = cascade.load(bundle)
replace = Path.replace


def die(*_):
    os.kill(os.getpid(), 9)


def around(name, late):
    def renamed(self, target):
        if target.name == name and not late:
            die()
        replace(self, target)
        if target.name == name:
            die()
    return lambda: setattr(Path, "replace", renamed)


ends = [
    lambda: setattr(predict, "prepare", die),  # while images are predicted
    lambda: setattr(update, "write", die),  # before anything is written
    around("index-2.faiss", False),
    around("index-2.faiss", True),
    around("rows-2.parquet", True),
    around("index.json", False),
    around("index.json", True),  # the new index is there, and the old files too
]
for end in ends:
    child = os.fork()  # loading costs seconds
    if child == 0:
        end()
        add_images(index, engine, [images])
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(status, files.read(index).about.rows)
print(0, add_images(index, engine, [images]).about.rows)
"""


@pytest.mark.slow
def test_killed_at_any_moment_of_an_addition(folder: Path, bundle: Path, photos: Path) -> None:
    """SIGKILL leaves the old index or the new one, and the next addition works and cleans up."""
    command = [sys.executable, "-c", KILLED, *map(str, (bundle, photos / "new" / "11?.png", folder))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    ends = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert ends == [(signal.SIGKILL, 80)] * 6 + [(signal.SIGKILL, 90), (0, 90)], done.stderr
    assert [*paths(folder)] == [*range(80), *range(90, 100)]
    assert files(folder) == ["index-3.faiss", "index.json", "rows-3.parquet"]


def test_a_reader_meanwhile_gets_the_new_one(
    folder: Path, predicted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card is read, and then the files that it names are gone."""
    real = json.loads

    def slow(text: str) -> object:
        monkeypatch.undo()
        card = real(text)
        add(folder, predicted["new"])
        return card

    monkeypatch.setattr("cascade.offline.index.files.json.loads", slow)
    assert read(folder).about.rows == 120


def test_a_live_index_follows_its_folder(
    folder: Path, predicted: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    live = LiveIndex(folder)
    first = live.index
    live.refresh()
    assert live.index is first
    add(folder, predicted["new"])
    live.refresh()
    assert (first.about.rows, live.index.about.rows) == (80, 120) and "read again: 120 rows" in caplog.text
    second = live.index
    shutil.rmtree(folder)
    live.refresh()
    assert live.index is second and "the old index stays" in caplog.text
