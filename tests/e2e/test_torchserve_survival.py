"""What TorchServe with our handler must survive; each in a short form, and in its whole form with ``make soak``."""

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import httpx
import psutil
import pytest
from PIL import Image

from cascade.bundle.format import read, write
from tests.helpers.hostile_images import bomb, mutated
from tests.helpers.http import encoded
from tests.helpers.load import Load, second_version
from tests.helpers.servers import CLIENT, NO_TLS
from tests.helpers.torchserve_server import TorchServe, serving
from tests.helpers.torments import (
    DAY,
    NO_FILES,
    Clock,
    Shelf,
    full_disk,
    jumps,
    put,
    remote,
    said,
    sampled,
    short_and_whole,
    small_disk,
    take,
    terminated,
    told_of,
    until,
)

pytestmark = pytest.mark.e2e


POLL = 0.3


def replaced(server: TorchServe, worker: int) -> bool:
    """Whether another worker than that one is ready."""
    return [w["status"] for w in server.workers() if int(w["pid"]) != worker] == ["READY"]


def gauge(server: TorchServe, name: str) -> float:
    return server.metrics().get(f"cascade_{name}", 0.0)


@pytest.fixture(scope="module")
def shelf(bundle_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of ``one`` and ``two``; beside it (hidden) version 2 of ``one``, whose labels have other names."""
    shelf = tmp_path_factory.mktemp("shelf")
    for name in ("one", "two"):
        shutil.copytree(bundle_path, shelf / name / "1")
    write(second_version(read(bundle_path)), shelf.with_name("aside") / "2")
    return shelf


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Clock:
    """The survivor's."""
    return Clock(tmp_path_factory.mktemp("clock"))


@pytest.fixture(scope="module")
def survivor(shelf: Path, clock: Clock) -> Iterator[TorchServe]:
    """A server of its own for these tests."""
    with serving(shelf, poll=POLL, env={**clock.environment, **NO_FILES}) as server:
        yield server


@pytest.mark.parametrize("times", short_and_whole(1, 20))
def test_rolled_out_and_back_under_load(survivor: TorchServe, shelf: Path, photos: list[bytes], times: int) -> None:
    """Not one answer fails, and each is made by the version that it names."""
    aside, there = shelf.with_name("aside") / "2", shelf / "one" / "2"
    with Load(survivor, photos) as load:
        load.more(made_by="one/1")
        for _ in range(times):
            aside.rename(there)
            load.more(made_by="one/2")
            there.rename(aside)
            load.more(made_by="one/1")
    versions = Counter(answer.made_by for answer in load.answers)
    slowest = max(answer.seconds for answer in load.answers)
    print(f"{times} times out and back: {dict(load.statuses)}, versions {dict(versions)}, slowest {slowest:.2f} s")
    assert load.statuses.keys() == {200} and load.wrong == []
    assert survivor.metrics()["cascade_backbones"] == 1


@pytest.mark.parametrize("times", short_and_whole(1, 10))
def test_bad_bundles_disturb_nothing(survivor: TorchServe, shelf: Path, photos: list[bytes], times: int) -> None:
    """Refused by name, in the log and in the metrics, while all else is served; and forgotten when they are gone."""
    good = shelf / "two" / "1"
    foreign = read(good)
    back = foreign.card.backbone.model_copy(update={"fingerprint": "1" * 64})
    reasons = {
        "corrupted": "its checksum differs from SHA256SUMS",
        "truncated": "its checksum differs from SHA256SUMS",
        "foreign": "was trained on",
        "half-copied": "does not match the files in its folder",
    }
    with Load(survivor, photos) as load:
        for turn in range(times):
            for name in ("corrupted", "truncated", "half-copied"):
                shutil.copytree(good, shelf.with_name("aside") / name)
            masks = shelf.with_name("aside") / "corrupted" / "masks.safetensors"
            raw = bytearray(masks.read_bytes())
            raw[(turn * 4711 + 99) % len(raw)] ^= 4
            masks.write_bytes(raw)
            (shelf.with_name("aside") / "truncated" / "fusion.safetensors").write_bytes(b"")
            (shelf.with_name("aside") / "half-copied" / "heads.safetensors").unlink()
            write(
                replace(foreign, card=foreign.card.model_copy(update={"backbone": back})),
                shelf.with_name("aside") / "foreign",
            )
            for name in reasons:
                (shelf / name).mkdir()
                (shelf.with_name("aside") / name).rename(shelf / name / "1")
            until(lambda: all(gauge(survivor, f"bundle_refused{{bundle={name}}}") == 1 for name in reasons))
            load.more()
            for name in reasons:
                take(shelf / name)
            until(lambda: not any(gauge(survivor, f"bundle_refused{{bundle={name}}}") for name in reasons))
    print(f"{4 * times} bad bundles: {dict(load.statuses)}")
    assert load.statuses.keys() == {200} and load.wrong == []
    for name, reason in reasons.items():
        about = [line["message"] for line in told_of(survivor, f"refused bundle {name}/1: ")]
        assert len(about) >= times and all(reason in line for line in about), (name, about)
    assert gauge(survivor, "bundles{state=ready}") == 2


@pytest.mark.parametrize("times", short_and_whole(1, 5))
def test_a_store_that_goes_and_comes(survivor: TorchServe, shelf: Path, photos: list[bytes], times: int) -> None:
    before = len(said(survivor))
    with Load(survivor, photos) as load:
        for _ in range(times):
            shelf.rename(shelf.with_name("elsewhere"))
            until(lambda: gauge(survivor, "store_unreachable") == 1)
            load.more()
            shelf.with_name("elsewhere").rename(shelf)
            until(lambda: gauge(survivor, "store_unreachable") == 0)
    assert load.statuses.keys() == {200} and load.wrong == []
    until(lambda: len(said(survivor)) >= before + 2 * times)
    lines = [line["message"] for line in said(survivor)[before:]]
    assert len(lines) == 2 * times, "once when it went, once when it came"
    assert all(
        "is it mounted?" in gone and "reachable again" in back
        for gone, back in zip(lines[::2], lines[1::2], strict=True)
    )


def test_the_clock_jumps(survivor: TorchServe, clock: Clock, shelf: Path, photos: list[bytes]) -> None:
    """Of the workers and of who watches them; Java's in the whole form."""
    with Load(survivor, photos) as load:
        load.more()
        jumps(survivor, clock, shelf)
        load.more()
    assert load.statuses.keys() == {200} and load.wrong == []
    assert max(answer.seconds for answer in load.answers) < 60


@pytest.mark.soak
def test_every_clock_jumps(store: Path, photos: list[bytes], tmp_path: Path) -> None:
    shutil.copytree(store / "one", tmp_path / "shelf" / "one")
    shutil.copytree(store / "one", tmp_path / "shelf" / "two")
    clock = Clock(tmp_path, "all")
    with serving(tmp_path / "shelf", poll=POLL, env=clock.environment) as server:
        with Load(server, photos) as load:
            jumps(server, clock, tmp_path / "shelf")
            clock.set(400 * DAY)
            load.more()
        killed = int(server.workers()[0]["pid"])
        os.kill(killed, signal.SIGKILL)
        until(partial(replaced, server, killed))
        clock.set(0)
        with Load(server, photos) as after:
            after.more()
    assert load.statuses.keys() == after.statuses.keys() == {200}


@pytest.mark.parametrize("seconds", short_and_whole(1, 120))
def test_more_load_than_it_carries(survivor: TorchServe, photos: list[bytes], seconds: int) -> None:
    """Accepted requests are answered in bounded time, the others get 503 soon, and afterwards all is as before."""
    with Load(survivor, photos, clients=400) as load:  # the queue holds 256, a batch eight more
        time.sleep(seconds)
        until(lambda: load.statuses.keys() >= {200, 503})  # a slow machine takes its time to start so many
    took = {status: sorted(a.seconds for a in load.answers if a.status == status) for status in (200, 503)}
    accepted, refused = took[200], took[503]
    assert load.statuses.keys() == {200, 503} and load.wrong == []
    print(
        f"{len(accepted)} answered, p99 {accepted[len(accepted) * 99 // 100]:.2f} s;"
        f" {len(refused)} refused, p50 {refused[len(refused) // 2]:.3f} s"
    )
    assert accepted[-1] < 90 and refused[len(refused) // 2] < accepted[len(accepted) // 2], "who waits is answered"
    with Load(survivor, photos) as after:
        after.more()
    assert after.statuses.keys() == {200}, "recovered at once"


@pytest.mark.parametrize("times", short_and_whole(1, 10))
def test_a_killed_worker_under_load(survivor: TorchServe, photos: list[bytes], times: int) -> None:
    """What was in the worker fails cleanly, the rest waits and is answered; nothing is left of the dead."""
    took = []
    with Load(survivor, photos) as load:
        for _ in range(times):
            load.more()
            killed = int(survivor.workers()[0]["pid"])
            start = time.monotonic()
            os.kill(killed, signal.SIGKILL)
            until(partial(replaced, survivor, killed))
            load.more(1)
            took.append(time.monotonic() - start)
        load.more()
    failed = sum(count for status, count in load.statuses.items() if status != 200)
    print(f"killed {times} times: {dict(load.statuses)}; serving again after {', '.join(f'{s:.1f}' for s in took)} s")
    assert load.statuses.keys() <= {200, 500, 507}, "nobody hung up on, nobody kept waiting"
    assert failed <= 8 * times, "one batch each"
    assert load.wrong == []
    assert len(survivor.processes()) == 3, "the entrypoint, Java, a worker"
    assert gauge(survivor, "backbones") == 1, "the dead one's are gone"
    (folder,) = survivor.folder.glob("cascade-*")
    living = int(survivor.workers()[0]["pid"])
    owners = {int(file.stem.rpartition("_")[2]) for file in folder.glob("metrics/gauge_*.db")}
    assert living in owners and len(owners) <= 2, "of workers, the living one's (and the entrypoint's)"
    assert len(list(folder.glob(".ts.sock*"))) == 1


def hostile(base: httpx.URL, photos: list[bytes], bombs: list[bytes], draw: random.Random) -> tuple[str, httpx.Request]:
    """What a stranger with a token might send, and of which kind it is."""
    url, named = base.copy_with(path="/predictions/cascade"), {"X-Cascade-Bundle": "one", "Content-Type": "image/png"}
    match draw.randrange(10):
        case 0 | 1 | 2 | 3:
            return "image", httpx.Request("POST", url, content=mutated(draw.choice(photos), draw), headers=named)
        case 4:
            return "bytes", httpx.Request("POST", url, content=draw.randbytes(draw.randrange(5000)), headers=named)
        case 5:
            kinds = ("multipart/form-data; boundary=x", "application/x-www-form-urlencoded", ";;=", "a" * 5000)
            body = draw.choice((b"{}", b"--x\r\n\r\n", b"a=%zz", b"\xff\xfe"))
            return "form", httpx.Request(
                "POST", url, content=body, headers=named | {"Content-Type": draw.choice(kinds)}
            )
        case 6:
            more = {f"X-{i}": "y" * draw.choice((1, 100, 30_000)) for i in range(draw.choice((1, 300)))}
            return "headers", httpx.Request("POST", url, content=photos[0], headers=named | more)
        case 7:
            body = draw.choice((b"{}", b"[" * 5000, b'{"image": 3}', b'{"image": "AAAA", "fields": 7}', b"\xff"))
            return "json", httpx.Request("POST", url, content=body, headers={"Content-Type": "application/json"})
        case 8:
            value = "a" + "".join(draw.choices("a/.,%{\t", k=30)) + "a"
            odd = {f"X-Cascade-{draw.choice(('Bundle', 'Mode', 'Fields', 'X'))}": value}
            return "options", httpx.Request("POST", url, content=photos[0], headers=named | odd)
        case _:
            if draw.random() < 0.2:
                return "bomb", httpx.Request("POST", url, content=draw.choice(bombs), headers=named)
            path = "/" + "".join(draw.choices("ab/%._~\u00e9", k=draw.randrange(40)))
            return "path", httpx.Request(
                draw.choice(("GET", "POST", "DELETE", "PATCH")), str(base.copy_with(path="")) + path
            )


@pytest.mark.parametrize("count", short_and_whole(200, 10_000))
def test_hostile_requests(survivor: TorchServe, photos: list[bytes], cifar: list[Image.Image], count: int) -> None:
    """No 5xx but what TorchServe says of forms before our handler is asked; no crash; memory back to where it was."""
    bombs = [bomb(60_000), bomb(16_000), bomb(6_300), encoded(cifar[0], "jpeg", (8000, 5000))]
    worker = psutil.Process(int(survivor.workers()[0]["pid"]))
    seen: Counter[tuple[str, int]] = Counter()
    token, base = survivor.headers, httpx.URL(survivor.url).copy_with(path="")

    def send(seed: int) -> None:
        kind, request = hostile(base, photos, bombs, random.Random(seed))
        request.headers.update(token)
        try:
            try:
                answer = CLIENT.send(request)
            except httpx.TransportError:  # perhaps on a connection that was just being closed after another's answer
                answer = httpx.Client(trust_env=False, timeout=60, verify=NO_TLS).send(request)
        except httpx.TransportError as error:  # refused while it was still sending
            seen[kind, 0] += 1
            print(kind, repr(error), request.headers if kind == "options" else "")
            return
        seen[kind, answer.status_code] += 1
        assert len(answer.content) < 10_000

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(100)))  # what is allocated once
        before = worker.memory_info().rss
        list(pool.map(send, range(100, 100 + count)))
    grown = (worker.memory_info().rss - before) / 2**20
    statuses = Counter(status for (_, status), n in seen.items() for _ in range(n))
    print(f"{count} hostile requests: {dict(statuses)}, memory of the worker {grown:+.0f} MB")
    assert {kind for kind, status in seen if status >= 500} <= {"form"}, seen
    assert {kind for kind, status in seen if status == 0} <= {"headers"}, seen
    assert worker.is_running() and int(survivor.workers()[0]["pid"]) == worker.pid
    assert grown < 100
    with Load(survivor, photos) as load:
        load.more()
    assert load.statuses.keys() == {200}


