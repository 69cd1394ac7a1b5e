"""Bundles in a store, and the servers that all modules of this folder share."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import cascade
from cascade.bundle.format import read, write
from cascade.engine.engine import Engine
from cascade.offline.index import build
from cascade.offline.predict import predict_files
from tests.helpers.asgi_server import Asgi, serving_asgi
from tests.helpers.otlp import Collector, receiving
from tests.helpers.paths import DATA
from tests.helpers.servers import EXECUTOR
from tests.helpers.torchserve_server import TorchServe, serving


@pytest.fixture(scope="session")
def engine(bundle_path: Path) -> Engine:
    """The same bundle without a server, to compare with."""
    return cascade.load(bundle_path, executor=EXECUTOR)


@pytest.fixture(scope="session")
def store(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good bundles, `one` and `two` (which has neither thumbnails nor map), one with a flipped byte, `broken`."""
    store = tmp_path_factory.mktemp("store")
    for name in ("one", "broken"):
        shutil.copytree(bundle_path, store / name / "1")
    write(replace(read(bundle_path), thumbnails=None, map=None), store / "two" / "1")
    largest = max((store / "broken" / "1").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return store


@pytest.fixture(scope="session")
def backbone_bytes(bundle_path: Path) -> int:
    """One resident copy."""
    return cascade.load(bundle_path, executor=EXECUTOR).stats()["backbone_bytes"]


@pytest.fixture(scope="session")
def one_mask(engine: Engine, photos: list[bytes]) -> int:
    """Bytes of one materialized mask, the dispatcher's: the smallest budget that works."""
    engine.predict(photos[:1], cascade.Options(mode="dispatcher"))
    return engine.stats()["materialized_bytes"]


@pytest.fixture(scope="session")
def photos(indexed: list[Path]) -> list[bytes]:
    """Ten CIFAR-10 test images as PNG files."""
    return [path.read_bytes() for path in indexed]


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """What the session's TorchServe exports."""
    with receiving() as collector:
        yield collector


@pytest.fixture(scope="session")
def server(store: Path, one_mask: int, collector: Collector) -> Iterator[TorchServe]:
    """One server for the session, with room for a single materialized mask, and traces."""
    start = time.perf_counter()
    with serving(store, budget_bytes=one_mask, env=collector.environment) as running:
        print(f"TorchServe was ready after {time.perf_counter() - start:.1f} s")
        yield running


@pytest.fixture(scope="module")
def shelf(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of their own for a module's tests that change it."""
    root = tmp_path_factory.mktemp("shelf") / "store"
    shutil.copytree(store / "one" / "1", root / "one" / "1")
    return root


@pytest.fixture(scope="session")
def indexed() -> list[Path]:
    """What the ASGI server's index is over."""
    return sorted((DATA / "photos").glob("*.png"))


@pytest.fixture(scope="session")
def index(store: Path, indexed: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos' embeddings by bundle `one`."""
    folder = tmp_path_factory.mktemp("index")
    engine = cascade.load(store / "one" / "1", executor=EXECUTOR)
    predict_files(engine, indexed, folder / "out", embedding="float16")
    build(folder / "out", folder / "index")
    return folder / "index"


@pytest.fixture(scope="session")
def asgi(store: Path, index: Path, one_mask: int) -> Iterator[Asgi]:
    """One ASGI server for the session, with room for a single materialized mask, and an index."""
    with serving_asgi(store, "--budget", str(one_mask), "--index", str(index)) as running:
        yield running
