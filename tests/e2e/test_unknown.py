"""The closed loop: what fits no bundle is kept, becomes the next bundle and is dispatched to it, while others serve."""

import tarfile
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from typer.testing import CliRunner

from cascade.bundle.format import read, write
from cascade.cli.main import app
from cascade.model import backbone as backbones
from tests.conftest import sheet
from tests.helpers.asgi_server import serving_asgi
from tests.helpers.bundles import handmade
from tests.helpers.domains import with_domain
from tests.helpers.http import post
from tests.helpers.servers import CLIENT
from tests.helpers.torments import until
from training.domains import stage_of
from training.recipe import LITE0

pytestmark = pytest.mark.e2e
BACKBONE = "tf_efficientnet_lite0"
KEY = {"Authorization": "Bearer secret"}


def png(image: Image.Image) -> bytes:
    image.save(out := BytesIO(), "png")
    return out.getvalue()


@pytest.fixture(scope="module")
def digits() -> list[Image.Image]:
    """Real handwritten digits, 8 px."""
    images = load_digits().images[:220]
    return [Image.fromarray((16 * image).clip(0, 255).astype(np.uint8)).convert("RGB") for image in images]


@pytest.fixture
def store(tmp_path: Path, digits: list[Image.Image]) -> Path:
    """Bundles of clothes and of digits."""
    stage = stage_of(backbones.load(BACKBONE, LITE0))
    for name, images in (("clothes", sheet("fashion_mnist")), ("digits", digits)):
        bundle = handmade(images[:20], name=name, backbone=BACKBONE, source=LITE0, mask_from=stage, experts=0)
        write(with_domain(bundle, images[:200], stage), tmp_path / "store" / name / "1")
    return tmp_path / "store"


def test_the_whole_loop(store: Path, digits: list[Image.Image], tmp_path: Path) -> None:
    photos = [png(image) for image in sheet("cifar10")[200:250]]
    # Typical ones: of 1,000 known images some five are called unknown, and which ones depends on the other domains.
    known = {"clothes": [*map(png, sheet("fashion_mnist")[224:234])], "digits": [*map(png, digits[200:210])]}
    keys, kept, there = tmp_path / "keys", tmp_path / "kept", tmp_path / "there"
    keys.write_text(f"* {sha256(b'secret').hexdigest()} role=admin\n")

    def ask(file: bytes, **headers: str) -> httpx.Response:
        return post(server, file, **KEY, **headers)

    def embeddings() -> list[bytes]:
        headers = {"Accept": "application/octet-stream"}
        answers = [ask(file, X_Cascade_Bundle=name, **headers) for name, files in known.items() for file in files]
        return [answer.raise_for_status().content for answer in answers]

    def count() -> int:
        return int(CLIENT.get(f"{server.base}/v1/unknown", headers=KEY).raise_for_status().json()["count"])

    def send(some: list[bytes]) -> int:
        """How many fit no bundle, once they are kept."""
        before = count()
        unknown = sum(ask(photo).status_code == 422 for photo in some)
        until(lambda: count() == before + unknown)
        return unknown

    with serving_asgi(store, "--api-keys", str(keys), "--keep-unknown", str(kept), "--poll", "0.5") as server:
        before = embeddings()
        assert len({len(embedding) for embedding in before}) == 1 and len(set(before)) == 20
        unknown = send(photos[:25]) + send(photos[25:])  # of all at once, those beyond 32 that wait may be dropped
        assert unknown >= 48 and count() == unknown
        archive = CLIENT.get(f"{server.base}/v1/unknown.tar", headers=KEY).raise_for_status().content
        with tarfile.open(fileobj=BytesIO(archive)) as tar:
            tar.extractall(there, filter="data")

        short = ["--steps", "3", "--batch", "16", "--run", str(tmp_path / "run"), "--out", str(store / "photos" / "1")]
        done = CliRunner().invoke(app, ["train", "--from-unknown", str(there / "unknown"), *short])
        assert done.exit_code == 0, done.output

        until(lambda: ask(photos[0], X_Cascade_Bundle="photos").status_code == 200)
        answers = [ask(photo).json() for photo in photos]
        assert sum(answer.get("bundle") == "photos" for answer in answers) >= 48
        assert count() == unknown, "they fit now"
        assert embeddings() == before, "bit for bit"
        for name, files in known.items():
            found = [ask(file).json() for file in files]
            assert [answer.get("bundle") for answer in found] == [name] * 10, found

    trained = read(store / "photos" / "1")
    assert (trained.card.backbone.name, trained.preprocessing.size) == (BACKBONE, 64), "as the others"
    short[-1], short[-3] = str(store / "more" / "1"), str(tmp_path / "other")
    again = CliRunner().invoke(app, ["train", "--from-unknown", str(kept), *short])
    assert again.exit_code == 1 and "fit a bundle by now: photos" in again.output, again.output