@pytest.mark.parametrize("times", short_and_whole(1, 5))
def test_killed_without_a_store_and_with_a_full_disk(
    survivor: TorchServe, shelf: Path, photos: list[bytes], times: int
) -> None:
    """It says why it does not come back, comes back with the store, and needs no disk to serve.

    Here, at the end: its metrics are nobody's then.
    """
    for _ in range(times):
        before, killed = len(said(survivor)), int(survivor.workers()[0]["pid"])
        shelf.rename(shelf.with_name("elsewhere"))
        os.kill(killed, signal.SIGKILL)
        until(lambda before=before: any("is it mounted?" in line["message"] for line in said(survivor)[before:]))  # type: ignore[misc]
        with full_disk(survivor):
            shelf.with_name("elsewhere").rename(shelf)
            until(partial(replaced, survivor, killed))
            with Load(survivor, photos) as load:
                load.more()
        assert load.statuses.keys() == {200} and load.wrong == []


def test_a_killed_entrypoint_takes_everything_with_it(survivor: TorchServe) -> None:
    """The last test of this server."""
    assert len(survivor.processes()) == 3, "the entrypoint, Java, a worker"
    survivor.end(signal.SIGKILL)
    until(lambda: survivor.processes() == [])
    for left in survivor.folder.glob("cascade-*"):  # what SIGKILL leaves: it, and a dead token
        shutil.rmtree(left)
    (survivor.folder / "token").unlink()


