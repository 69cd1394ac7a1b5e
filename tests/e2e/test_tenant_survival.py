"""What a server with many customers must survive: floods, killed uploads, wrong keys, and thousands of new bundles."""

import os
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from cascade.bundle.archive import pack
from cascade.bundle.format import read, write
from tests.helpers.asgi_server import Asgi, serving_asgi
from tests.helpers.bundles import handmade
from tests.helpers.keys import digest
from tests.helpers.load import Load, second_version
from tests.helpers.servers import CLIENT
from tests.helpers.torments import put, short_and_whole, take, until

pytestmark = pytest.mark.e2e

ADMIN = {"Authorization": "Bearer the-admin"}
KEYS = f"* {digest('the-admin')} role=admin\n* {digest('calm')} name=calm\n* {digest('flood')} name=flood\n"


@pytest.fixture(scope="module")
def tiny(cifar: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a few files and kilobytes."""
    return write(handmade(cifar[:20], experts=0, mask_from=3), tmp_path_factory.mktemp("tiny") / "tiny" / "1")


@pytest.fixture(scope="module")
def server(shelf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asgi]:
    """A server on demand, with keys for an admin and two customers."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEYS)
    options = ("--on-demand", "--poll", "0.1", "--api-keys", str(keys), "--queue", "32", "--log-level", "warning")
    with serving_asgi(shelf, *options) as running:
        yield running


def calm(server: Asgi, photos: list[bytes], *bundles: str) -> Load:
    """A customer that is always answered."""
    return Load(server, photos, 2, bundles=bundles or ("one",), key="calm").start()


def index(server: Asgi) -> dict[tuple[str, str], str]:
    """The state of every bundle in the store, for an admin."""
    found = CLIENT.post(f"{server.base}/v2/repository/index", headers=ADMIN).raise_for_status().json()
    return {(each["name"], each["version"]): each["state"] for each in found}


def gone(server: Asgi, folder: Path) -> None:
    """Take a name out of the store, and wait until the server has seen it."""
    take(folder)
    until(lambda: all(name != folder.name for name, _ in index(server)))


def loaded(server: Asgi, photos: list[bytes], *bundles: str) -> None:
    """Load these names and wait until no load is in progress: one that is killed is refused for a minute."""
    load = calm(server, photos, *bundles)
    load.more()
    load.stop()
    until(lambda: set(index(server).values()) == {"READY"})


@pytest.mark.parametrize("times", short_and_whole(1, 20))
def test_versions_come_and_go_beside_a_flood(
    server: Asgi, shelf: Path, tiny: Path, photos: list[bytes], times: int
) -> None:
    """The flood is refused; the quiet customer whose versions change gets every answer."""
    put(tiny, shelf / "rolled" / "1")
    until(lambda: ("rolled", "1") in index(server))
    aside = write(second_version(read(tiny)), shelf.parent / "second" / "2")
    flood = Load(server, photos, 64, bundles=("one",), key="flood").start()
    flood.more()
    quiet = calm(server, photos, "rolled")
    for _ in range(times):
        aside.rename(shelf / "rolled" / "2")
        until(lambda: index(server).get(("rolled", "2")) == "READY")
        quiet.more()
        (shelf / "rolled" / "2").rename(aside)
        until(lambda: index(server).get(("rolled", "2")) != "READY")
        quiet.more()
    answered, flooded = quiet.stop(), flood.stop()
    gone(server, shelf / "rolled")
    print(f"rolled out and back {times} times: {dict(answered)} beside {dict(flooded)}")
    assert answered.keys() == {200} and quiet.wrong == []
    assert {200, 429} <= flooded.keys() <= {200, 429, 503} and flood.wrong == []  # 503: alone, it may fill the queue


@pytest.mark.parametrize("times", short_and_whole(1, 20))
def test_killed_during_an_upload(
    server: Asgi, shelf: Path, tiny: Path, photos: list[bytes], tmp_path: Path, times: int
) -> None:
    """A version is there as a whole or not at all; what was half written is no bundle, and the version is free."""
    packed = pack(tiny, tmp_path / "packed").read_bytes()
    folder, killed = shelf / "uploaded", 0

    def upload(version: int) -> int:
        try:
            url = f"{server.base}/v2/repository/models/uploaded/versions/{version}"
            return httpx.put(url, content=packed, headers=ADMIN, trust_env=False, timeout=120).status_code
        except httpx.TransportError:
            return 0

    for version in range(1, 100):
        if killed == times:
            break
        loaded(server, photos, "one", *(["uploaded"] if version > 1 else []))
        with ThreadPoolExecutor(1) as pool:
            request = pool.submit(upload, version)
            while not (written := [*folder.glob(".*/*")] if folder.is_dir() else []) and not request.done():
                pass
            if not written:
                continue
            server.worker().kill()
            assert request.result() in (0, 200)
        until(server.answers)
        if (folder / str(version)).is_dir():
            assert read(folder / str(version)).masks
        else:
            killed += 1
            assert ("uploaded", str(version)) not in index(server)
            assert upload(version) == 200
        assert index(server)["uploaded", str(version)] == "READY"
        for left in folder.glob(".*"):
            shutil.rmtree(left)
    assert killed == times, "no upload was caught while it was written"
    latest = max((version for name, version in index(server) if name == "uploaded"), key=int)
    headers, url = ADMIN | {"X-Cascade-Bundle": "uploaded"}, f"{server.base}/v1/predict"
    until(lambda: CLIENT.post(url, content=photos[0], headers=headers).json().get("version") == latest)
    load = calm(server, photos, "one", "uploaded")
    load.more()
    assert load.stop().keys() == {200} and load.wrong == []
    gone(server, folder)


@pytest.mark.parametrize("count", short_and_whole(100, 5000))
def test_wrong_admin_keys(server: Asgi, shelf: Path, photos: list[bytes], count: int) -> None:
    """Guessed, empty, malformed and customers' keys change nothing, and are not written to the log."""
    calls = [
        ("POST", "repository/index"),
        ("POST", "repository/models/one/load"),
        ("POST", "repository/models/one/unload"),
        ("PUT", "repository/models/one/versions/9"),
    ]
    wrong = ["Bearer guessed-admin", "Bearer", "Basic the-admin", "Bearer the-admin twice", "\u00e9" * 99]
    before, statuses = index(server), Counter[int]()
    load = calm(server, photos)

    def attempt(seed: int) -> None:
        draw = random.Random(seed)
        method, path = draw.choice(calls)
        key = draw.choice([*wrong, "Bearer calm", None])
        headers = {} if key is None else {b"Authorization": key.encode()}
        answer = CLIENT.request(method, f"{server.base}/v2/{path}", content=draw.randbytes(10_000), headers=headers)
        statuses[answer.status_code] += 1
        assert answer.status_code == (403 if key == "Bearer calm" else 401), (key, answer.text)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(attempt, range(count)))
    load.more()
    print(f"{count} attempts: {dict(statuses)}")
    assert load.stop().keys() == {200} and load.wrong == []
    assert index(server) == before and not (shelf / "one" / "9").exists()
    assert "guessed" not in server.log() and "the-admin" not in server.log()


