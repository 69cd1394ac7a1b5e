"""Measurements that take hours in all: cells, each with a name and a JSON file of its own, so that a run resumes."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar


class Named(Protocol):
    """A cell: its name has parts between slashes."""

    @property
    def name(self) -> str: ...


C = TypeVar("C", bound=Named)


def unmeasured(cells: Iterable[C], folder: Path, only: Sequence[str] | None) -> Iterator[tuple[C, Path]]:
    """The cells without a result in ``folder``, each with the path of its result.

    Args:
        only: beginnings of names; all cells if empty.
    """
    for cell in cells:
        path = folder / f"{cell.name.replace('/', '-')}.json"
        if (not only or cell.name.startswith(tuple(only))) and not path.exists():
            yield cell, path
