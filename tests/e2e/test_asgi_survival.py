"""What the ASGI front end must survive; each in a short form, and in its whole form with ``make soak``."""

import json
import os
import random
import shutil
import signal
import socket
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

import cascade
from cascade.bundle.format import write
from tests.helpers.asgi_server import Asgi, serving_asgi
from tests.helpers.bundles import handmade
from tests.helpers.hostile_images import bomb, mutated
from tests.helpers.http import encoded
from tests.helpers.load import Load
from tests.helpers.servers import CLIENT, EXECUTOR
from tests.helpers.torments import (
    NO_FILES,
    Clock,
    Shelf,
    full_disk,
    jumps,
    put,
    remote,
    sampled,
    settled,
    short_and_whole,
    small_disk,
    take,
    terminated,
    told_of,
    until,
)

pytestmark = pytest.mark.e2e


MIB = 2**20


@pytest.fixture(scope="module")
def survivor(store: Path) -> Iterator[Asgi]:
    """A server of its own for these tests: it is killed and flooded."""
    with serving_asgi(store, "--log-level", "warning", "--queue", "32") as running:
        yield running


@pytest.mark.parametrize("times", short_and_whole(1, 10))
def test_killed_under_load(survivor: Asgi, photos: list[bytes], times: int) -> None:
    """Every request is answered or cleanly failed, and the next engine serves within ten seconds or so."""
    load = Load(survivor, photos, 8).start()
    took = []
    for _ in range(times):
        load.more()
        worker = survivor.worker()
        worker.kill()
        start = time.monotonic()
        worker.wait(60)
        until(survivor.answers)
        took.append(time.monotonic() - start)
        assert survivor.worker().pid != worker.pid
    load.more()
    statuses = load.stop()
    print(f"killed {times} times: serving again after {', '.join(f'{s:.1f}' for s in took)} s; answers {statuses}")
    assert statuses.keys() <= {200, 0}, "nobody got a wrong status: connections broke, or waited"
    assert statuses[0] <= 8 * times, "what was in progress, and nothing else"
    assert load.wrong == []
    assert len(survivor.processes()) == 2, "the supervisor and one engine"
    assert sorted(took)[len(took) // 2] < 60, "10 s on a quiet machine (docs/reliability.md)"


@pytest.mark.parametrize("seconds", short_and_whole(1, 120))
def test_twice_the_load_that_it_carries(survivor: Asgi, photos: list[bytes], seconds: int) -> None:
    """Accepted requests are answered in bounded time, the others are refused at once, and then all is as before."""
    calm = Load(survivor, photos, 4).start()
    calm.more()
    assert calm.stop().keys() == {200}
    load = Load(survivor, photos, 160).start()  # the queue holds 32 images, a pass 32 more
    time.sleep(seconds)
    settled(lambda: len(load.statuses) > 1, 60)  # a slow machine starts them slowly
    load.stop()
    accepted = sorted(a.seconds for a in load.answers if a.status == 200)
    refused = sorted(
        answer.seconds for answer in load.answers if answer.status in (429, 503)
    )  # its share, or the queue
    assert len(accepted) + len(refused) == len(load.answers) and accepted and refused
    print(
        f"{len(accepted)} answered, p99 {accepted[len(accepted) * 99 // 100]:.2f} s;"
        f" {len(refused)} refused, p50 {refused[len(refused) // 2]:.3f} s"
    )
    assert accepted[-1] < 60 and refused[len(refused) // 2] < 10
    after = Load(survivor, photos, 4).start()
    after.more()
    assert after.stop().keys() == {200}, "recovered at once"


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    """The shelved server's."""
    return Clock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def shelved(shelf: Path, clock: Clock) -> Iterator[Asgi]:
    """A server that follows it."""
    env = {**clock.environment, **NO_FILES}
    with serving_asgi(shelf, "--poll", "0.1", "--log-level", "warning", env=env) as server:
        yield server


@pytest.mark.parametrize("times", short_and_whole(1, 20))
def test_versions_come_and_go_under_load(
    shelved: Asgi, shelf: Path, cifar: list[Image.Image], photos: list[bytes], tmp_path: Path, times: int
) -> None:
    """Not one failed answer, and each is of the version that it names."""
    aside = tmp_path / "aside"
    want = {}
    for version, seed in (("1", 0), ("2", 1)):
        path = write(handmade(cifar[:20], seed=seed), aside / "rolled" / version)
        want[version] = cascade.load(path, executor=EXECUTOR).predict(photos, cascade.Options(embedding=True))
    seen: Counter[str] = Counter()
    done = threading.Event()

    def client(number: int) -> None:
        i = number
        with cascade.Client(shelved.base) as http:
            while not done.is_set():
                i = (i + 1) % 10
                if i % 2:
                    found = http.infer([photos[i], photos[i - 1]], "rolled")
                    got, version = found["embedding"][0], found["version"]
                else:
                    answer = http.predict(photos[i], cascade.Options("rolled", embedding=True))
                    assert isinstance(answer, cascade.Prediction), answer
                    got, version = answer.embedding, answer.version
                expected = want[version][i]
                assert isinstance(expected, cascade.Prediction) and expected.embedding is not None
                np.testing.assert_allclose(got, expected.embedding, atol=1e-3)
                seen[version] += 1

    def shows(versions: list[str]) -> bool:
        return CLIENT.get(f"{shelved.base}/v2/models/rolled").json().get("versions") == versions

    def answered(version: str) -> None:
        before = seen[version]
        until(lambda: seen[version] > before + 20 or any(each.done() for each in clients))  # done: with a fault

    put(aside / "rolled" / "1", shelf / "rolled" / "1")
    until(lambda: shows(["1"]))
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, i) for i in range(4)]
        try:
            for _ in range(times):
                (aside / "rolled" / "2").rename(shelf / "rolled" / "2")
                until(lambda: shows(["1", "2"]))
                answered("2")
                (shelf / "rolled" / "2").rename(aside / "rolled" / "2")
                until(lambda: shows(["1"]))
                answered("1")
        finally:
            done.set()
        for each in clients:
            each.result()
    take(shelf / "rolled")
    print(f"rolled out and back {times} times: answers by version {dict(seen)}")
    assert min(seen["1"], seen["2"]) > 20 * times


