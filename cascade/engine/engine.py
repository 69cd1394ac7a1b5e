"""The engine: bundles over resident backbones, images in, answers out.

``prepare`` is thread-safe; calls of ``run`` are serialized (see ``cascade.engine.forward``); bundles may be added and
removed meanwhile (see ``cascade.engine.resident``).
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from PIL import Image

from cascade import metrics
from cascade.bundle.bundle import Bundle
from cascade.bundle.format import read
from cascade.cpus import limit_threads
from cascade.engine import deferral
from cascade.engine.dispatch import dispatch, second_round
from cascade.engine.dispatch_table import DispatchTable, Target
from cascade.engine.executors import Executor
from cascade.engine.executors.selection import Kind
from cascade.engine.forward import forward
from cascade.engine.frozen_answers import completed
from cascade.engine.items import AnyItem, ColdItem, Item, PassAnswer
from cascade.engine.pins import Pin
from cascade.engine.pixels import Source
from cascade.engine.prepare import named_item, open_item
from cascade.engine.resident import IDLE, Resident
from cascade.engine.results import AUTO, ItemError, Options, Prediction
from cascade.engine.unknown import UnknownImages
from cascade.errors import CascadeError
from cascade.model.decoding import LIMITS, Limits

LOADERS = 4  # on-demand bundles that are loaded at the same time
ATTEMPTS = 3  # bundles that are tried for their backbone


class Engine:
    """Bundles over resident backbones; one backbone per fingerprint, however many bundles share it.

    Args:
        budget_bytes: for materialized weights, over all backbones.
        device: of the backbones.
        limits: for images.
        weights: a checkpoint that replaces the bundles' own weight source.
        executor: runs the backbones, see ``cascade.engine.executors``; ``auto`` is the fastest on this machine, unless
            the environment variable CASCADE_EXECUTOR overrides it.
        memory_bytes: for backbones and packed bundles together; None for no limit.
        max_batch: most images in a pass for which the executors build what they need before the first one.

    Raises:
        CascadeError: there is no such device.

    Attributes:
        resident: what is in memory.
        pins: by bundle name, the version that answers requests without one; the default is the latest version.
        on_missing: called with the name of a requested bundle that is not loaded, so that it can load it.
        explain: called with the error for a bundle that is still missing, its name and version, for a better one.
        last_used: when each name was last requested, monotonic seconds.
        unknown: keeps images without a bundle's name that fit no bundle; None: they are not kept.
    """

    def __init__(
        self,
        budget_bytes: int | None = None,
        device: str = "cpu",
        limits: Limits = LIMITS,
        weights: Path | None = None,
        executor: Kind = "auto",
        memory_bytes: int | None = None,
        max_batch: int = 32,
    ) -> None:
        limit_threads()
        self.resident = Resident(budget_bytes, device, weights, executor, memory_bytes, max_batch)
        self.weight_cache = self.resident.weight_cache
        self.limits = limits
        self.pins: Mapping[str, Pin] = {}
        self.on_missing: Callable[[str], None] | None = None
        self.explain: Callable[[ItemError, str, str | None], ItemError] = lambda error, name, version: error
        self.last_used: dict[str, float] = {}
        self.unknown: UnknownImages | None = None
        self._table: tuple[object, object, DispatchTable] | None = None  # of these bundles, with these pins
        self._part: tuple[object, object, DispatchTable] | None = None  # of ``known``, for these executors

    @property
    def known(self) -> DispatchTable | None:
        """The bundles that images may be dispatched to, in memory or not; None: those in memory."""
        return self.resident.known

    @known.setter
    def known(self, table: DispatchTable | None) -> None:
        self.resident.known = table

    @property
    def bundles(self) -> list[tuple[str, str]]:
        """(name, version) of every bundle, versions ascending."""
        return [bundle.identity for bundle in self.resident.loaded]

    @property
    def loaded(self) -> list[Bundle]:
        """Every bundle, in the order of ``bundles``; looking at one does not count as its use."""
        return [*self.resident.loaded]

    @property
    def names(self) -> Collection[str]:
        """Names of the bundles."""
        return self.resident.loaded.versions.keys()

    @property
    def only(self) -> str | None:
        """The default name for requests without one: the only bundle's, if no others can be loaded."""
        names = [*self.names]
        return names[0] if len(names) == 1 and self.on_missing is None else None

    @property
    def leaving(self) -> bool:
        """Whether a removed bundle is still answering requests."""
        return self.resident.leaving

    def is_cold(self, name: str | None) -> bool:
        """Whether ``fetch`` may have to load a bundle first, for a request of this name, or of None."""
        if self.on_missing is None:
            return False
        if name in (None, AUTO):
            spaces = self.known.spaces if self.known is not None else ()
            return bool(spaces) and not any(space.fingerprint in self.resident.executors for space in spaces)
        return name not in self.names

    def fetch(self, name: str | None) -> None:
        """Load the bundle that a request names. If it names none, load one, so that there is a backbone to dispatch by.

        For other backbones, images are dispatched while bundles of theirs are in memory.
        """
        if name not in (None, AUTO):
            self.find(name)
        elif self.known is not None and self.on_missing is not None and self.is_cold(name):
            largest = max(self.known.spaces, key=lambda space: len(space.targets))
            for target in largest.targets[:ATTEMPTS]:
                if self.is_cold(name):
                    self.on_missing(target.name)

    def add(
        self,
        bundle: Bundle,
        warm: bool = False,
        replaces: Sequence[tuple[str, str]] = (),
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        """Check a bundle against its backbone, which is loaded on first use, and make the bundle available.

        Passes continue meanwhile, also while the executor builds graphs. The bundle becomes visible atomically, once it
        is ready; a bad one leaves nothing behind.

        Args:
            warm: warm up with a blank image first, in a regular pass.
            replaces: loaded bundles (name, version) that the caller removes right after. Their memory counts as free,
                so for a moment more than ``memory_bytes`` may be taken.
            make_room: called while memory is full: frees some, or returns False if it can't.

        Raises:
            BackboneError, BundleError: the backbone can't be loaded, or the bundle does not fit it.
            OutOfMemory: it does not fit into ``memory_bytes``, or one of its masks into the budget.
            CascadeError: it is already loaded.
        """
        self.resident.add(bundle, warm, replaces, make_room)

    def remove(self, name: str, version: str) -> None:
        """Remove a bundle: new requests no longer find it, requests in flight are still answered.

        Its weights are freed with the last of these requests, and so is its backbone unless another bundle uses it.

        Raises:
            CascadeError: there is no such bundle.
        """
        self.resident.remove(name, version)
        self._table = None  # it would keep the bundle alive
        self.release()

    @contextmanager
    def keeping_unknown(self, folder: Path | str | None, most_images: int, most_bytes: int) -> Iterator[None]:
        """Keep images that fit no bundle in a folder until the block ends; None: keep none.

        Arguments and errors as in :class:`cascade.engine.unknown.UnknownImages`.
        """
        if folder is None:
            yield
            return
        with UnknownImages(Path(folder), most_images, most_bytes, self.limits) as self.unknown:
            yield

    def release(self) -> None:
        """Free the memory of removed bundles whose last request has been answered."""
        self.resident.release()

    def predict(
        self,
        images: Sequence[Source],
        options: Options | Sequence[Options] = Options(),
        decode: Callable[..., Iterable[AnyItem | ItemError]] = map,
        on_error: Literal["return", "raise"] = "return",
    ) -> list[Prediction | ItemError]:
        """Answers in the order of ``images``; a bad image gets an ``ItemError`` and does not affect the others.

        Args:
            images: encoded bytes, paths, PIL images, or preprocessed pixels float32 [3, H, W].
            options: one for all images, or one per image.
            decode: maps ``prepare`` over the images; a thread pool's ``map`` decodes on several cores.
            on_error: ``raise`` raises the first error instead of returning it.

        Raises:
            CascadeError: one image instead of a list, or different numbers of options and images; with
                ``on_error="raise"`` also a bad image.
        """
        if isinstance(images, str | bytes | bytearray | Path | Image.Image):
            raise CascadeError("predict takes a list of images: pass [image] for one")
        wishes = [options] * len(images) if isinstance(options, Options) else list(options)
        if len(wishes) != len(images):
            raise CascadeError(f"{len(images)} images but {len(wishes)} options; pass one, or one per image")
        cold = {wish.bundle for wish in wishes if self.is_cold(wish.bundle)}
        if cold:  # loaded here, and not by ``decode``, which may bound the time of an image
            with ThreadPoolExecutor(min(len(cold), LOADERS)) as loaders:
                [*loaders.map(self.fetch, cold)]
        with metrics.stage("decode"):
            prepared = [*decode(self.prepare, images, wishes)]
        if on_error == "raise":
            _raise_first(prepared)
        rest = iter(self.run([item for item in prepared if not isinstance(item, ItemError)]))
        answers = [item if isinstance(item, ItemError) else next(rest) for item in prepared]
        named, rows = second_round(options, answers) if isinstance(options, Options) else (options, [])
        again = self.predict([images[row] for row in rows], named, decode) if rows else []
        for row, answer in zip(rows, again, strict=True):
            answers[row] = answer
        if on_error == "raise":
            _raise_first(answers)
        return answers

    def prepare(self, image: Source, options: Options = Options()) -> AnyItem | ItemError:
        """Decode one image for its bundle, or for all bundles that it may be dispatched to.

        Thread-safe, also during a pass. If the image or the options are bad, the error is returned and counted.
        """
        item = self._prepare(image, options)
        if isinstance(item, ItemError):
            metrics.count_answer(options.bundle, None, item.kind)
        return item

    def run(self, items: Sequence[AnyItem]) -> list[Prediction | ItemError]:
        """Run passes (see ``run_pass``) until all ``items`` are answered; answers come in their order."""
        answers = self.run_pass(items)
        while True:
            warm = [self.warm(answer) if isinstance(answer, ColdItem) else answer for answer in answers]
            rows = [row for row, answer in enumerate(warm) if isinstance(answer, Item)]
            if not rows:
                return [answer for answer in warm if not isinstance(answer, Item)]
            answers = [*warm]
            for row, answer in zip(rows, self.run_pass([w for w in warm if isinstance(w, Item)]), strict=True):
                answers[row] = answer

    def warm(self, cold: ColdItem) -> Item | ItemError:
        """Load the bundle that an image was dispatched to, unless it is loaded by now, and make the image's item."""
        bundle = self.find(*cold.target.identity)
        if isinstance(bundle, ItemError):
            why = "the bundle that this image fits can't be loaded now: send it again later, or name another bundle"
            item: Item | ItemError = ItemError("bundle_unavailable", why, bundle.retry_after or IDLE)
        else:
            item = cold.settle(bundle)
        if isinstance(item, ItemError):
            metrics.count_answer(None, None, item.kind)
        return item

    def run_pass(self, items: Sequence[AnyItem]) -> list[PassAnswer]:
        """Run one pass over all ``items``; answers come in their order. Passes of several threads are serialized.

        An answer that is an item needs another pass, and a cold one ``warm`` before it. Only an open item, which names
        no bundle, can be answered with an error.
        """
        metrics.BATCH_IMAGES.observe(len(items))
        metrics.QUEUE_DEPTH.inc(len(items))
        resident = self.resident
        with resident.turn():
            resident.last_pass = time.monotonic()
            metrics.QUEUE_DEPTH.dec(len(items))
            settled = dispatch(resident.executors, resident.device, items, self._bundle, self.unknown)
            flat = [item for own in settled if isinstance(own, tuple) for item in own]
            passed = forward(resident.executors, resident.weight_cache, resident.device, flat)
        found = iter(passed)
        answers: list[PassAnswer] = []
        for own in settled:
            if not isinstance(own, tuple):
                if isinstance(own, ItemError):
                    metrics.count_answer(None, None, own.kind)
                answers.append(own)
                continue
            item, answer = deferral.surest(own, [next(found) for _ in own])
            if item.bundle.ood is not None:
                metrics.observe_ood(answer.bundle, answer.ood)
            following = deferral.next_of(item, completed(answer))
            answers.append(following if isinstance(following, Item) else deferral.count(following))
        return answers

    def stats(self) -> dict[str, int]:
        """Resident bytes (backbones, packed bundles, materialized weights) and the counters of the weight cache."""
        return self.resident.stats()

    def executor(self, bundle: Bundle) -> Executor:
        """The executor of a loaded bundle's backbone."""
        return self.resident.executors[bundle.card.backbone.fingerprint]

    def find(self, name: str | None, version: str | None = None) -> Bundle | ItemError:
        """Find the bundle of a request, or return an error that lists the loaded ones.

        Without a version it is the pinned one, else the latest. An on-demand bundle is loaded first.
        """
        name = self.only if name is None else name
        if name is None:
            return ItemError("bundle_missing", f"say which bundle; loaded: {self.resident.loaded.names()}")
        if name not in self.names and self.on_missing is not None:
            self.on_missing(name)
        loaded = self.resident.loaded
        if name in loaded.versions:
            self.last_used[name] = time.monotonic()
        found = loaded.choose(name, version, self.pins.get(name))
        return self.explain(found, name, version) if isinstance(found, ItemError) else found

    def dispatch_table(self) -> DispatchTable | ItemError:
        """The table for images without a bundle's name; rebuilt after the bundles have changed."""
        loaded, known = self.resident.loaded, self.known
        if known is not None:
            part, backbones = self._part, self.resident.executors.keys()
            if part is None or part[0] is not known or part[1] != backbones:
                part = self._part = known, {*backbones}, known.of_backbones(backbones)
            table = part[2]
        else:
            kept = self._table
            if kept is None or kept[0] is not loaded or kept[1] != self.pins:
                targets = map(Target.of, loaded.serving(self.pins))
                kept = self._table = loaded, dict(self.pins), DispatchTable.of(targets)
            table = kept[2]
        if table.spaces:
            return table
        why = f"say which bundle, none has a domain to dispatch by; loaded: {loaded.names()}"
        return ItemError("bundle_missing", why)

    def _bundle(self, target: Target) -> Bundle | None:
        """The bundle of a target, if it is in memory."""
        if target.bundle is not None:
            return target.bundle
        bundle = self.resident.loaded.versions.get(target.name, {}).get(target.version)
        if bundle is not None:
            self.last_used[target.name] = time.monotonic()
        return bundle

    def _prepare(self, image: Source, options: Options) -> AnyItem | ItemError:
        unnamed = options.bundle is None and self.only is None and (self.names or self.known is not None)
        if options.bundle == AUTO or unnamed:
            table = self.dispatch_table()
            if isinstance(table, ItemError):
                return table
            return open_item(table, image, options, self.limits, keep=self.unknown is not None)
        bundle = self.find(options.bundle, options.version)
        return bundle if isinstance(bundle, ItemError) else named_item(bundle, image, options, self.limits)


def load(
    path: Path | str,
    budget_bytes: int | None = None,
    device: str = "cpu",
    weights: Path | None = None,
    executor: Kind = "auto",
) -> Engine:
    """Verify the bundle at ``path`` (``<name>/<version>``) and load it into a new engine.

    Raises:
        BundleError, BackboneError: the bundle or its backbone is missing or invalid.
    """
    engine = Engine(budget_bytes, device, weights=weights, executor=executor)
    engine.add(read(Path(path)))
    return engine


def _raise_first(results: Sequence[object]) -> None:
    for n, result in enumerate(results):
        if isinstance(result, ItemError):
            raise CascadeError(f"image {n}: {result}")
