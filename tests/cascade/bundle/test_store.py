"""Stores: a folder, memory and HTTP list and read alike; a copy on this machine is whole or is not there."""

import errno
import itertools
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from cascade.bundle import store as stores
from cascade.bundle.format import Bundle, BundleError, write
from cascade.bundle.store import Identity, Store, StoreError
from tests.helpers.bundles import handmade


@pytest.fixture(scope="module")
def hand(cifar: list[Image.Image]) -> Bundle:
    return handmade(cifar[:40], experts=0)


@pytest.fixture
def folder(hand: Bundle, tmp_path: Path) -> Path:
    root = tmp_path / "store"
    for path in ("a/1", "a/2", "b/1"):
        write(hand, root / path)
    shutil.copytree(root / "a/1", root / "a/.3.99.tmp")
    (root / "notes.txt").write_text("mine")
    (root / "empty/1").mkdir(parents=True)
    return root


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder; counts what is fetched, and can be told to fail."""

    asked = 0
    fetched: list[str] = []
    failing = False
    silent = threading.Event()
    """Clear: connections are taken, and nothing is said."""

    def do_GET(self) -> None:
        Quiet.asked += 1
        Quiet.silent.wait()
        if Quiet.failing:
            self.send_error(503)
            return
        Quiet.fetched.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def http(folder: Path) -> Iterator[str]:
    Quiet.fetched, Quiet.failing = [], False
    Quiet.silent.set()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.put(str(folder), "/models", recursive=True)
    yield "memory://models"
    fs.rm("/models", recursive=True)


@pytest.fixture(params=["folder", "file", "memory", "http"])
def where(request: pytest.FixtureRequest, folder: Path) -> str:
    if request.param in ("folder", "file"):
        return str(folder) if request.param == "folder" else f"file://{folder}"
    return str(request.getfixturevalue(request.param))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_every_kind_lists_and_reads_the_same(where: str, folder: Path, hand: Bundle, tmp_path: Path) -> None:
    store = Store(where, tmp_path / "cache")
    found = store.look()
    assert list(found) == [("a", "1"), ("a", "2"), ("b", "1")]
    assert store.look() == found, "nothing has changed"
    bundle, digest = store.read("a", "2")
    assert bundle.identity == ("a", "2") and bundle.dispatcher.bits.equal(hand.dispatcher.bits)
    assert store.read("b", "1")[1] == digest, "the same bytes"
    assert not list(tmp_path.glob("cache/*/.*")), "nothing half copied stays"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{root}/a/1/masks.safetensors: bad", "a/1/masks.safetensors: bad"),
        ("{root}/a/1 is cut; {root}/b/2 is not", "a/1 is cut; b/2 is not"),
        ("no weights at /srv/models/net.safetensors; give", "no weights at net.safetensors; give"),
        (
            "('/home/me/x y') 3/4 of https://host/b/c and package:net/w.pth",
            "('x y') 3/4 of https://host/b/c and package:net/w.pth",
        ),
    ],
)
def test_reasons_for_people_outside_hold_no_path(tmp_path: Path, text: str, told: str) -> None:
    assert Store(tmp_path).public(text.format(root=tmp_path)) == told


def test_a_changed_file_changes_the_stamp(folder: Path, http: str, tmp_path: Path) -> None:
    for where in (str(folder), http):
        store = Store(where, tmp_path / "cache")
        before = store.look()
        sums = folder / "a/2/SHA256SUMS"
        kept = sums.read_text()
        sums.write_text(kept + "x")
        after = store.look()
        assert [i for i in after if after[i] != before[i]] == [("a", "2")]
        sums.write_text(kept)
        (folder / "b/1/more").write_text("")
        after = store.look()
        assert after["b", "1"] != before["b", "1"]
        (folder / "b/1/more").unlink()


def test_a_copy_is_fetched_once(http: str, folder: Path, tmp_path: Path) -> None:
    store = Store(http, tmp_path)
    store.read("a", "1")
    large = [path for path in Quiet.fetched if "safetensors" in path]
    assert len(large) == len(set(large)) == len(list((folder / "a/1").glob("*.safetensors")))
    again = Store(http, tmp_path)
    again.read("a", "1")
    assert [path for path in Quiet.fetched if "safetensors" in path] == large
    assert list(again.cached()) == [("a", "1")]
    assert again.cache is not None and files(again.cache / "a/1") == files(folder / "a/1")


def test_out_of_reach(http: str, folder: Path, tmp_path: Path) -> None:
    store = Store(http, tmp_path / "cache")
    _, digest = store.read("a", "1")
    Quiet.failing = True
    with pytest.raises(StoreError, match="can't be read .*is it reachable"):
        store.look()
    with pytest.raises(StoreError, match="can't be read"):
        store.read("a", "2")
    assert store.read("a", "1")[1] == digest, "the copy"
    shutil.rmtree(folder)
    with pytest.raises(StoreError, match=f"{folder}: No such file or directory: is it mounted"):
        Store(folder).look()


def test_a_store_that_says_nothing_is_waited_for_once(
    http: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "TIMEOUTS", {"sock_connect": 1, "sock_read": 0.2})
    for version in ("8", "9"):
        shutil.copytree(folder / "a" / "1", folder / "a" / version)
    store = Store(http, tmp_path / "cache")
    whole = store.look()
    digests = {identity: store.read(*identity)[1] for identity in whole}
    Quiet.silent.clear()
    try:
        with pytest.raises(StoreError, match="can't be read .*[Tt]imeout.*is it reachable"):
            store.look()
        asked = Quiet.asked
        assert store.cached().keys() == whole.keys()
        assert {identity: store.read(*identity)[1] for identity in whole} == digests
        assert Quiet.asked == asked, "the copies, without a question"
    finally:
        Quiet.silent.set()
    assert store.look() == whole


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "no sums", "foreign file", "climbing"])
def test_what_is_not_whole_is_refused_and_leaves_no_copy(
    damage: str, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, there = fsspec.filesystem("memory"), "/models/a/1/fusion.safetensors"
    if damage == "missing":
        fs.rm(there)
    elif damage == "no sums":
        fs.rm("/models/a/1/SHA256SUMS")
    elif damage in ("foreign file", "climbing"):
        fs.pipe("/models/a/1/" + ("evil.py" if damage == "foreign file" else "..\\..\\x"), b"x")
    else:
        raw = bytearray(fs.cat_file(there))
        raw[-1] ^= 1
        fs.pipe(there, bytes(raw[:-9] if damage == "truncated" else raw))
    store = Store(memory, tmp_path)
    with pytest.raises(BundleError, match="models/a/1") as error:
        store.read("a", "1")
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)
    assert store.cache is not None and not files(store.cache) and store.cached() == {}
    store.read("a", "2")


def test_a_copy_damaged_here_is_fetched_again(memory: str, tmp_path: Path) -> None:
    store = Store(memory, tmp_path)
    store.read("a", "1")
    assert store.cache is not None
    (store.cache / "a/1/fusion.safetensors").write_bytes(b"")
    assert store.read("a", "1")[0].identity == ("a", "1")
    assert (store.cache / "a/1/fusion.safetensors").stat().st_size > 0


def test_a_disk_that_is_full_is_no_fault_of_the_bundle(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(memory, tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left on device: free disk space"):
            store.read("a", "1")
    assert store.cached() == {} and store.cache is not None and not list(store.cache.iterdir())
    store.read("a", "1")


@pytest.mark.parametrize("size", [0, 64, 5000])
def test_a_file_that_can_not_be_made_longer(memory: str, tmp_path: Path, size: int) -> None:
    """Not at fsync but before: in a small file what is left in the buffer fails a second time when it is closed."""
    store = Store(memory, tmp_path)
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        with pytest.raises(StoreError, match="File too large: free disk space"):
            store.read("a", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert store.cached() == {} and store.cache is not None and not list(store.cache.iterdir())
    store.read("a", "1")


@pytest.mark.parametrize(("gone", "left"), [("b", [("a", "1"), ("a", "2")]), ("a/2", [("a", "1"), ("b", "1")])])
def test_a_bundle_that_goes_while_it_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gone: str, left: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(stores, "discover", meanwhile(lambda: shutil.rmtree(folder / gone)))
    assert list(Store(folder).look()) == left


def test_a_store_that_goes_while_it_is_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was seen of it until then is not the store: all other bundles would be taken for removed."""
    monkeypatch.setattr(stores, "discover", meanwhile(lambda: folder.rename(folder.with_name("away"))))
    with pytest.raises(StoreError, match="is it mounted"):
        Store(folder).look()
    folder.with_name("away").rename(folder)
    monkeypatch.setattr(stores, "discover", meanwhile(lambda: list(map(shutil.rmtree, folder.glob("*/")))))
    assert Store(folder).look() == {}, "no longer mounted, an empty folder: for the registry to judge"


