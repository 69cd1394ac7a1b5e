"""The engine: bundles over resident backbones, images in, answers out.

``prepare`` is thread-safe; calls of ``run`` are serialized (see ``cascade.engine.forward``); bundles may be added and
removed meanwhile.
"""

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from PIL import Image

from cascade import metrics
from cascade.bundle.bundle import Bundle, BundleError
from cascade.bundle.format import check, digest, read
from cascade.cpus import limit_threads
from cascade.engine import deferral
from cascade.engine.dispatch import dispatch, second_round
from cascade.engine.dispatch_table import DispatchTable, Target
from cascade.engine.executors import Executor
from cascade.engine.executors.precision import DEVICE
from cascade.engine.executors.selection import Kind, choose
from cascade.engine.forward import forward
from cascade.engine.frozen_answers import completed
from cascade.engine.items import AnyItem, ColdItem, Item, OpenItem, PassAnswer
from cascade.engine.loaded import Loaded, expect_room, packed_bytes
from cascade.engine.pins import Pin
from cascade.engine.pixels import Source, crop_of, pixels_of
from cascade.engine.results import AUTO, ItemError, Options, Prediction
from cascade.engine.unknown import UnknownImages
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError, OutOfMemory
from cascade.model import backbone as backbones
from cascade.model.masks import Mask
from cascade.model.decoding import LIMITS, Limits