@pytest.mark.soak
def test_a_disk_filled_to_the_last_block(store: Path, photos: list[bytes]) -> None:
    """What the server itself writes lies there; a worker that is killed comes back, too."""
    place = Path(tempfile.gettempdir(), "e2e-disk")
    with small_disk(place) as fill, serving(store, poll=POLL, place=str(place)) as server:
        fill()
        with Load(server, photos) as load:
            load.more(100)
        killed = int(server.workers()[0]["pid"])
        os.kill(killed, signal.SIGKILL)
        until(partial(replaced, server, killed))
        with Load(server, photos) as after:
            after.more(100)
        (place / "filling").unlink()
    assert load.statuses.keys() == after.statuses.keys() == {200} and load.wrong == after.wrong == []


@pytest.mark.soak
def test_ten_minutes_at_speed(shelf: Path, photos: list[bytes]) -> None:
    """As many requests as fit (SOAK_MINUTES for another while): memory is flat, the worker's and Java's."""
    with serving(shelf) as server:
        (java,) = [each for each in map(psutil.Process, server.processes()) if each.name() == "java"]
        worker = psutil.Process(int(server.workers()[0]["pid"]))
        entrypoint = psutil.Process(server.process.pid)
        with Load(server, photos) as load:
            memory = sampled({"worker": worker, "Java": java, "entrypoint": entrypoint})
    print(f"{dict(load.statuses)} answers; {memory}")
    assert load.statuses.keys() == {200} and load.wrong == []


