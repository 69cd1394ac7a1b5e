"""Images that fit no bundle are kept: these and no others, within the bounds, large enough to train on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cascade import CascadeError, Engine, ItemError, Options
from cascade.bundle.format import Bundle
from cascade.engine.results import AUTO
from cascade.engine.unknown import UnknownImages, origin_of, reduced
from tests.conftest import sheet
from tests.helpers.bundles import handmade, named
from tests.helpers.domains import activations, with_domain
from tests.helpers.metrics import now

SIZE, STAGE = 64, 2


@pytest.fixture(scope="module")
def clothes() -> Bundle:
    images = sheet("fashion_mnist")
    return with_domain(handmade(images[:20], name="clothes", experts=0, size=SIZE), images[:200], STAGE)


@pytest.fixture
def engine(clothes: Bundle) -> Engine:
    engine = Engine()
    engine.add(clothes)
    engine.add(named(clothes, "others"))
    return engine


def png(image: Image.Image) -> bytes:
    image.save(out := BytesIO(), "png")
    return out.getvalue()


@contextmanager
def keeping(engine: Engine, folder: Path, images: int = 100, bytes: int = 2**20) -> Iterator[UnknownImages]:
    """What was offered is written when the block ends."""
    with UnknownImages(folder, images, bytes) as engine.unknown:
        yield engine.unknown
    engine.unknown = None


def test_only_images_that_fit_no_bundle(
    engine: Engine, photos: list[Image.Image], clothes: Bundle, tmp_path: Path
) -> None:
    photo, shirt = png(photos[205]), png(sheet("fashion_mnist")[205])
    counts = [now("unknown_kept_total", result=result) for result in ("kept", "repeated")]
    with keeping(engine, tmp_path / "unknown") as unknown:
        assert engine.predict([shirt], Options(AUTO))[0].ok
        assert not engine.predict([shirt], Options(among=frozenset()))[0].ok, "it fits, only not for this caller"
        assert engine.predict([photo], Options("clothes"))[0].ok
        engine.predict([photos[206]])  # not encoded: only servers keep images
        answers = engine.predict([photo, photo])
        assert all(isinstance(answer, ItemError) and answer.kind == "unknown_domain" for answer in answers)
    (kept,) = unknown.listed()
    assert [now("unknown_kept_total", result=result) for result in ("kept", "repeated")] == [n + 1 for n in counts]
    assert (tmp_path / "unknown").stat().st_mode & 0o777 == 0o700
    file = unknown.read(kept.name)
    assert file is not None and len(file) == kept.bytes and Image.open(BytesIO(file)).size == (32, 32)
    origin = origin_of(file)
    assert origin is not None and origin.stage == STAGE and origin.fingerprint == clothes.card.backbone.fingerprint
    assert origin.preprocessing == clothes.preprocessing.to_json() and origin.backbone == "test_resnet"
    wanted = activations(clothes, [photos[205]], STAGE)[0].numpy()
    np.testing.assert_allclose(origin.embedding, wanted, atol=0.01)


def test_nothing_is_kept_by_default(engine: Engine, photos: list[Image.Image]) -> None:
    item = engine.prepare(png(photos[205]))
    assert not isinstance(item, ItemError) and item.file is None  # type: ignore[union-attr]


def test_the_oldest_go_first(engine: Engine, photos: list[Image.Image], tmp_path: Path) -> None:
    files = [png(photo) for photo in photos[200:206]]
    with keeping(engine, tmp_path, images=3) as unknown:
        for file in files:
            engine.predict([file])
    names = [kept.name for kept in unknown.listed()]
    assert len(names) == 3
    with keeping(engine, tmp_path, images=3) as unknown:
        engine.predict([png(photos[210])])
    assert [kept.name for kept in unknown.listed()][:2] == names[1:]
    sizes = [kept.bytes for kept in unknown.listed()]
    with keeping(engine, tmp_path, bytes=sizes[-1] + 2500) as unknown:
        engine.predict([png(photos[211])])
    assert sum(kept.bytes for kept in unknown.listed()) <= sizes[-1] + 2500 < sum(sizes)


def test_large_enough_for_a_teacher_at_twice_the_size(engine: Engine, tmp_path: Path) -> None:
    large = Image.open("tests/data/customers/nobody/china.jpg").resize((900, 300))
    with keeping(engine, tmp_path) as unknown:
        assert not engine.predict([png(large)])[0].ok
    file = unknown.read(unknown.listed()[0].name)
    assert file is not None and Image.open(BytesIO(file)).size == (4 * SIZE, 2 * SIZE), "cut to an aspect of two"
    assert reduced(Image.new("RGB", (40, 3000)), 64).size == (40, 80), "never enlarged"


def test_a_full_disk_is_said_once(
    engine: Engine,
    photos: list[Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failed = now("unknown_kept_total", result="failed")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.INFO), keeping(engine, tmp_path) as unknown:
        engine.predict([png(photo) for photo in photos[200:203]])
    assert now("unknown_kept_total", result="failed") == failed + 3 and not [*tmp_path.iterdir()]
    (record,) = caplog.records
    assert record.getMessage() == "unknown images can't be kept: No space left on device"
    assert unknown.listed() == []


def test_the_folder_must_be_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CascadeError, match="could not be written"):
        UnknownImages(tmp_path / "file", 10, 1000)


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.jpg").write_bytes(b"mine")
    with UnknownImages(tmp_path, 1, 1) as unknown:
        assert unknown.listed() == [] and unknown.read("notes.jpg") is None and unknown.read("../x") is None
