"""Load on an ASGI server."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

from tests.helpers.servers import NO_TLS
from tests.helpers.torments import until


@dataclass
class Load:
    """Clients in threads that ask one image after the other until told to stop.

    Attributes:
        key: an API key; None for none.
        answers: (when sent, seconds, status or 0 for a broken connection).
    """

    url: str
    photos: list[bytes]
    bundles: tuple[str, ...] = ("one", "two")
    key: str | None = None
    answers: list[tuple[float, float, int]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self, clients: int) -> "Load":
        self._threads = [threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(clients)]
        for thread in self._threads:
            thread.start()
        return self

    def more(self, count: int = 12) -> None:
        """Wait until that many more good answers have come."""

        def good() -> int:
            return sum(status == 200 for _, _, status in self.answers)

        before = good()
        until(lambda: good() >= before + count)

    def stop(self) -> Counter[int]:
        """How often each status came."""
        self._done.set()
        for thread in self._threads:
            thread.join()
        return Counter(status for _, _, status in self.answers)

    def _client(self, number: int) -> None:
        bundle = self.bundles[number % len(self.bundles)]
        headers = {"Content-Type": "image/png", "X-Cascade-Bundle": bundle}
        headers |= {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        with httpx.Client(trust_env=False, timeout=120, verify=NO_TLS) as http:
            while not self._done.is_set():
                start = time.monotonic()
                try:
                    response = http.post(self.url, content=self.photos[number % 10], headers=headers)
                    status = response.status_code
                    if status == 200 and response.json()["bundle"] != bundle:
                        self.wrong.append(response.text)
                except httpx.TransportError:
                    status = 0
                self.answers.append((start, time.monotonic() - start, status))
                if status != 200:
                    time.sleep(0.02)