def meanwhile(event: Callable[[], object]) -> Callable[[str], Iterator[Identity]]:
    """``discover``, which sees the first bundle before the event, and the others after it."""
    discover, events = stores.discover, [event]

    def seen(folder: str) -> Iterator[Identity]:
        found = iter([*discover(folder)])
        yield from itertools.islice(found, 1)
        while events:
            events.pop()()
        yield from found

    return seen


def test_prune_and_what_a_killed_process_left(memory: str, tmp_path: Path) -> None:
    store = Store(memory, tmp_path)
    for identity in store.look():
        store.read(*identity)
    assert store.cache is not None
    store.prune({("a", "2"): ""})
    assert list(store.cached()) == [("a", "2")]
    left, fresh = store.cache / ".1-left" / "a", store.cache / ".2-fresh" / "a"
    for path in (left, fresh):
        path.mkdir(parents=True)
    long_ago = time.time() - 2 * stores.ABANDONED
    for path in (left, left.parent):
        os.utime(path, (long_ago, long_ago))
    Store(memory, tmp_path)
    assert not left.exists() and fresh.exists(), "process ids mean nothing: another container may be writing"


def test_a_file_without_end_is_cut_off(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "MAX_BYTES", 100)
    with pytest.raises(BundleError, match="larger than 100 bytes"):
        Store(memory, tmp_path).read("a", "1")


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("nonsense://x", "can't open the store nonsense://x .*Protocol not known"),
        ("http://me:secret@host/models", "contains a password"),
    ],
)
def test_urls_that_are_refused(where: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=words) as error:
        Store(where, tmp_path)
    assert "secret" not in str(error.value)


def test_a_name_that_leads_elsewhere_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("memory://models", tmp_path)
    names: list[dict[str, Any]] = [{"name": f"/models/{n}", "type": "directory"} for n in ("..", ".a", "a b", "", "-x")]
    monkeypatch.setattr(store.fs, "ls", lambda *_, **__: names)
    assert store._folders("/models") == ["/models/a b"]
