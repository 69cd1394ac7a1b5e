"""What a server has loaded is no burden for later collections, and does not stay longer than before."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from cascade.garbage import exempt_loaded


class Node:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_is_loaded_is_not_visited_again() -> None:
    lasting = Node()
    garbage = weakref.ref(Node())
    exempt_loaded()
    assert garbage() is None, "garbage would stay for ever"
    assert not any(each is lasting for each in gc.get_objects())
    later = weakref.ref(Node())
    gc.collect()
    assert later() is None


def test_what_is_exempt_goes_with_its_last_reference() -> None:
    bundle = Node()
    bundle.itself = Node()  # no cycle through itself
    reference = weakref.ref(bundle)
    exempt_loaded()
    del bundle
    assert reference() is None
