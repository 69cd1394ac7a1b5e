"""A real server as a process of its own, watched until nothing of it is left."""

import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
from prometheus_client.parser import text_string_to_metric_families

from cascade.engine.executors.selection import Kind
from tests.helpers.paths import ROOT

EXECUTOR: Kind = "onnx"
"""What `auto` takes on most machines; named, so that nothing has to be measured while tests run."""
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For clients that are made by the hundred: httpx would read all certificates for each."""
CLIENT = httpx.Client(trust_env=False, timeout=60, limits=httpx.Limits(max_connections=None))


class NotStarted(AssertionError):
    """With all that the server said on stderr."""


@dataclass
class Running:
    """A server process, started and ready."""

    url: str
    """Where images are posted."""
    metrics_url: str
    process: "subprocess.Popen[str]"
    folder: Path
    """Its TMPDIR, where it writes."""

    @property
    def headers(self) -> dict[str, str]:
        """The token for predictions, as it was handed out; nothing without authorization."""
        token = self.folder / "token"
        return {"Authorization": f"Bearer {token.read_text().strip()}"} if token.exists() else {}

    def log(self) -> str:
        return (self.folder / "stderr").read_text()

    def processes(self) -> list[int]:
        """Every living process that was started with our TMPDIR, orphans among them."""
        mark = f"TMPDIR={self.folder}".encode()
        pids = []
        for environment in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # of somebody else, or gone in the meantime; a zombie's is empty
                if mark in environment.read_bytes():
                    pids.append(int(environment.parent.name))
        return pids

    def listening(self) -> set[tuple[str, int]]:
        """Addresses on which they take connections: the IP as the kernel writes it, and the port."""
        sockets = set()
        for pid in self.processes():
            with suppress(FileNotFoundError):  # gone in the meantime
                for link in Path(f"/proc/{pid}/fd").iterdir():
                    with suppress(OSError):
                        sockets.add(os.readlink(link))
        addresses = set()
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            for row in Path(table).read_text().splitlines()[1:]:
                _, local, _, state, *rest = row.split()
                if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                    ip, port = local.split(":")
                    addresses.add((ip, int(port, 16)))
        return addresses

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


Server = TypeVar("Server", bound=Running)


@contextmanager
def watched(
    command: Callable[[Path], Sequence[str]],
    server: Callable[["subprocess.Popen[str]", Path], Server],
    env: Mapping[str, str] = {},
    place: str = "/tmp",
    cwd: Path = ROOT,
) -> Iterator[Server]:
    """Run a server until the block ends; then nothing of it may be left, neither process nor file.

    Args:
        command: its arguments after ``python``, given its folder.
        server: describes the process, which may not be ready yet, and its folder.
        env: more for its environment: the executor that most people will have, nothing but the system on its path.
        place: where its folder is made, a short path. cwd: where the command is typed.
    """
    folder = Path(tempfile.mkdtemp(prefix="e2e-", dir=place))  # short: sockets lie in it
    own = {"CASCADE_EXECUTOR": EXECUTOR, "TMPDIR": str(folder), "PATH": "/usr/bin:/bin"}
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *command(folder)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=cwd,
            env={**os.environ, **own, **env},
        )
    running = server(process, folder)
    assert process.stdout is not None
    try:
        if not process.stdout.readline().startswith("ready"):
            raise NotStarted(running.log())
        yield running
        if process.poll() is None:
            assert running.end(signal.SIGTERM) == 0, running.log()
        left = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in running.processes()]
        files = [path.name for path in folder.iterdir() if path.name != "stderr"]
        assert (left, files) == ([], []), (left, files)
    finally:
        for pid in running.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        shutil.rmtree(folder)