def test_a_store_that_goes_wrong_disturbs_nothing(shelved: Asgi, shelf: Path, photos: list[bytes]) -> None:
    """Truncated, half-copied and foreign bundles are refused by name; a store that is away changes nothing."""

    def state(name: str) -> str:
        models = CLIENT.get(f"{shelved.base}/v2/models").raise_for_status().json()["models"]
        states = [each["state"]["1"] for each in models if each["name"] == name]
        return str(states[0].get("reason", states[0]["state"])) if states else "unknown"

    def drop(name: str, spoil: Callable[[Path], object]) -> str:
        staging = shelf / f".{name}"
        shutil.copytree(shelf / "one" / "1", staging / "1")
        spoil(staging / "1")
        staging.rename(shelf / name)
        until(lambda: state(name) not in ("unknown", "loading"))
        found = state(name)
        take(shelf / name)
        return found

    def largest(folder: Path) -> Path:
        return max(folder.iterdir(), key=lambda path: path.stat().st_size)

    load = Load(shelved, photos, 2, bundles=("one",)).start()
    truncated = drop("truncated", lambda folder: os.truncate(largest(folder), 1000))
    half = drop("half", lambda folder: largest(folder).unlink())
    foreign = drop("foreign", lambda folder: (folder / "cascade.json").write_text('{"format": 99}'))
    assert drop("good", lambda folder: None) == "ready"
    shelf.rename(shelf.with_name("away"))
    until(lambda: shelved.metrics()["cascade_store_unreachable"] == 1)
    assert shelved.answers()
    shelf.with_name("away").rename(shelf)
    until(lambda: shelved.metrics()["cascade_store_unreachable"] == 0)
    load.more()
    assert load.stop().keys() == {200}
    for name, reason in (("truncated", truncated), ("half", half), ("foreign", foreign)):
        assert reason not in ("ready", "removed") and told_of(shelved, f"refused bundle {name}/1: "), reason
    print(f"truncated: {truncated}\nhalf-copied: {half}\nforeign: {foreign}")


