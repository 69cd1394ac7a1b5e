"""Load on a server of either front end."""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import httpx

from cascade.bundle.format import Bundle
from tests.helpers.servers import NO_TLS, Running
from tests.helpers.torments import until

NEW = "new-"


class Answer(NamedTuple):
    """Seconds that it took, its status (0: a broken connection), and the bundle that made it, as ``name/version``."""

    seconds: float
    status: int
    made_by: str = ""


def second_version(bundle: Bundle) -> Bundle:
    """The bundle with other names for its labels, so that an answer shows which version made it."""
    classes = [NEW + name for name in bundle.card.classes]
    return replace(bundle, card=bundle.card.model_copy(update={"classes": classes}))


@dataclass
class Load:
    """Clients in threads that ask one image after the other: in a ``with`` block, or from ``start`` to ``stop``.

    Attributes:
        clients: how many, which ask for the ``bundles`` in turns, without a version.
        key: an API key; None for the server's own token, if it has one.
        wrong: answers that another bundle or version made than was asked for, or than they say: version 2 is a
            ``second_version``.
    """

    server: Running
    photos: list[bytes]
    clients: int = 6
    bundles: tuple[str, ...] = ("one", "two")
    key: str | None = None
    answers: list[Answer] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def statuses(self) -> Counter[int]:
        """How often each status came."""
        return Counter(answer.status for answer in list(self.answers))

    def start(self) -> Self:
        self._threads = [threading.Thread(target=self._client, args=(i,), daemon=True) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def more(self, count: int = 12, made_by: str | None = None) -> None:
        """Wait until that many more good answers (of this bundle) have come."""

        def good() -> int:
            return sum(a.status == 200 and made_by in (None, a.made_by) for a in list(self.answers))

        before = good()
        until(lambda: good() >= before + count)

    def stop(self) -> Counter[int]:
        self._done.set()
        for thread in self._threads:
            thread.join()
        return self.statuses

    def _client(self, number: int) -> None:
        bundle = self.bundles[number % len(self.bundles)]
        headers = self.server.headers if self.key is None else {"Authorization": f"Bearer {self.key}"}
        headers = headers | {"Content-Type": "image/png", "X-Cascade-Bundle": bundle}
        with httpx.Client(trust_env=False, timeout=120, verify=NO_TLS) as http:
            while not self._done.is_set():
                begin = time.monotonic()
                status, made_by = 0, ""
                try:
                    response = http.post(self.server.url, content=self.photos[number % 10], headers=headers)
                    status = response.status_code
                    if status == 200:
                        made_by = self._made_by(bundle, response)
                except httpx.TransportError:
                    pass
                self.answers.append(Answer(time.monotonic() - begin, status, made_by))
                if status != 200:
                    time.sleep(0.02)

    def _made_by(self, bundle: str, response: httpx.Response) -> str:
        answer = response.json()
        version = "2" if answer["labels"][0]["name"].startswith(NEW) else "1"
        if (answer["bundle"], answer["version"]) != (bundle, version):
            self.wrong.append(response.text)
        return f"{answer['bundle']}/{answer['version']}"
