"""The loaded bundles, as a value that is replaced and never changed in place: readers need no lock."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cascade.bundle.bundle import Bundle
from cascade.engine.pins import Pin
from cascade.engine.results import ItemError
from cascade.errors import OutOfMemory

LISTED = 50  # names in a message


@dataclass(frozen=True)
class Loaded:
    """Bundles by name and version; iterated by name, then by version."""

    versions: Mapping[str, Mapping[str, Bundle]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Bundle]:
        for _, held in sorted(self.versions.items()):
            yield from (held[version] for version in sorted(held, key=number))

    def __contains__(self, identity: tuple[str, str]) -> bool:
        name, version = identity
        return version in self.versions.get(name, ())

    def plus(self, bundle: Bundle) -> "Loaded":
        """These bundles and one more."""
        held = self.versions.get(bundle.name, {})
        return Loaded({**self.versions, bundle.name: {**held, bundle.version: bundle}})

    def minus(self, bundle: Bundle) -> "Loaded":
        """These bundles without one of them."""
        held = {v: b for v, b in self.versions[bundle.name].items() if v != bundle.version}
        others = {n: b for n, b in self.versions.items() if n != bundle.name}
        return Loaded({**others, bundle.name: held} if held else others)

    def choose(self, name: str, version: str | None, pin: Pin | None) -> Bundle | ItemError:
        """The named version; without one the pinned version, else the latest. An error lists what is loaded."""
        held = self.versions.get(name)
        if held is None:
            return ItemError("unknown_bundle", f"no such bundle; loaded: {self.names()}")
        listed = " ".join(sorted(held, key=number))
        if version is None and pin is not None:
            version = pin.choose(held)
            why = f"pinned to version {pin}, which is not there; loaded: {listed}"
            return ItemError("unknown_version", why) if version is None else held[version]
        bundle = held[max(held, key=number)] if version is None else held.get(version)
        return bundle or ItemError("unknown_version", f"no such version; loaded: {listed}")

    def serving(self, pins: Mapping[str, Pin]) -> list[Bundle]:
        """One version of every name: the one that is pinned with the largest weight, else the latest."""
        pinned = {name: pins[name].main(held) for name, held in self.versions.items() if name in pins}
        chosen = {name: pinned.get(name, max(held, key=number)) for name, held in self.versions.items()}
        return [self.versions[name][version] for name, version in chosen.items() if version is not None]

    def names(self) -> str:
        """The names for a message, abbreviated."""
        names = sorted(self.versions)
        return " ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if names[LISTED:] else "") or "none"


def packed_bytes(loaded: Loaded, leaving: Sequence[Bundle], replaces: Sequence[tuple[str, str]] = ()) -> int:
    """Bytes of loaded bundles and of removed ones that still answer requests.

    Args:
        leaving: parts of the removed ones.
        replaces: identities of loaded bundles that are about to be removed, which count as free.
    """
    counted = {id(part) for bundle in leaving for part in bundle.parts[1:]}  # with the bundle that they belong to
    held = [bundle for bundle in loaded if bundle.identity not in replaces]
    return sum(bundle.bytes() for bundle in (*held, *(part for part in leaving if id(part) not in counted)))


def expect_room(bundle: Bundle, needed: int, used: int, limit: int | None) -> None:
    """Check that ``needed`` more bytes fit into the limit. Raises OutOfMemory."""
    if limit is not None and used + needed > limit:
        raise OutOfMemory(
            f"bundle {bundle.name}/{bundle.version} needs {needed} bytes of memory, {used} of {limit} are taken: "
            "give more, or remove other bundles"
        )


def number(version: str) -> tuple[int, str]:
    """Sort key of a version; numeric versions sort as numbers."""
    return (int(version) if version.isdecimal() else -1, version)
