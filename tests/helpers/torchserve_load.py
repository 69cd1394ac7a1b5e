"""Load on TorchServe."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx

from tests.helpers.servers import NO_TLS
from tests.helpers.torchserve_server import TorchServe
from tests.helpers.torments import until


@dataclass
class Load:
    """Clients in threads that ask for the bundle ``one`` (two thirds of them) and ``two``, without a version.

    Attributes:
        answers: (when sent, seconds, status or 0 for a broken connection, version of ``one``).
        wrong: answers that another bundle or version made than they say.
    """

    server: TorchServe
    photos: list[bytes]
    clients: int = 6
    answers: list[tuple[float, float, int, str | None]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> "Load":
        self._threads = [threading.Thread(target=self._client, args=(i,)) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    @property
    def statuses(self) -> Counter[int]:
        return Counter(status for _, _, status, _ in self.answers)

    def more(self, count: int = 12, version: str | None = None) -> None:
        """Wait until that many more good answers (of ``one`` in this version) have come."""

        def good() -> int:
            return sum(s == 200 and version in (None, v) for _, _, s, v in list(self.answers))

        before = good()
        until(lambda: good() >= before + count)

    def _client(self, number: int) -> None:
        bundle = "two" if number % 3 == 2 else "one"
        headers = self.server.headers | {"Content-Type": "image/png", "X-Cascade-Bundle": bundle}
        with httpx.Client(trust_env=False, timeout=120, verify=NO_TLS) as http:
            while not self._done.is_set():
                begin = time.monotonic()
                status, version = 0, None
                try:
                    response = http.post(self.server.url, content=self.photos[number % 10], headers=headers)
                    status = response.status_code
                    if status == 200:
                        version = self._checked(bundle, response)
                except httpx.TransportError:
                    pass
                self.answers.append((begin, time.monotonic() - begin, status, version))
                if status != 200:
                    time.sleep(0.02)

    def _checked(self, bundle: str, response: httpx.Response) -> str | None:
        """Version 2 has other names for its labels: an answer shows which one made it."""
        answer = response.json()
        made_by = "2" if answer["labels"][0]["name"].startswith("new-") else "1"
        if (answer["bundle"], answer["version"]) != (bundle, made_by):
            self.wrong.append(response.text)
        return str(answer["version"]) if bundle == "one" else None
