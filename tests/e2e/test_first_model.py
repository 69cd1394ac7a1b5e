"""Who has never seen the project: the first commands of the quickstart, from 500 photos to an answer in the browser.

The commands are those of the page. Only here, training is cut to a few steps, because the default takes minutes;
the time that each step takes is printed, and none is asserted.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handlers.torchserve.entrypoint import LOOPBACK, claim_ports
from tests.conftest import sheet
from tests.helpers.asgi_server import Asgi
from tests.helpers.browser import Page, chromium, has_chromium
from tests.helpers.paths import DATA, ROOT
from tests.helpers.servers import watched
from training.data import arrays

pytestmark = pytest.mark.e2e
PHOTOS = 500
SHORTER = ["--minutes", "0.1", "--size", "64"]  # the last of two values counts


def commands() -> list[str]:
    """The four commands of the first section of the page."""
    section = (ROOT / "docs" / "quickstart.md").read_text().partition("## In four commands")[2].partition("\n## ")[0]
    return [line.partition("#")[0].strip() for line in re.findall(r"^    (.+)$", section, re.MULTILINE)]


def photos() -> list[tuple[str, Image.Image]]:
    """Real photos and their classes: groceries where that data set is on disk, else small ones of tests/data."""
    if (arrays.root() / "groceries").is_dir():
        images, labels = arrays.load("groceries", "train")
        chosen = np.random.default_rng(0).permutation(len(images))[:PHOTOS]
        return [(arrays.CLASSES["groceries"][labels[i]], Image.fromarray(images[i])) for i in chosen]
    found = []
    for name in ("cifar10", "fashion_mnist"):
        labels = json.loads((DATA / f"{name}.json").read_text())["labels"]
        names = arrays.CLASSES[name.replace("_", "-")]
        found += [(names[n].replace("/", "-"), image) for n, image in zip(labels, sheet(name), strict=True)]
    return found[:PHOTOS]


def fill(folder: Path) -> Path:
    """Write the photos into folders of their classes; returns one of them."""
    for number, (label, image) in enumerate(photos()):
        (folder / label).mkdir(parents=True, exist_ok=True)
        image.save(path := folder / label / f"{number:04}.jpg", quality=92)
    assert len([*folder.glob("*/*.jpg")]) == PHOTOS
    return path


def run(command: list[str], folder: Path) -> str:
    """Type a command in the folder; returns what it prints."""
    words = [sys.executable, "-m", "cascade.cli.main", *command[1:]] if command[0] == "cascade" else command
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_four_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = fill(tmp_path / "photos")
    begin, marks = time.monotonic(), {}

    def mark(what: str) -> None:
        marks[what] = time.monotonic() - begin

    train, inspect, serve, ask = map(shlex.split, commands())
    assert [words[:2] for words in (train, inspect, serve)] == [["cascade", c] for c in ("train", "inspect", "serve")]
    run([*train, *SHORTER], tmp_path)
    mark("trained")
    assert "photos/1" in run(inspect, tmp_path)
    (port,) = claim_ports((LOOPBACK, 0))
    base = f"http://{LOOPBACK}:{port}"

    def server(process: "subprocess.Popen[str]", folder: Path) -> Asgi:
        return Asgi(f"{base}/v1/predict", f"{base}/metrics", process, folder)

    words = ["-m", "cascade.cli.main", *serve[1:]]
    with watched(lambda _: words, server, {"CASCADE_SERVE_PORT": str(port)}, cwd=tmp_path):
        mark("ready")
        assert ask[0] == "curl" and shutil.which("curl")
        sent = [str(photo) if word.endswith(".jpg") else word.replace(":8080", f":{port}") for word in ask]
        answer = run([*sent, "--noproxy", "*", "--no-progress-meter"], tmp_path)
        assert '"labels"' in answer and f'"{photo.parent.name}"' in answer
        mark("answered")
        if has_chromium():
            with chromium() as driver:
                page = Page(driver, base)
                page.choose(photo)
                assert page.until("document.body.dataset.shown") == "photos"
                assert photo.parent.name in page.text("labels")
                mark("in the browser")
    with capsys.disabled():
        told = ", ".join(f"{what} {seconds:.0f} s" for what, seconds in marks.items())
        print(f"\n{PHOTOS} photos, {' '.join(SHORTER)}: {told}")