def test_the_clock_jumps(shelved: Asgi, clock: Clock, shelf: Path, photos: list[bytes]) -> None:
    """Of the supervisor and of the engine: years ahead, years back, and right again."""
    load = Load(shelved, photos, 4, bundles=("one",)).start()
    jumps(shelved, clock, shelf)
    load.more()
    assert load.stop().keys() == {200} and load.wrong == []
    assert max(answer.seconds for answer in load.answers) < 60


@pytest.mark.parametrize("times", short_and_whole(1, 5))
def test_killed_without_a_store_and_with_a_full_disk(
    shelved: Asgi, shelf: Path, photos: list[bytes], times: int
) -> None:
    """It says why it does not come back, comes back with the store, and needs no disk to serve."""
    for _ in range(times):
        before = len(shelved.log())
        shelf.rename(shelf.with_name("elsewhere"))
        shelved.worker().kill()
        until(lambda before=before: "is it mounted?" in shelved.log()[before:])  # type: ignore[misc]
        with full_disk(shelved):
            shelf.with_name("elsewhere").rename(shelf)
            until(shelved.answers)
            load = Load(shelved, photos, 4, bundles=("one",)).start()
            load.more()
            assert load.stop().keys() == {200} and load.wrong == []


@pytest.mark.parametrize("failing", short_and_whole("503", "silence"))
def test_a_remote_store_a_killed_engine_and_the_end(
    store: Path,
    tmp_path: Path,
    photos: list[bytes],
    cifar: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    failing: Literal["503", "silence"],
) -> None:
    """An engine that starts while the store is down takes the copies on this machine, and fetches nothing twice.

    At the end a SIGTERM under load: what was sent before is answered, and nothing stays.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(store / "one", tmp_path / "shelf" / "one")
    options = ("--poll", "0.3", "--log-level", "warning", "--drain", "60")
    with remote(tmp_path / "shelf") as url, serving_asgi(url, *options) as server:
        copies = sorted(Shelf.fetched)
        assert copies and len(copies) == len(set(copies))
        Shelf.fail(failing)
        until(lambda: server.metrics()["cascade_store_unreachable"] == 1)
        server.worker().kill()
        until(server.answers)
        load = Load(server, photos, 4, bundles=("one",)).start()
        load.more()
        assert load.stop().keys() == {200}
        Shelf.mend()
        until(lambda: server.metrics()["cascade_store_unreachable"] == 0)
        assert sorted(Shelf.fetched) == copies
        print(terminated(server, photos, encoded(cifar[0], "jpeg", (6000, 6000))))


@pytest.mark.soak
def test_a_disk_filled_to_the_last_block(store: Path, photos: list[bytes]) -> None:
    """What the server itself writes lies there; an engine that is killed comes back, too."""
    place = Path(tempfile.gettempdir(), "e2e-disk-asgi")
    with small_disk(place) as fill, serving_asgi(store, place=str(place)) as server:
        fill()
        load = Load(server, photos, 4).start()
        time.sleep(3)
        assert load.stop().keys() == {200}
        server.worker().kill()
        until(server.answers)
        after = Load(server, photos, 4).start()
        time.sleep(3)
        assert after.stop().keys() == {200}
        (place / "filling").unlink()


def refused(answer: httpx.Response) -> None:
    """A 503 says when to come again."""
    assert answer.status_code != 503 or int(answer.headers["retry-after"]) >= 1


class Hostile:
    """Requests by strangers, of ten kinds."""

    def __init__(self, photos: list[bytes], cifar: list[Image.Image]) -> None:
        picture = cifar[0].resize((200, 200))
        self.files = [*photos, *(encoded(picture, kind) for kind in ("jpeg", "webp", "png"))]
        self.bombs = [bomb(60_000), bomb(16_000), bomb(6_300), encoded(cifar[0], "jpeg", (8000, 5000))]

    def request(self, base: str, draw: random.Random) -> httpx.Request:
        name = {"X-Cascade-Bundle": "one"}
        predict, infer = f"{base}/v1/predict", f"{base}/v2/models/one/infer"
        match draw.randrange(10):
            case 0 | 1 | 2 | 3:
                return httpx.Request("POST", predict, content=mutated(draw.choice(self.files), draw), headers=name)
            case 4:
                return httpx.Request("POST", predict, content=draw.randbytes(draw.randrange(5000)), headers=name)
            case 5:
                kinds = ("application/json", "multipart/form-data; boundary=x", "text/html", ";;=", "a" * 5000)
                headers = name | {"Content-Type": draw.choice(kinds)}
                body = draw.choice((b"{}", b"[" * 5000, b"--x\r\n\r\n", b'{"image": 3}', b"\xff\xfe"))
                return httpx.Request("POST", predict, content=body, headers=headers)
            case 6:
                headers = name | {f"X-{i}": "y" * draw.choice((1, 100, 30_000)) for i in range(draw.choice((1, 500)))}
                return httpx.Request("POST", predict, content=self.files[0], headers=headers)
            case 7:
                shape = [draw.choice((0, 1, -1, 10**18))] * draw.randrange(4)
                tensor = {"name": draw.choice(("image", "pixels")), "shape": shape, "datatype": "BYTES", "data": [1]}
                return httpx.Request("POST", infer, json={"inputs": [tensor]})
            case 8:
                body, length = mutated(self.binary(draw), draw), str(draw.choice((0, 10, 100, 10**9)))
                headers = {"Inference-Header-Content-Length": length}
                return httpx.Request("POST", infer, content=body, headers=headers)
            case _:
                if draw.random() < 0.1:
                    return httpx.Request("POST", predict, content=draw.choice(self.bombs), headers=name)
                path = "/" + "".join(draw.choice("ab/%._~?\u00e9") for _ in range(draw.randrange(40)))
                return httpx.Request(
                    draw.choice(("GET", "POST", "DELETE", "PATCH", "TRACE")), base + path.replace("#", "")
                )

    def binary(self, draw: random.Random) -> bytes:
        data = draw.choice(self.files)
        tensor = {"name": "image", "shape": [1], "datatype": "BYTES"}
        head = {"inputs": [tensor | {"parameters": {"binary_data_size": len(data) + 4}}]}
        return json.dumps(head).encode() + struct.pack("<I", len(data)) + data


@pytest.mark.parametrize("count", short_and_whole(300, 10_000))
def test_hostile_requests(survivor: Asgi, photos: list[bytes], cifar: list[Image.Image], count: int) -> None:
    """No 5xx other than overload, no crash, and memory back to where it was."""
    hostile = Hostile(photos, cifar)
    worker = survivor.worker()
    statuses: Counter[int] = Counter()

    def send(seed: int) -> None:
        try:
            answer = CLIENT.send(hostile.request(survivor.base, random.Random(seed)))
        except httpx.TransportError:  # refused while it was still sending
            statuses[0] += 1
            return
        statuses[answer.status_code] += 1
        assert answer.status_code < 500 or answer.status_code == 503, answer.text
        assert b"Traceback" not in answer.content
        refused(answer)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(200)))  # what a first time costs: arenas, codecs, caches
        time.sleep(3)  # an idle moment: it gives back what it no longer needs
        before = worker.memory_info().rss
        list(pool.map(send, range(1000, 1000 + count)))
    settled(lambda: worker.memory_info().rss < before + 20 * MIB, 5)
    grown = (worker.memory_info().rss - before) / MIB
    print(f"{count} hostile requests: {dict(sorted(statuses.items()))}, memory {grown:+.0f} MiB")
    assert statuses[0] <= sum(statuses.values()) // 20
    assert statuses[200] and statuses[400] and statuses[404] and statuses[413] and statuses[431]
    assert survivor.worker().pid == worker.pid and survivor.answers()
    assert grown < 100
    until(lambda: survivor.metrics()["cascade_queue_depth"] == 0)


@pytest.mark.parametrize("clients", short_and_whole(100, 800))
def test_slow_bodies_do_not_keep_others_out(survivor: Asgi, photos: list[bytes], clients: int) -> None:
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nX-Cascade-Bundle: one\r\nContent-Length: 100000\r\n\r\n"
    slow = [socket.create_connection(survivor.address, timeout=60) for _ in range(clients)]
    try:
        for connection in slow:
            connection.sendall(head + b"x")
        for _ in range(5):
            answer = CLIENT.post(survivor.url, content=photos[0], headers={"X-Cascade-Bundle": "one"})
            assert answer.status_code == 200
        if clients > 100:
            assert slow[0].recv(100).startswith(b"HTTP/1.1 408 "), "after half a minute"
    finally:
        for connection in slow:
            connection.close()
    assert survivor.answers()


def test_who_hangs_up_leaves_its_place(survivor: Asgi, photos: list[bytes], cifar: list[Image.Image]) -> None:
    """In the queue, among the bodies and among the requests in progress (tests/handlers: it costs no pass either)."""
    file = encoded(cifar[0], "png")
    head = (
        f"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nX-Cascade-Bundle: one\r\nContent-Length: {len(file)}\r\n\r\n"
    )
    load = Load(survivor, photos, 16).start()
    for i in range(200):
        with socket.create_connection(survivor.address, timeout=60) as connection:
            connection.sendall(head.encode() + (file if i % 3 else file[:100]))
            time.sleep(0.01 * (i % 2))
    assert load.stop().keys() <= {200, 429, 503}
    until(lambda: survivor.metrics()["cascade_queue_depth"] == 0)
    after = Load(survivor, photos, 16).start()
    after.more(32)
    assert after.stop().keys() == {200}, "all places of the queue are free"


@pytest.mark.parametrize("examples", short_and_whole(8, 500))
def test_schemathesis(survivor: Asgi, examples: int) -> None:
    """Whatever the description allows, and much that it does not: no 5xx, and answers as they are described."""
    import hypothesis
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

    schema = schemathesis.openapi.from_url(f"{survivor.base}/openapi.json")
    checks = [not_a_server_error, content_type_conformance, status_code_conformance]
    seen: Counter[str] = Counter()

    for found in schema.get_all_operations():
        operation = found.ok()  # type: ignore[union-attr]

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def run(case: "schemathesis.Case") -> None:
            seen[case.path] += 1
            case.call_and_validate(checks=checks)

        run()
    assert len(seen) >= 10 and sum(seen.values()) > 5 * len(seen)
    assert survivor.answers()


def test_a_killed_supervisor_takes_the_engine_with_it(survivor: Asgi) -> None:
    """The last test of this server."""
    worker = survivor.worker()
    survivor.end(signal.SIGKILL)
    worker.wait(60)
    until(lambda: survivor.processes() == [])


@pytest.mark.soak
def test_ten_minutes_at_speed(store: Path, photos: list[bytes]) -> None:
    """As many requests as fit (SOAK_MINUTES for another while): memory is flat."""
    with serving_asgi(store, "--log-level", "warning") as server:
        processes = {"engine": server.worker(), "supervisor": psutil.Process(server.process.pid)}
        load = Load(server, photos, 16).start()
        memory = sampled(processes)
        statuses = load.stop()
    print(f"{dict(statuses)} answers; {memory}")
    assert statuses.keys() == {200}
