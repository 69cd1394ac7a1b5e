"""`cascade serve --frontend asgi` as a process of its own, watched until nothing of it is left."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from handlers.torchserve.entrypoint import LOOPBACK, claim_ports
from tests.e2e.conftest import CLIENT, ROOT, NotStarted, Running, environment


@dataclass
class Asgi(Running):
    """As the TorchServe of the other tests; ``url`` is where images are posted."""

    @property
    def base(self) -> str:
        return self.url.removesuffix("/v1/predict")

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.url)
        return url.host, url.port or 80

    def worker(self) -> psutil.Process:
        """The engine process; there must be one, and no other child."""
        (child,) = psutil.Process(self.process.pid).children(recursive=True)
        return child

    def log(self) -> str:
        return (self.folder / "stderr").read_text()

    def answers(self) -> bool:
        """Whether it is ready."""
        try:
            return CLIENT.get(f"{self.base}/v2/health/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False


@contextmanager
def serving_asgi(
    store: Path | str, *options: str, host: str = LOOPBACK, env: Mapping[str, str] = {}, place: str = "/tmp"
) -> Iterator[Asgi]:
    """Run the command until the block ends; then nothing of it may be left, neither process nor file.

    Arguments as of `tests.e2e.conftest.serving`; options of the command.
    """
    (port,) = claim_ports((host, 0))
    folder = Path(tempfile.mkdtemp(prefix="e2e-", dir=place))
    command = [sys.executable, "-m", "cascade.cli.main", "serve", "--frontend", "asgi", "--model-store", str(store)]
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [*command, "--host", host, "--port", str(port), *options],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env={**environment(folder), **env},
        )
    base = f"http://{LOOPBACK}:{port}"
    server = Asgi(f"{base}/v1/predict", f"{base}/metrics", f"{base}/v2/health/ready", process, folder)
    assert process.stdout is not None
    try:
        if not process.stdout.readline().startswith("ready"):
            raise NotStarted(server.log())
        yield server
        if process.poll() is None:
            assert server.end(signal.SIGTERM) == 0, server.log()
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
