"""What an engine holds in memory: backbones, packed bundles, materialized weights, and what executors build for them.

Bundles are added and removed while passes run. ``executors`` and ``loaded`` are replaced, never changed in place, so
readers need no lock.
"""

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cascade import metrics
from cascade.bundle.bundle import Bundle, BundleError
from cascade.bundle.format import check, digest
from cascade.engine.dispatch_table import DispatchTable
from cascade.engine.executors import Executor
from cascade.engine.executors.precision import DEVICE
from cascade.engine.executors.selection import Kind, choose
from cascade.engine.forward import forward
from cascade.engine.items import Item
from cascade.engine.loaded import Loaded, expect_room, packed_bytes
from cascade.engine.pixels import crop_of
from cascade.engine.results import Options
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError, OutOfMemory
from cascade.model import backbone as backbones
from cascade.model.masks import Mask

DEFAULT_BUDGET = 2**30
IDLE = 10.0  # seconds without a pass after which nobody waits for one


class Resident:
    """Bundles over resident backbones. Arguments as in ``cascade.Engine``.

    Attributes:
        executors: one per backbone, by fingerprint.
        loaded: the bundles that requests find.
        weight_cache: materialized weights, shared by the executors.
        known: see ``cascade.Engine``.
        last_pass: when the last pass with images began, monotonic.
    """

    def __init__(
        self,
        budget_bytes: int | None,
        device: str,
        weights: Path | None,
        executor: Kind,
        memory_bytes: int | None,
        max_batch: int,
    ) -> None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):  # the latter where torch was built without CUDA
            raise CascadeError(f"this machine has no device {device}: choose cpu, or cuda if there is a GPU") from None
        self.device, self.weights, self.memory_bytes, self.max_batch = device, weights, memory_bytes, max_batch
        self._kind: Any = os.environ.get("CASCADE_EXECUTOR", executor) if executor == "auto" else executor
        self.weight_cache = WeightCache(DEFAULT_BUDGET if budget_bytes is None else budget_bytes)
        self.executors: dict[str, Executor] = {}
        self.loaded = Loaded()
        self.known: DispatchTable | None = None
        self.last_pass = -math.inf
        self._leaving: list[tuple[weakref.ref[Bundle], tuple[Mask, ...], str]] = []
        self._lock = threading.Lock()  # of passes, which take turns
        on_gpu = torch.device(device).type == "cuda"
        self._gpu: AbstractContextManager[Any] = DEVICE if on_gpu else nullcontext()  # taken after the lock of passes
        self._changing = threading.RLock()  # of what is loaded; taken before the other one

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Take the turn of one pass: no other pass runs meanwhile, and autograd is off."""
        with self._lock, self._gpu, torch.no_grad():
            yield

    @property
    def leaving(self) -> bool:
        """Whether a removed bundle is still answering requests."""
        return any(reference() is not None for reference, _, _ in self._leaving)

    def add(
        self, bundle: Bundle, warm: bool, replaces: Sequence[tuple[str, str]], make_room: Callable[[], bool]
    ) -> None:
        """Make a bundle available; see ``Engine.add``."""
        self.export(bundle)
        with self._changing:
            fingerprint = bundle.card.backbone.fingerprint
            if bundle.identity in self.loaded:
                raise CascadeError(f"bundle {bundle.name}/{bundle.version} is loaded already; give it another version")
            if not bundle.digest:  # made in memory; compute it now, because packing reorders the masks
                bundle = replace(bundle, digest=digest(bundle))
            executor = self.executors.get(fingerprint)
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
            self.executors = {**self.executors, fingerprint: executor}
            if warm:
                try:
                    for part in bundle.parts:
                        self._try(part)
                except Exception:
                    self._drop([(part.masks, fingerprint) for part in bundle.parts])
                    raise
            self.loaded = self.loaded.plus(bundle)
            metrics.add_bundle(bundle.name, bundle.version, bundle.card.router.shares if bundle.card.router else ())
            self._report()

    def export(self, bundle: Bundle) -> None:
        """Export the graphs that a bundle needs, in another process, if passes are running that would wait for it.

        ``add`` does this, too; called before, it takes no lock that other loads need.

        Raises:
            BundleError: the bundle does not fit its backbone.
        """
        executor = self.executors.get(bundle.card.backbone.fingerprint)
        if executor is None or time.monotonic() - self.last_pass > IDLE:
            return
        check(bundle, executor.backbone)
        for part in bundle.parts:
            executor.export(part.masks, part.preprocessing.size, _dispatch_stage(bundle, part))

    def remove(self, name: str, version: str) -> None:
        """Let new requests no longer find a bundle; ``release`` frees its memory."""
        with self._changing:
            if (name, version) not in self.loaded:
                raise CascadeError(
                    f"bundle {name}/{version} is not loaded; loaded: {[each.identity for each in self.loaded]}"
                )
            bundle = self.loaded.versions[name][version]
            metrics.remove_bundle(name, version)
            # Items reference their bundle, so it lives as long as one of them waits or is in a pass.
            fingerprint = bundle.card.backbone.fingerprint
            self._leaving = [*self._leaving, *((weakref.ref(part), part.masks, fingerprint) for part in bundle.parts)]
            self.loaded = self.loaded.minus(bundle)

    def release(self) -> None:
        """Free the memory of removed bundles whose last request has been answered."""
        with self._changing:
            gone = [each for each in self._leaving if each[0]() is None]
            self._leaving = [each for each in self._leaving if each not in gone]
            if gone:
                self._drop([(masks, fingerprint) for _, masks, fingerprint in gone])

    def stats(self) -> dict[str, int]:
        """See ``Engine.stats``."""
        cache = self.weight_cache
        return {
            "backbones": len(self.executors),
            "bundles": len([*self.loaded]),
            "backbone_bytes": sum(e.bytes() for e in self.executors.values()),
            "packed_bytes": sum(b.bytes() for b in self.loaded),
            "materialized_bytes": cache.used,
            "budget_bytes": cache.budget,
            "hits": cache.hits,
            "misses": cache.misses,
            "evictions": cache.evictions,
        }

    def _load(self, bundle: Bundle) -> Executor:
        """Load the bundle's backbone, check the bundle against it, and choose its executor."""
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
        new = bundle.bytes() + (0 if executor in self.executors.values() else executor.bytes())
        expect_room(bundle, new, self._used(replaces), self.memory_bytes)

    def _used(self, replaces: Sequence[tuple[str, str]]) -> int:
        """Bytes of backbones, known domains and packed bundles, including removed ones that still answer requests."""
        leaving = [bundle for reference, _, _ in self._leaving if (bundle := reference()) is not None]
        executors = sum(executor.bytes() for executor in self.executors.values())
        domains = 0 if self.known is None else self.known.bytes
        return executors + domains + packed_bytes(self.loaded, leaving, replaces)

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
        with self.turn():
            (answer,) = forward(self.executors, self.weight_cache, self.device, [item])
        numbers = [answer.confidence, answer.ood, *(label.score for label in answer.labels)]
        numbers += [neighbor.similarity for neighbor in answer.neighbors]
        if not (all(map(math.isfinite, numbers)) and torch.tensor(answer.embedding).isfinite().all()):
            raise BundleError(f"bundle {bundle.name}/{bundle.version} answers with NaN or infinity; train it again")

    def _drop(self, gone: list[tuple[tuple[Mask, ...], str]]) -> None:
        """Free the weights of masks, and backbones (by fingerprint) that no bundle uses any more."""
        used = {bundle.card.backbone.fingerprint for bundle in self.loaded}
        used |= {fingerprint for _, _, fingerprint in self._leaving}
        with self._lock:
            for masks, fingerprint in gone:
                self.executors[fingerprint].swap(None)
                self.executors[fingerprint].forget(masks)
                for mask in masks:
                    self.weight_cache.drop(mask)
            self.executors = {f: e for f, e in self.executors.items() if f in used}
        self._report()

    def _report(self) -> None:
        """Set the gauges of what is resident."""
        metrics.resident(self.stats())
        metrics.FEATURE_ERROR.set(max((executor.error for executor in self.executors.values()), default=0.0))


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
