"""Real servers as processes of their own, each watched until nothing of it is left."""

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import cascade
from cascade.bundle.format import read, write
from cascade.engine.engine import Engine
from cascade.engine.executors.selection import Kind
from cascade.offline.index import build
from cascade.offline.predict import predict_files
from handlers.torchserve.entrypoint import LOOPBACK, claim_ports
from tests.helpers.paths import ROOT

if TYPE_CHECKING:
    from tests.helpers.asgi_server import Asgi

EXECUTOR: Kind = "onnx"
"""What `auto` takes on most machines; named, so that nothing has to be measured while tests run."""
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients that are made by the hundred: httpx would read all certificates for each."""
CLIENT = httpx.Client(trust_env=False, timeout=60, limits=httpx.Limits(max_connections=None))
SERVE = """
import json, sys
from pathlib import Path
from cascade.errors import CascadeError
from handlers.torchserve.entrypoint import serve
options = json.loads(sys.argv[2])
try:
    serve(sys.argv[1], token_file=Path(options.pop("token_file")), **options)
except CascadeError as e:
    sys.exit(f"error: {e}")
"""


class NotStarted(AssertionError):
    """With all that the server said on stderr."""


@dataclass
class Running:
    """A server process, started and ready."""

    url: str
    metrics_url: str
    management_url: str
    process: "subprocess.Popen[str]"
    folder: Path
    """Its TMPDIR: whatever it writes lies there."""

    @property
    def headers(self) -> dict[str, str]:
        """The token for predictions, as it was handed out; nothing without authorization."""
        token = self.folder / "token"
        return {"Authorization": f"Bearer {token.read_text().strip()}"} if token.exists() else {}

    def keys(self) -> dict[str, dict[str, str]]:
        """TorchServe's own key file; {} without authorization."""
        found = list(self.folder.glob("cascade-*/key_file.json"))
        return dict(json.loads(found[0].read_text())) if found else {}

    def workers(self) -> list[dict[str, Any]]:
        """What TorchServe says of its workers."""
        keys = self.keys()
        headers = {"Authorization": f"Bearer {keys['management']['key']}"} if keys else {}
        (model,) = CLIENT.get(self.management_url, headers=headers).raise_for_status().json()
        return list(model["workers"])

    def processes(self) -> list[int]:
        """Every living process that was started with our TMPDIR, orphans among them."""
        mark = f"TMPDIR={self.folder}".encode()
        found = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # of somebody else, or gone in the meantime; a zombie's is empty
                if mark in environment.read_bytes():
                    found.append(int(environment.parent.name))
        return found

    def listening(self) -> set[tuple[str, int]]:
        """Addresses on which they take connections: the IP as the kernel writes it, and the port."""
        sockets = set()
        for pid in self.processes():
            with suppress(FileNotFoundError):  # gone in the meantime
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with suppress(OSError):
                        sockets.add(os.readlink(link))
        found = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for row in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, *rest = row.split()
                if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                    ip, port = local.split(":")
                    found.add((ip, int(port, 16)))
        return found

    def end(self, number: int, within: float = 60) -> int:
        """Send the signal and wait for the end; gives the exit status."""
        self.process.send_signal(number)
        return self.process.wait(within)

    def metrics(self) -> dict[str, float]:
        """Every sample, as `name{label=value,...}` with the labels in order."""
        text = CLIENT.get(self.metrics_url, headers=self.headers).raise_for_status().text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {
            name + (f"{{{','.join(f'{k}={v}' for k, v in sorted(labels.items()))}}}" if labels else ""): value
            for name, labels, value, *_ in samples
        }


def environment(folder: Path) -> dict[str, str]:
    """A server's: with the executor that most people will have, nothing but the system on its path."""
    return os.environ | {"CASCADE_EXECUTOR": EXECUTOR, "TMPDIR": str(folder), "PATH": "/usr/bin:/bin"}


@contextmanager
def serving(
    store: Path | str, host: str = LOOPBACK, env: Mapping[str, str] = {}, place: str = "/tmp", **options: object
) -> Iterator[Running]:
    """Run `serve` until the block ends; then nothing of it may be left, neither process nor file.

    Args:
        env: more for its environment. place: where its folder is made, a short path.
        options: of `serve`.
    """
    port, metrics_port, management_port = claim_ports((host, 0), (host, 0), (LOOPBACK, 0))
    ports = {"port": port, "metrics_port": metrics_port, "management_port": management_port}
    folder = Path(tempfile.mkdtemp(prefix="e2e-", dir=place))  # short: sockets lie in it
    rest = {"host": host, "token_file": str(folder / "token")}
    command = [sys.executable, "-c", SERVE, str(store), json.dumps(ports | rest | options)]
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env={**environment(folder), **env},
        )
    server = Running(
        f"http://{LOOPBACK}:{port}/predictions/cascade",
        f"http://{LOOPBACK}:{metrics_port}/metrics",
        f"http://{LOOPBACK}:{management_port}/models/cascade",
        process,
        folder,
    )
    assert process.stdout is not None
    try:
        if not process.stdout.readline().startswith("ready"):
            raise NotStarted((folder / "stderr").read_text())
        yield server
        if process.poll() is None:
            assert server.end(signal.SIGTERM) == 0, (folder / "stderr").read_text()
        left = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in server.processes()]
        files = [path.name for path in folder.iterdir() if path.name != "stderr"]
        assert (left, files) == ([], [])
    finally:
        for pid in server.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def engine(bundle_path: Path) -> Engine:
    """The same bundle without a server, to compare with."""
    return cascade.load(bundle_path, executor=EXECUTOR)


@pytest.fixture(scope="session")
def store(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good bundles, `one` and `two` (which has no thumbnails), and one with a flipped byte, `broken`."""
    store = tmp_path_factory.mktemp("store")
    for name in ("one", "broken"):
        shutil.copytree(bundle_path, store / name / "1")
    write(replace(read(bundle_path), thumbnails=None), store / "two" / "1")
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
def server(store: Path, one_mask: int) -> Iterator[Running]:
    """One server for the session, with room for a single materialized mask."""
    start = time.perf_counter()
    with serving(store, budget_bytes=one_mask) as running:
        print(f"TorchServe was ready after {time.perf_counter() - start:.1f} s")
        yield running


@pytest.fixture(scope="session")
def indexed() -> list[Path]:
    """What the ASGI server's index is over."""
    return sorted((ROOT / "tests" / "data" / "photos").glob("*.png"))


@pytest.fixture(scope="session")
def index(store: Path, indexed: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos' embeddings by bundle `one`."""
    folder = tmp_path_factory.mktemp("index")
    engine = cascade.load(store / "one" / "1", executor=EXECUTOR)
    predict_files(engine, indexed, folder / "out", embedding="float16")
    build(folder / "out", folder / "index")
    return folder / "index"


@pytest.fixture(scope="session")
def asgi(store: Path, index: Path, one_mask: int) -> "Iterator[Asgi]":
    """One ASGI server for the session, with room for a single materialized mask, and an index."""
    from tests.helpers.asgi_server import serving_asgi

    with serving_asgi(store, "--budget", str(one_mask), "--index", str(index)) as running:
        yield running