DEFAULT_BUDGET = 2**30
LOADERS = 4  # on-demand bundles that are loaded at the same time
ATTEMPTS = 3  # bundles that are tried for their backbone
IDLE = 10.0  # seconds without a pass after which nobody waits for one
T = TypeVar("T")


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
        pins: by bundle name, the version that answers requests without one; the default is the latest version.
        on_missing: called with the name of a requested bundle that is not loaded, so that it can load it.
        explain: called with the error for a bundle that is still missing, its name and version, for a better one.
        known: the bundles that images may be dispatched to, in memory or not; None: those in memory.
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
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):  # the latter where torch was built without CUDA
            raise CascadeError(f"this machine has no device {device}: choose cpu, or cuda if there is a GPU") from None
        limit_threads()
        self.device, self.limits, self.weights, self.memory_bytes = device, limits, weights, memory_bytes
        self.max_batch = max_batch
        self._kind: Any = os.environ.get("CASCADE_EXECUTOR", executor) if executor == "auto" else executor
        self.weight_cache = WeightCache(DEFAULT_BUDGET if budget_bytes is None else budget_bytes)
        self.pins: Mapping[str, Pin] = {}
        self.on_missing: Callable[[str], None] | None = None
        self.explain: Callable[[ItemError, str, str | None], ItemError] = lambda error, name, version: error
        self.known: DispatchTable | None = None
        self.last_used: dict[str, float] = {}
        self.unknown: UnknownImages | None = None
        # Replaced, never changed in place, so readers need no lock.
        self._executors: dict[str, Executor] = {}
        self._loaded = Loaded()
        self._table: tuple[object, object, DispatchTable] | None = None  # of these bundles, with these pins
        self._part: tuple[object, object, DispatchTable] | None = None  # of ``known``, for these executors
        self._leaving: list[tuple[weakref.ref[Bundle], tuple[Mask, ...], str]] = []
        self._lock = threading.Lock()  # of passes, which take turns
        self._last_pass = -math.inf  # when it began, monotonic
        on_gpu = torch.device(device).type == "cuda"
        self._gpu: AbstractContextManager[Any] = DEVICE if on_gpu else nullcontext()  # taken after the lock of passes
        self._changing = threading.RLock()  # of what is loaded; taken before the other one

    @property
    def bundles(self) -> list[tuple[str, str]]:
        """(name, version) of every bundle, versions ascending."""
        return [bundle.identity for bundle in self._loaded]

    @property
    def loaded(self) -> list[Bundle]:
        """Every bundle, in the order of ``bundles``; looking at one does not count as its use."""
        return [*self._loaded]

    @property
    def names(self) -> Collection[str]:
        """Names of the bundles."""
        return self._loaded.versions.keys()

    @property
    def only(self) -> str | None:
        """The default name for requests without one: the only bundle's, if no others can be loaded."""
        names = [*self.names]
        return names[0] if len(names) == 1 and self.on_missing is None else None

    @property
    def leaving(self) -> bool:
        """Whether a removed bundle is still answering requests."""
        return any(reference() is not None for reference, _, _ in self._leaving)

    def is_cold(self, name: str | None) -> bool:
        """Whether ``fetch`` may have to load a bundle first, for a request of this name, or of None."""
        if self.on_missing is None:
            return False
        if name in (None, AUTO):
            spaces = self.known.spaces if self.known is not None else ()
            return bool(spaces) and not any(space.fingerprint in self._executors for space in spaces)
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
        self.export(bundle)
        with self._changing:
            fingerprint = bundle.card.backbone.fingerprint
            if bundle.identity in self._loaded:
                raise CascadeError(f"bundle {bundle.name}/{bundle.version} is loaded already; give it another version")
            if not bundle.digest:  # made in memory; compute it now, because packing reorders the masks
                bundle = replace(bundle, digest=digest(bundle))
            executor = self._executors.get(fingerprint)
            if executor is None:
                _until_it_fits(partial(self._expect, bundle, replaces), make_room)
                executor = self._load(bundle)
            else:
                check(bundle, executor.backbone)
            bundle = _packed(bundle, executor)
            with self._gpu:
                bundle = bundle.to(self.device)
            _until_it_fits(partial(self._fit, bundle, executor, replaces), make_room)
            _until_it_fits(partial(self._prepare_passes, bundle, executor), make_room)
            self._executors = {**self._executors, fingerprint: executor}
            if warm:
                try:
                    for part in bundle.parts:
                        self._try(part)
                except Exception:
                    self._drop([(part.masks, fingerprint) for part in bundle.parts])
                    raise
            self._loaded = self._loaded.plus(bundle)
            metrics.add_bundle(bundle.name, bundle.version, bundle.card.router.shares if bundle.card.router else ())
            metrics.resident(self.stats())

    def export(self, bundle: Bundle) -> None:
        """Export the graphs that a bundle needs, in another process, if passes are running that would wait for it.

        ``add`` does this, too; called before, it takes no lock that other loads need.

        Raises:
            BundleError: the bundle does not fit its backbone.
        """
        executor = self._executors.get(bundle.card.backbone.fingerprint)
        if executor is None or time.monotonic() - self._last_pass > IDLE:
            return
        check(bundle, executor.backbone)
        for part in bundle.parts:
            executor.export(part.masks, part.preprocessing.size, _dispatch_stage(bundle, part))

    def remove(self, name: str, version: str) -> None:
        """Remove a bundle: new requests no longer find it, requests in flight are still answered.

        Its weights are freed with the last of these requests, and so is its backbone unless another bundle uses it.

        Raises:
            CascadeError: there is no such bundle.
        """
        with self._changing:
            if (name, version) not in self._loaded:
                raise CascadeError(f"bundle {name}/{version} is not loaded; loaded: {self.bundles}")
            bundle = self._loaded.versions[name][version]
            metrics.remove_bundle(name, version)
            # Items reference their bundle, so it lives as long as one of them waits or is in a pass.
            fingerprint = bundle.card.backbone.fingerprint
            self._leaving = [*self._leaving, *((weakref.ref(part), part.masks, fingerprint) for part in bundle.parts)]
            self._loaded = self._loaded.minus(bundle)
            del bundle
            self._table = None
            self.release()

    def release(self) -> None:
        """Free the memory of removed bundles whose last request has been answered."""
        with self._changing:
            gone = [each for each in self._leaving if each[0]() is None]
            self._leaving = [each for each in self._leaving if each not in gone]
            if gone:
                self._drop([(masks, fingerprint) for _, masks, fingerprint in gone])

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
        with self._lock, self._gpu, torch.no_grad():
            self._last_pass = time.monotonic()
            metrics.QUEUE_DEPTH.dec(len(items))
            settled = dispatch(self._executors, self.device, items, self._bundle, self.unknown)
            flat = [item for own in settled if isinstance(own, tuple) for item in own]
            passed = forward(self._executors, self.weight_cache, self.device, flat)
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
        r = self.weight_cache
        return {
            "backbones": len(self._executors),
            "bundles": len(self.bundles),
            "backbone_bytes": sum(e.bytes() for e in self._executors.values()),
            "packed_bytes": sum(b.bytes() for b in self._loaded),
            "materialized_bytes": r.used,
            "budget_bytes": r.budget,
            "hits": r.hits,
            "misses": r.misses,
            "evictions": r.evictions,
        }

    def executor(self, bundle: Bundle) -> Executor:
        """The executor of a loaded bundle's backbone."""
        return self._executors[bundle.card.backbone.fingerprint]

    def find(self, name: str | None, version: str | None = None) -> Bundle | ItemError:
        """Find the bundle of a request, or return an error that lists the loaded ones.

        Without a version it is the pinned one, else the latest. An on-demand bundle is loaded first.
        """
        name = self.only if name is None else name
        if name is None:
            return ItemError("bundle_missing", f"say which bundle; loaded: {self._loaded.names()}")
        if name not in self.names and self.on_missing is not None:
            self.on_missing(name)
        loaded = self._loaded
        if name in loaded.versions:
            self.last_used[name] = time.monotonic()
        found = loaded.choose(name, version, self.pins.get(name))
        return self.explain(found, name, version) if isinstance(found, ItemError) else found

    def dispatch_table(self) -> DispatchTable | ItemError:
        """The table for images without a bundle's name; rebuilt after the bundles have changed."""
        loaded, known = self._loaded, self.known
        if known is not None:
            part, backbones = self._part, self._executors.keys()
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
        bundle = self._loaded.versions.get(target.name, {}).get(target.version)
        if bundle is not None:
            self.last_used[target.name] = time.monotonic()
        return bundle

    def _load(self, bundle: Bundle) -> Executor:
        """Load or reuse the executor for the bundle's backbone, and check the bundle against it."""
        want = bundle.card.backbone
        backbone = backbones.load(want.name, want.source, self.weights, self.device)
        check(bundle, backbone)
        return choose(backbone, self.weight_cache, self._kind, bundle.preprocessing.size)

    def _expect(self, bundle: Bundle, replaces: Sequence[tuple[str, str]]) -> None:
        """Check that a new backbone fits into the remaining memory, before it is built. Raises OutOfMemory."""
        if self.memory_bytes is not None:
            card = bundle.card.backbone
            needed = max(backbones.size(card.name), 4 * card.maskable) + bundle.bytes()
            expect_room(bundle, needed, self._used(replaces), self.memory_bytes)

    def _fit(self, bundle: Bundle, executor: Executor, replaces: Sequence[tuple[str, str]]) -> None:
        """Check that the bundle, and its backbone if that is new, fit into memory. Raises OutOfMemory."""
        largest = max(executor.size(mask) for part in bundle.parts for mask in part.masks)
        if largest > (budget := self.weight_cache.budget):
            here = f"bundle {bundle.name}/{bundle.version}"
            raise OutOfMemory(f"{here} needs {largest} bytes for the weights of one mask, but --budget is {budget}")
        new = bundle.bytes() + (0 if executor in self._executors.values() else executor.bytes())
        expect_room(bundle, new, self._used(replaces), self.memory_bytes)

    def _used(self, replaces: Sequence[tuple[str, str]]) -> int:
        """Bytes of backbones, known domains and packed bundles, including removed ones that still answer requests."""
        leaving = [bundle for reference, _, _ in self._leaving if (bundle := reference()) is not None]
        executors = sum(executor.bytes() for executor in self._executors.values())
        domains = 0 if self.known is None else self.known.bytes
        return executors + domains + packed_bytes(self._loaded, leaving, replaces)

    def _prepare_passes(self, bundle: Bundle, executor: Executor) -> None:
        """Let the executor build what the passes of either input size need. Raises OutOfMemory."""
        try:
            for part in bundle.parts:
                executor.prepare(part.masks, part.preprocessing.size, _dispatch_stage(bundle, part), self.max_batch)
        except BaseException as error:
            with self._lock:
                for part in bundle.parts:
                    executor.forget(part.masks)
            if isinstance(error, torch.OutOfMemoryError):
                here = f"bundle {bundle.name}/{bundle.version}"
                raise OutOfMemory(f"{here} does not fit into the memory of {self.device}: remove others") from error
            raise
        for part in bundle.parts:
            self.weight_cache.owners.update(dict.fromkeys(part.masks, bundle.name))

    def _try(self, bundle: Bundle) -> None:
        """Run a first pass before the bundle becomes visible."""
        blank = crop_of(bundle.preprocessing)(Image.new("RGB", (bundle.preprocessing.size,) * 2))
        item = Item(bundle, bundle.card.mode, Options(embedding=True, labels=1, neighbors=1), blank)
        with self._lock, self._gpu, torch.no_grad():
            (answer,) = forward(self._executors, self.weight_cache, self.device, [item])
        numbers = [answer.confidence, answer.ood, *(label.score for label in answer.labels)]
        numbers += [neighbor.similarity for neighbor in answer.neighbors]
        if not (all(map(math.isfinite, numbers)) and torch.tensor(answer.embedding).isfinite().all()):
            raise BundleError(f"bundle {bundle.name}/{bundle.version} answers with NaN or infinity; train it again")

    def _drop(self, gone: list[tuple[tuple[Mask, ...], str]]) -> None:
        """Free the weights of masks, and backbones (by fingerprint) that no bundle uses any more."""
        used = {bundle.card.backbone.fingerprint for bundle in self._loaded}
        used |= {fingerprint for _, _, fingerprint in self._leaving}
        with self._lock:
            for masks, fingerprint in gone:
                self._executors[fingerprint].swap(None)
                self._executors[fingerprint].forget(masks)
                for mask in masks:
                    self.weight_cache.drop(mask)
            self._executors = {f: e for f, e in self._executors.items() if f in used}
        metrics.resident(self.stats())

    def _prepare(self, image: Source, options: Options) -> AnyItem | ItemError:
        if options.bundle == AUTO or (
            options.bundle is None and self.only is None and (self.names or self.known is not None)
        ):
            table = self.dispatch_table()
            if isinstance(table, ItemError):
                return table
            again = options.mode in (None, "adaptive", "full") and not isinstance(image, torch.Tensor)
            sizes, spaces = table.larger if again else [], [space.preprocessing for space in table.spaces]
            pixels = pixels_of(image, [*spaces, *sizes], self.limits)
            if isinstance(pixels, ItemError):
                return pixels
            of_larger = dict(zip(sizes, pixels[len(spaces) :], strict=True))
            file = bytes(image) if self.unknown is not None and isinstance(image, bytes | bytearray) else None
            return OpenItem(table, options, tuple(pixels[: len(spaces)]), of_larger, file)
        bundle = self.find(options.bundle, options.version)
        if isinstance(bundle, ItemError):
            return bundle
        mode = deferral.mode_of(bundle, options)
        if isinstance(mode, ItemError):
            return mode
        if mode == "adaptive" and isinstance(image, torch.Tensor):
            mode = "fast"  # preprocessed pixels have one size
        wanted = deferral.preprocessings(bundle, mode)
        pixels = pixels_of(image, wanted, self.limits)
        if isinstance(pixels, ItemError):
            return pixels
        of = dict(zip(wanted, pixels, strict=True))
        larger = None if bundle.larger is None else of.get(bundle.larger.preprocessing)
        return deferral.item_of(bundle, mode, options, of.get(bundle.preprocessing), larger)


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


def _dispatch_stage(bundle: Bundle, part: Bundle) -> int:
    """The stage before which images of this input size are dispatched to the bundle; 0 if they are not."""
    return bundle.card.domain.stage if bundle.card.domain and part is bundle else 0


def _packed(bundle: Bundle, executor: Executor) -> Bundle:
    """The bundle with its masks in the executor's form, and without the parts that serving does not need."""
    experts = tuple(map(executor.pack, bundle.experts))
    larger = None if bundle.larger is None else _packed(bundle.larger, executor)
    mask = executor.pack(bundle.dispatcher)
    return replace(bundle, dispatcher=mask, experts=experts, discriminant=None, larger=larger)


def _until_it_fits(check: Callable[[], None], make_room: Callable[[], bool]) -> None:
    """Call ``check`` until it no longer raises OutOfMemory, or no room can be made."""
    while True:
        try:
            return check()
        except OutOfMemory:
            if not make_room():
                raise


def _raise_first(results: Sequence[object]) -> None:
    for n, result in enumerate(results):
        if isinstance(result, ItemError):
            raise CascadeError(f"image {n}: {result}")