@pytest.mark.parametrize("count", short_and_whole(300, 10_000))
def test_thousands_of_bundles_appear_at_once(
    server: Asgi, shelf: Path, tiny: Path, photos: list[bytes], count: int
) -> None:
    """Nobody waits for them; each is there when it is asked for; and they go as they came."""
    aside = shelf.parent / "aside"
    for n in range(count):
        bundle = aside / f"new-{n}" / "1"
        bundle.mkdir(parents=True)
        for file in tiny.iterdir():
            os.link(file, bundle / file.name)
    worker = server.worker()
    memory = worker.memory_info().rss
    load = calm(server, photos)
    load.more()
    for folder in aside.iterdir():
        folder.rename(shelf / folder.name)
    until(lambda: len(index(server)) == count + 1)
    fresh = [f"new-{n}" for n in random.Random(0).sample(range(count), 8)]
    asked = calm(server, photos, *fresh[:2])
    asked.more()
    grown = (worker.memory_info().rss - memory) / 2**20
    assert asked.stop().keys() == {200} and asked.wrong == []
    for n in range(count):
        take(shelf / f"new-{n}")
    until(lambda: len(index(server)) == 1)
    load.more()
    slowest = max(answer.seconds for answer in load.answers)
    print(f"{count} bundles: memory {grown:+.0f} MiB, the slowest answer to others after {slowest:.2f} s")
    assert load.stop().keys() == {200} and load.wrong == []
    assert server.worker().pid == worker.pid and slowest < 60
    assert grown < 100 + count // 50
