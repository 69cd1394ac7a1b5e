"""`cascade serve --frontend asgi` in a process of its own."""

import subprocess
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from handlers.torchserve.entrypoint import LOOPBACK, claim_ports
from tests.helpers.servers import CLIENT, Running, watched


@dataclass
class Asgi(Running):
    """An ASGI server whose engine is ready."""

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

    def answers(self) -> bool:
        """Whether it is ready."""
        try:
            return CLIENT.get(f"{self.base}/v2/health/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False


def serving_asgi(
    store: Path | str, *options: str, host: str = LOOPBACK, env: Mapping[str, str] = {}, place: str = "/tmp"
) -> AbstractContextManager[Asgi]:
    """Run the command with these options, see `watched`."""
    (port,) = claim_ports((host, 0))
    base = f"http://{LOOPBACK}:{port}"
    command = ["-m", "cascade.cli.main", "serve", "--frontend", "asgi", "--model-store", str(store)]
    command += ["--host", host, "--port", str(port), *options]

    def server(process: "subprocess.Popen[str]", folder: Path) -> Asgi:
        return Asgi(f"{base}/v1/predict", f"{base}/metrics", process, folder)

    return watched(lambda folder: command, server, env, place)
