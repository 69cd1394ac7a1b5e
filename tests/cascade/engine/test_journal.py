"""A bundle that killed a process is known to the next one, and does not kill it, too."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from cascade import Engine
from cascade.bundle.format import write
from cascade.bundle.store import Store
from cascade.engine import registry
from cascade.engine.journal import Journal
from cascade.engine.stores import load_store
from tests.helpers.bundles import handmade

BAD = ("bad", "1")


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = os.memfd_create("journal")
    yield descriptor
    os.close(descriptor)


def die(file: int) -> None:
    """As a process that dies while it loads the bundle."""
    pid = os.fork()
    if pid == 0:
        with Journal(file).loading(BAD, "stamp"):
            os._exit(9)
    os.waitpid(pid, 0)


def test_deaths_are_counted_by_bundle_and_stamp(file: int) -> None:
    assert Journal(file).deaths(BAD, "stamp") == 0
    for count in (1, 2):
        die(file)
        assert Journal(file).deaths(BAD, "stamp") == count
    assert Journal(file).deaths(BAD, "other files") == Journal(file).deaths(("bad", "2"), "stamp") == 0


def test_an_end_without_death_clears_it(file: int) -> None:
    die(file)
    with pytest.raises(ValueError), Journal(file).loading(BAD, "stamp"):
        raise ValueError
    assert Journal(file).deaths(BAD, "stamp") == 0


def test_pins_are_kept(file: int) -> None:
    journal = Journal(file)
    journal.pin("paper", "1:95,2:5")
    journal.pin("demo", None)
    die(file)
    assert Journal(file).pins == {"paper": "1:95,2:5", "demo": None} and Journal().pins == {}
    assert Journal(file).deaths(BAD, "stamp") == 1


def test_what_a_dying_process_wrote_in_part_is_nothing(file: int) -> None:
    os.pwrite(file, b'{"a', 0)
    assert Journal(file).deaths(BAD, "stamp") == 0


@pytest.mark.parametrize(("deaths", "later"), [(1, "ready"), (2, "refused")])
def test_the_next_process_leaves_the_bundle_out_and_names_it(
    file: int, cifar: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int, later: str
) -> None:
    for name in ("bad", "good"):
        write(handmade(cifar[:20], name=name, experts=0, size=32), tmp_path / name / "1")
    stamp = Store(tmp_path).look()[BAD]
    os.pwrite(file, json.dumps({"deaths": {json.dumps([*BAD, stamp]): deaths}, "pins": {}}).encode(), 0)
    monkeypatch.setattr(registry, "RETRY", 0.0)
    known = load_store(Engine(), tmp_path, journal=Journal(file))
    bad, good = known.states()
    assert (bad.state, good.state) == ("refused", "ready")
    assert bad.reason and "process died while loading it" in bad.reason
    known.reload()
    assert [state.state for state in known.states()] == [later, "ready"]
