"""Offline prediction without a bundle's name: each image by the bundle that it fits best."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cascade import Engine, Options, Prediction
from cascade.bundle.format import read, write
from cascade.cli.main import app
from tests.conftest import sheet
from tests.helpers.bundles import handmade, named
from tests.helpers.deferral import two_sizes
from tests.helpers.domains import with_domain


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos, with two input sizes, and clothes."""
    store, photos, clothes = tmp_path_factory.mktemp("store"), sheet("cifar10"), sheet("fashion_mnist")
    write(with_domain(named(two_sizes(photos[:20], threshold=1.0), "photos"), photos[:200]), store / "photos" / "1")
    bundle = handmade(clothes[:20], name="clothes", experts=0, seed=1)
    write(with_domain(bundle, clothes[:200]), store / "clothes" / "1")
    return store


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five photos and five clothes, a file that is no image, and a color."""
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("cifar10", "fashion_mnist"):
        for n, image in enumerate(sheet(name)[200:205]):
            image.save(folder / f"{name}-{n}.png")
    Image.new("RGB", (64, 64), (255, 0, 255)).save(folder / "pink.png")
    (folder / "text.png").write_text("text")
    return folder


def test_each_image_by_its_own_bundle(store: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    options = ["--out", str(out), "--bundle", "auto", "--model-store", str(store), "--embedding", "none"]
    done = CliRunner().invoke(app, ["predict", str(images), *options])
    assert done.exit_code == 0, done.output
    rows = {Path(row["path"]).stem: row for row in pq.read_table(out).to_pylist()}
    engine = Engine()
    for name in ("photos", "clothes"):
        engine.add(read(store / name / "1"))
    for stem, row in rows.items():
        (alone,) = engine.predict([images / f"{stem}.png"], Options("auto"))
        if isinstance(alone, Prediction):
            assert alone.dispatch is not None
            assert (row["bundle"], row["version"], row["mode"]) == (alone.bundle, alone.version, alone.mode)
            assert row["bundle_confidence"] == pytest.approx(alone.dispatch.confidence, abs=1e-4)
            assert row["labels"][0]["name"] == alone.labels[0].name
            assert row["deferred"] == (None if alone.deferral is None else alone.deferral.deferred)
        else:
            assert row["error_kind"] == alone.kind and row["bundle"] is row["bundle_confidence"] is None
    assert (rows["pink"]["error_kind"], rows["text"]["error_kind"]) == ("unknown_domain", "not_an_image")
    known = [row["bundle"] for row in rows.values() if row["bundle"]]
    assert {*known} == {"photos", "clothes"} and len(known) >= 8
    share = f"{100 * known.count('clothes') / len(known):.1f} % by clothes"
    assert share in done.output and "with error unknown_domain" in done.output and "cluster" not in done.output


def test_a_changed_store_is_another_job(store: Path, images: Path, tmp_path: Path) -> None:
    out, own = tmp_path / "out", tmp_path / "store"
    for name in ("photos", "clothes"):
        write(read(store / name / "1"), own / name / "1")
    options = ["predict", str(images), "--out", str(out), "--bundle", "auto", "--model-store", str(own)]
    options += ["--embedding", "none"]
    assert CliRunner().invoke(app, options).exit_code == 0
    assert "all before" in CliRunner().invoke(app, options).output
    write(named(read(store / "clothes" / "1"), "others"), own / "others" / "1")
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 1 and "was begun with digest" in done.output


def test_errors(store: Path, images: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    clothes = sheet("fashion_mnist")
    for name, dim in (("one", 8), ("two", 12)):
        bundle = handmade(clothes[:20], name=name, experts=0, dim=dim)
        write(with_domain(bundle, clothes[:200]), wide / name / "1")
    write(handmade(clothes[:20], name="plain", experts=0), tmp_path / "plain" / "plain" / "1")
    for options, why in (
        (["--model-store", str(wide)], "embeddings of 2 widths: add --embedding none"),
        (["--model-store", str(tmp_path / "plain")], "none has a domain to dispatch by"),
        (["--model-store", str(store), "--report", str(tmp_path / "r.html")], "omit --ray and --report"),
    ):
        command = ["predict", str(images), "--out", str(tmp_path / "out"), "--bundle", "auto", *options]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 1 and why in done.output.replace("\n", " "), done.output


def test_no_index_of_several_bundles(store: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--out", str(out), "--bundle", "auto", "--model-store", str(store)]
    assert CliRunner().invoke(app, ["predict", str(images), *options]).exit_code == 0
    done = CliRunner().invoke(app, ["index", "build", str(out), "--out", str(tmp_path / "index")])
    assert done.exit_code == 1 and "can't be compared" in done.output.replace("\n", " "), done.output