@pytest.mark.soak
def test_a_worker_that_never_comes_back_ends_the_server(bundle_path: Path, tmp_path: Path) -> None:
    """TorchServe gives up after a while and stays, answering nobody: then whoever started us has to know."""
    shutil.copytree(bundle_path, tmp_path / "store" / "one" / "1")
    with serving(tmp_path / "store", start_timeout=15) as server:
        (tmp_path / "store").rename(tmp_path / "gone")
        os.kill(int(server.workers()[0]["pid"]), signal.SIGKILL)
        assert server.process.wait(90) == 1
        last = server.log().splitlines()[-1]
    assert last.startswith("error: no worker came back within ") and "is it mounted?" in last


@pytest.mark.soak
def test_ten_ends_under_load(store: Path, photos: list[bytes], cifar: list[Image.Image]) -> None:
    """What was sent half a second before is answered; later ones are, or are refused; nothing stays (see `serving`)."""
    large = encoded(cifar[0], "jpeg", (6000, 6000))
    for _ in range(10):
        with serving(store, drain_timeout=60) as server:
            print(terminated(server, photos, large))


@pytest.mark.parametrize("failing", short_and_whole("503", "silence"))
def test_a_remote_store_a_killed_worker_a_full_disk_and_the_end(
    shelf: Path,
    tmp_path: Path,
    photos: list[bytes],
    cifar: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    failing: Literal["503", "silence"],
) -> None:
    """A worker that starts again while the store is down takes its copies; a copy that has no room is tried again.

    At the end a SIGTERM under load: what was sent before is answered, and nothing stays.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    try:
        with remote(shelf) as url, serving(url, poll=POLL, drain_timeout=60) as server:
            with Load(server, photos) as load:
                load.more()
                copies = sorted(Shelf.fetched)
                assert copies and len(copies) == len(set(copies))

                Shelf.fail(failing)
                until(lambda: gauge(server, "store_unreachable") == 1)
                killed = int(server.workers()[0]["pid"])
                os.kill(killed, signal.SIGKILL)
                until(partial(replaced, server, killed))
                load.more()
                Shelf.mend()
                until(lambda: gauge(server, "store_unreachable") == 0)
                assert sorted(Shelf.fetched) == copies, "nothing was fetched twice"

                put(shelf / "two" / "1", shelf / "two" / "0")
                until(lambda: gauge(server, "bundles{state=ready}") == 3)
                with full_disk(server, int(server.workers()[0]["pid"])):
                    (shelf.with_name("aside") / "2").rename(shelf / "one" / "2")
                    until(lambda: gauge(server, "bundle_refused{bundle=one}") == 1)
                    load.more()
                    (line,) = told_of(server, "refused bundle one/2: ")
                    assert "File too large: free disk space for copies" in line["message"]
                take(shelf / "two" / "0")  # when a bundle leaves, there is another try, else within a minute
                until(lambda: gauge(server, "bundle_refused{bundle=one}") == 0)
                load.more(made_by="one/2")
            print(terminated(server, photos, encoded(cifar[0], "jpeg", (6000, 6000))))
        assert load.statuses.keys() <= {200, 500, 507} and load.wrong == []
        assert sum(n for status, n in load.statuses.items() if status != 200) <= 8, "the batch of the killed worker"
    finally:
        if (shelf / "one" / "2").exists():
            (shelf / "one" / "2").rename(shelf.with_name("aside") / "2")
