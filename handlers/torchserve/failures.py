"""Report why a worker does not start: the handler sends the reason to the entrypoint over a local datagram socket.

A datagram needs no disk space, and a reason is always exactly one message.
"""

import socket
from contextlib import suppress
from pathlib import Path

LONGEST = 4096
"""Most bytes of a reason."""


class Failures:
    """The entrypoint's end. Close it when the server ends."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def read(self) -> list[str]:
        """The reasons received since the last call, one per failed start."""
        reasons = []
        with suppress(BlockingIOError):
            while True:
                reasons.append(self._socket.recv(LONGEST).decode(errors="replace"))
        return reasons

    def close(self) -> None:
        """Close the socket; its file is removed with its folder."""
        self._socket.close()


def report(path: str | Path, reason: str) -> None:
    """Send a reason to the entrypoint; it is lost if the entrypoint has ended or does not read."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, suppress(OSError):
        sender.setblocking(False)
        sender.sendto(reason.encode()[:LONGEST], str(path))


def workers(java: int) -> set[int]:
    """The living worker processes of the Java process with this PID."""
    pids = set()
    for children in Path(f"/proc/{java}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has just ended
            pids |= {int(pid) for pid in children.read_text().split() if _is_worker(int(pid))}
    return pids


def _is_worker(pid: int) -> bool:
    with suppress(OSError):
        return b"model_service_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()  # a zombie's is empty
    return False
