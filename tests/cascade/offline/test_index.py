"""Indices over what was predicted: all kinds find what a plain product finds, and duplicates and outliers are so."""

import csv
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

import cascade
from cascade.bundle.format import write
from cascade.cli.main import app
from cascade.engine.engine import Engine
from cascade.engine.results import ItemError, Options
from cascade.errors import CascadeError
from cascade.model.heads import faiss
from cascade.offline.index import Index, Kind, build, duplicates, outliers, read, search
from cascade.offline.index.memory import unit
from cascade.offline.job import files_of
from cascade.offline.predict import Summary, predict_files
from cascade.offline.report import ALIKE, FAR
from cascade.offline.report import write as write_report
from cascade.offline.sample import sample
from tests.helpers.bundles import handmade


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, cifar: list[Image.Image]) -> Path:
    return write(handmade(cifar[:40]), tmp_path_factory.mktemp("store") / "hand" / "1")


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Engine:
    return cascade.load(bundle)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, cifar: list[Image.Image]) -> Path:
    """120 images, three of which are there again (one of them twice), and a bad one."""
    folder = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(cifar[:120]):
        image.save(folder / f"{i:03d}.png")
    for i, copy in ((5, "a"), (5, "b"), (9, "c"), (40, "d")):
        shutil.copy(folder / f"{i:03d}.png", folder / f"copy-{copy}.png")
    (folder / "bad <b>.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def predicted(engine: Engine, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary]:
    out = tmp_path_factory.mktemp("predicted") / "out"
    return out, predict_files(engine, [photos], out, rows=50, embedding="float16")


@pytest.fixture(scope="module")
def index(predicted: tuple[Path, Summary], tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("index") / "index"
    build(predicted[0], folder)
    return read(folder)


def embeddings(out: Path) -> tuple[list[str], np.ndarray]:
    rows = [row for path in files_of(out) for row in pq.read_table(path).to_pylist() if row["embedding"]]
    return [row["path"] for row in rows], unit(np.array([row["embedding"] for row in rows]))


def invoke(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result.stdout


class Page(HTMLParser):
    """What a page holds; fails where a tag does not close or something would be loaded."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.pictures = 0
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "link", "iframe", "b"), "a file's name came through as a tag"
        for name, value in attrs:
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value and value.startswith("data:image/jpeg;base64,")
                self.pictures += 1
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# The index


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_every_kind_finds_what_a_product_finds(predicted: tuple[Path, Summary], tmp_path: Path, kind: Kind) -> None:
    about = build(predicted[0], tmp_path / "index", kind)
    assert (about.kind, about.rows, about.dim, about.bundle) == (kind, 124, 8, "hand")
    index = read(tmp_path / "index")
    paths, vectors = embeddings(predicted[0])
    assert index.rows["path"].to_pylist() == paths
    if kind == "ivf":
        index.vectors.nprobe = index.vectors.nlist
    similarities, ids = index.nearest(vectors, 5)
    want = np.sort(vectors @ vectors.T)[:, :-6:-1]
    np.testing.assert_allclose(similarities, want, atol=1e-5)
    np.testing.assert_allclose((vectors[index.rows_of(ids)] * vectors[:, None]).sum(-1), similarities, atol=1e-5)
    again = np.concatenate([block for _, block in index.chunks(50)])
    np.testing.assert_allclose(again, vectors, atol=1e-6)


def test_search_by_image(index: Index, engine: Engine, photos: Path) -> None:
    found = search(index, engine, [photos / "009.png", photos / "bad <b>.png"], 3)
    assert {Path(each["path"]).name for each in found[0][:2]} == {"009.png", "copy-c.png"}
    assert found[0][0]["similarity"] == pytest.approx(1, abs=1e-3) and len(found[0]) == 3
    assert isinstance(found[1], ItemError) and found[1].kind == "not_an_image"


def test_an_index_of_another_bundle_is_refused(index: Index, cifar: list[Image.Image]) -> None:
    for other, text in ((handmade(cifar[:40], seed=1), "another bundle called hand/1"), (None, "which is not loaded")):
        engine = Engine()
        if other:
            engine.add(other)
        with pytest.raises(CascadeError, match=text):
            search(index, engine, [cifar[0]])


def test_what_can_not_be_indexed(predicted: tuple[Path, Summary], engine: Engine, photos: Path, tmp_path: Path) -> None:
    predict_files(engine, [photos / "001.png"], plain := tmp_path / "plain.parquet")
    predict_files(engine, [photos / "bad <b>.png"], bad := tmp_path / "bad.parquet", embedding="float16")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    predict_files(engine, [photos / "001.png"], mixed / "1.parquet", embedding="float16")
    predict_files(engine, [photos / "001.png"], mixed / "2.parquet", Options(mode="dispatcher"), embedding="float16")
    for predictions, out, text in (
        (plain, "x", "has no embeddings of ours: predict with --embedding float16"),
        (bad, "x", "nothing but errors"),
        (mixed, "x", "several bundles or modes"),
        (tmp_path / "none", "x", "has no Parquet file"),
        (predicted[0], "mixed", "name a new folder"),
    ):
        with pytest.raises(CascadeError, match=text):
            build(predictions, tmp_path / out)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["index-1.faiss", "rows-1.parquet", "index.json"])
def test_a_damaged_index_is_refused(predicted: tuple[Path, Summary], tmp_path: Path, name: str) -> None:
    build(predicted[0], tmp_path / "index")
    path = tmp_path / "index" / name
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw if name != "index.json" else raw[:50])
    with pytest.raises(CascadeError, match="is damaged: build the index again|is no index"):
        read(tmp_path / "index")


def test_without_a_gpu_one_line_says_so(predicted: tuple[Path, Summary], tmp_path: Path) -> None:
    if getattr(faiss(), "get_num_gpus", lambda: 0)():
        pytest.skip("there is one")
    with pytest.raises(CascadeError, match="FAISS sees no GPU here"):
        build(predicted[0], tmp_path / "index", device="cuda")


# Duplicates, outliers


def test_duplicates_are_linked(index: Index) -> None:
    found = duplicates(index, 0.99999).to_pylist()
    groups: dict[int, set[str]] = {}
    for row in found:
        groups.setdefault(row["group"], set()).add(Path(row["path"]).name)
        assert row["similarity"] == pytest.approx(1, abs=1e-4)
    want = [{"005.png", "copy-a.png", "copy-b.png"}, {"009.png", "copy-c.png"}, {"040.png", "copy-d.png"}]
    assert [groups[n] for n in sorted(groups)] == want
    everything = duplicates(index, -1)
    assert set(everything["group"].to_pylist()) == {0} and len(everything) == 124


def test_outliers_are_the_farthest(index: Index, predicted: tuple[Path, Summary]) -> None:
    found = outliers(index, top=124, k=3).to_pylist()
    paths, vectors = embeddings(predicted[0])
    product = vectors @ vectors.T
    np.fill_diagonal(product, -2)
    want = 1 - np.sort(product)[:, -3:].mean(1)
    got = {row["path"]: row["distance"] for row in found}
    np.testing.assert_allclose([got[path] for path in paths], want, atol=1e-4)
    assert [row["distance"] for row in found] == sorted(got.values(), reverse=True)
    assert len(outliers(index, top=5)) == 5


# Reports, by the commands


def test_commands_and_their_pages(predicted: tuple[Path, Summary], bundle: Path, photos: Path, tmp_path: Path) -> None:
    assert "124 rows in" in invoke("index", "build", predicted[0], "--out", tmp_path / "index", "--kind", "hnsw")
    lines = invoke(
        "index", "search", tmp_path / "index", photos / "040.png", "--bundle", bundle, "-k", "2"
    ).splitlines()
    assert lines[0] == str(photos / "040.png") and len(lines) == 3 and "1.000" in lines[1]
    pages = tmp_path / "d.html", tmp_path / "o.html"
    table, more = tmp_path / "d.csv", tmp_path / "o.parquet"
    invoke("index", "duplicates", tmp_path / "index", "--out", table, "--threshold", "0.9999", "--html", pages[0])
    invoke("index", "outliers", tmp_path / "index", "--out", more, "--top", "7", "--html", pages[1])
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 7 and Page(pages[0]).pictures == 7
    assert pq.read_table(more).num_rows == 7 and Page(pages[1]).pictures == 7
    result = CliRunner().invoke(app, ["index", "outliers", str(tmp_path / "index"), "--out", str(tmp_path / "o.txt")])
    assert result.exit_code == 1 and "name a .csv or .parquet file" in result.stderr


def test_report_of_a_job(predicted: tuple[Path, Summary], tmp_path: Path) -> None:
    out, summary = predicted
    write_report(summary, files_of(out), summary.trained, tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "hand/1: 125 images" in page.text and "125 rows, 1 of them errors" in page.text
    assert "not_an_image" in page.text and "bad <b>.png" in page.text
    assert page.tags.count("circle") == 124
    clusters = len(summary.clusters)
    assert 12 + FAR < page.pictures <= 12 * (clusters + ALIKE) + FAR
    for k, share in summary.clusters.items():
        assert f"Cluster {k}: {round(share * 124)} images" in page.text
        assert f"{100 * share:.1f} %" in page.text
    assert "50.0 %" in page.text  # the share in training


def test_report_by_the_command(bundle: Path, photos: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "r.html"
    options: list[str | Path] = ["predict", photos, "--out", out, "--bundle", bundle, "--report"]
    text = invoke(*options, report)
    assert f"125 rows in {out}, 125 of them now" in text and f"report in {report}" in text
    again = invoke(*options, out / "_report.html")  # all done before, and a report all the same
    assert "125 rows" in again and "time:" not in again
    assert "All were there before the last run" in (out / "_report.html").read_text()
    assert len(pq.read_table(out)) == 125
    result = CliRunner().invoke(app, [*map(str, options), str(out / "report.html")])
    assert result.exit_code == 1 and "call it _report.html" in result.stderr


def test_a_sample_is_bounded_and_fair(predicted: tuple[Path, Summary], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.offline.sample.POINTS", 20)
    drawn = [sample(files_of(predicted[0]), seed) for seed in range(30)]
    assert all(each.points is not None and each.points.shape == (20, 8) for each in drawn)
    assert all(len(paths) <= 12 for each in drawn for paths in each.paths.values())
    seen = {path for each in drawn for path, _ in each.of}
    assert len(seen) > 110  # of 124: nobody is left out by his place
