"""Check that the parts of a bundle are consistent: names, counts, and every tensor's dtype and shape."""

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from cascade.bundle.bundle import Bundle
from cascade.bundle.map import Map
from cascade.bundle.schema import Card
from cascade.bundle.thumbnails import Thumbnails
from cascade.model.discriminant import Discriminant
from cascade.model.domain import MAX_WIDTH, Domain
from cascade.model.fusion import MODES, Fusion, Identity, SlotBias
from cascade.model.heads import Bank, Linear
from cascade.model.out_of_domain import OutOfDomain
from cascade.model.preprocessing import MAX_RESIZED, Preprocessing
from cascade.model.router import Prototypes, Router

MAX_PROTOTYPES = 256
MAX_SIZE, MIN_CROP, MAX_CROP = 2048, 0.2, 2.0


def inconsistencies(bundle: Bundle) -> Iterator[str]:
    """Yield inconsistencies between a bundle's parts; ``cascade.bundle.format.check`` compares it with its backbone."""
    card, k = bundle.card, len(bundle.experts)
    yield from _not_finite(bundle)
    yield from preprocessing_inconsistencies(bundle.preprocessing)
    names = ["dispatcher", *(f"expert-{i}" for i in range(k))]
    if [m.name for m in bundle.masks] != names:
        yield f"its masks should be {' '.join(names)}"
    last = len(card.backbone.stages) - (0 if k == 0 and card.format > 1 else 1)  # all stages: a frozen dispatcher
    if any(m.start > last for m in bundle.masks):
        yield "a mask starts after the last stage"
    for m in bundle.masks:
        for name, values in (m.channels | m.deltas).items():
            if values.dtype != torch.float16 or values.dim() != 1 or not values.isfinite().all():
                yield f"mask {m.name}: the trained values {name} are not finite float16 numbers in one dimension"
    if any(m.start < bundle.dispatcher.start for m in bundle.experts):
        yield "an expert starts before the dispatcher"
    if len({m.start for m in bundle.experts}) > 1:
        yield "experts start at different stages"
    if (bundle.router is None) != (k == 0):
        yield "experts need a router, and a router needs experts"
    if card.router is not None and len(card.router.shares) != k:
        yield "the card needs one share per expert"
    if card.mode not in bundle.fusions:
        yield f"no fusion for its default mode {card.mode}"
    sizes = {"F": card.backbone.features, "K": k, "dim": card.dim, "classes": len(card.classes), "1": 1}
    for what, part in (("router", bundle.router), ("ood", bundle.ood)):
        yield from _misshapen(what, part, sizes)
    if isinstance(r := bundle.router, Prototypes) and (
        int(r.clusters) != k or not set(r.cluster.tolist()) <= {*range(k)}
    ):
        yield "router: its prototypes need one cluster per expert"
    yield from domain_inconsistencies(card, bundle.domain)
    if bundle.ood is not None and len(bundle.ood.quantiles) < 2:
        yield "ood: it needs two or more quantiles"
    slots = {"dispatcher": {1}, "conditional": {2, k + 1}, "unconditional": {k + 1}}
    for mode in MODES:
        yield from _misshapen(f"fusion {mode}", bundle.fusions.get(mode), sizes)
        yield from _misshapen(f"head {mode}", bundle.linear.get(mode), sizes)
        fusion = bundle.fusions.get(mode)
        if isinstance(fusion, Identity) and (card.format == 1 or k or card.dim != card.backbone.features):
            yield "it has no fusion"
        if isinstance(fusion, SlotBias) and card.format == 1:
            yield f"fusion {mode} has a bias for each slot, which format 1 does not have"
        if fusion and len(fusion.weight) not in slots[mode]:
            yield f"fusion {mode} has {len(fusion.weight)} slots"
        if bank := bundle.banks.get(mode):
            yield from _misshapen(f"bank {mode}", bank, sizes | {"rows": len(bank.names)})
            if len(bank.labels) not in (0, len(bank.names)):
                yield f"bank {mode} has {len(bank.names)} names and {len(bank.labels)} labels"
    if (discriminant := bundle.discriminant) is not None:
        yield from _misshapen("discriminant", discriminant, sizes)
        if card.format == 1 or k or len(discriminant.correlation) != card.dim * (card.dim + 1) // 2:
            yield f"discriminant: it needs format 2, no experts, and a triangle of {card.dim} columns"
        elif (
            min(float(discriminant.deviation.min()), float(discriminant.ridge), float(discriminant.temperature)) <= 0
            or discriminant.counts.min() < 0
        ):
            yield "discriminant: its deviations, ridge and temperature must be above 0, its counts at least 0"
    yield from _larger(bundle)
    rows = next((len(bank.names) for bank in bundle.banks.values()), 0)
    if bundle.map is not None:
        misshapen = [*_misshapen("map", bundle.map, {"rows": rows, "2": 2})]
        yield from misshapen or (f"map: {what}" for what in bundle.map.inconsistencies(max(1, k)))
    if bundle.thumbnails is not None:
        misshapen = [*_misshapen("thumbnails", bundle.thumbnails, {"rows+1": rows + 1})]
        yield from misshapen or (f"thumbnails: {what}" for what in bundle.thumbnails.inconsistencies())


def domain_inconsistencies(card: Card, domain: Domain | None) -> Iterator[str]:
    """Yield inconsistencies between a domain and the card of its bundle."""
    if (domain is None) != (card.domain is None):
        yield "a domain needs its stage in the card, and a stage needs a domain"
    if domain is None or card.domain is None:
        return
    misshapen = [*_misshapen("domain", domain, {})]
    yield from misshapen or _not_all_finite("domain", domain)
    width = domain.prototypes.shape[-1]
    if card.format == 1 or not 0 < len(domain.prototypes) <= MAX_PROTOTYPES:
        yield f"domain: it needs format 2, and 1 to {MAX_PROTOTYPES} prototypes"
    if not 0 < width <= MAX_WIDTH or len(domain.scatter) != width * (width + 1) // 2:
        yield f"domain: its scatter is not a triangle of {width} columns, or has more than {MAX_WIDTH}"
    if not 2 <= len(domain.samples) <= MAX_PROTOTYPES:
        yield f"domain: it has {len(domain.samples)} samples, not 2 to {MAX_PROTOTYPES}"
    if card.domain.stage >= len(card.backbone.stages):
        yield "domain: it was fitted after the last stage"


def _larger(bundle: Bundle) -> Iterator[str]:
    """Yield inconsistencies of the larger input size."""
    larger = bundle.larger
    if (larger is None) != (bundle.card.deferral is None):
        yield "a larger input size needs a deferral entry in the card, and that entry needs a larger input size"
    if larger is None:
        return
    yield from (f"larger: {what}" for what in inconsistencies(larger))
    if bundle.card.format == 1 or bundle.experts or larger.experts or larger.larger is not None:
        yield "larger: it needs format 2, and no experts"
    more = larger.router, larger.ood, larger.domain, larger.thumbnails, larger.map, larger.discriminant
    if larger.banks or any(part is not None for part in more):
        yield "larger: it has more than a mask and a head"
    if "dispatcher" not in bundle.linear or "dispatcher" not in larger.linear:
        yield "larger: both sizes need a head"
    if larger.preprocessing.size <= bundle.preprocessing.size:
        yield f"larger: {larger.preprocessing.size} px is not more than {bundle.preprocessing.size} px"


def _not_finite(bundle: Bundle) -> Iterator[str]:
    """Yield parts with NaN or infinity, which would make answers NaN or infinite."""
    names = ("router", "ood", "discriminant")
    parts: dict[str, object] = {name: getattr(bundle, name) for name in names}
    parts |= {m.name: m for m in bundle.masks}
    for group in ("fusions", "linear", "banks"):
        parts |= {f"{group} {mode}": part for mode, part in getattr(bundle, group).items()}
    for what, part in parts.items():
        yield from _not_all_finite(what, part)


def _not_all_finite(what: str, part: Any) -> Iterator[str]:
    values = [getattr(part, f.name) for f in fields(part)] if part is not None else []
    tensors = [t for v in values for t in (v.values() if isinstance(v, dict) else [v]) if isinstance(t, Tensor)]
    kinds = {t.dtype for t in tensors if t.is_floating_point()}  # bits are finite
    flat = [torch.cat([t.flatten() for t in tensors if t.dtype == kind]) for kind in kinds]
    if not all(t.isfinite().all() for t in flat):  # together: a mask has a hundred small tensors
        yield f"{what}: not all of its numbers are finite"


def preprocessing_inconsistencies(preprocessing: Preprocessing) -> Iterator[str]:
    """Yield sizes that would make a small image take gigabytes."""
    if not 1 <= preprocessing.size <= MAX_SIZE:
        yield f"preprocessing: size {preprocessing.size} is not within 1 to {MAX_SIZE} pixels"
    elif not MIN_CROP <= preprocessing.crop_pct <= MAX_CROP:
        yield f"preprocessing: crop_pct {preprocessing.crop_pct} is not within {MIN_CROP} to {MAX_CROP}"
    elif preprocessing.resized_side**2 > MAX_RESIZED:
        yield f"preprocessing: size {preprocessing.size} and crop_pct {preprocessing.crop_pct} resize images too far"
    if not all(map(math.isfinite, (*preprocessing.mean, *preprocessing.std))) or min(preprocessing.std) <= 0:
        yield "preprocessing: mean and std must be finite, and std above 0"


def _misshapen(
    what: str,
    part: Router | OutOfDomain | Domain | Fusion | Linear | Bank | Thumbnails | Map | Discriminant | None,
    sizes: dict[str, int],
) -> Iterator[str]:
    """Yield tensors that do not match the part's layout; an axis missing in ``sizes`` takes the first length seen."""
    sizes = dict(sizes)
    for name, layout in part.layout.items() if part else ():
        tensor, (dtype, *axes) = getattr(part, name), layout.split()
        shape = list(tensor.shape)
        fits = len(axes) == len(shape) and [sizes.setdefault(a, n) for a, n in zip(axes, shape, strict=True)] == shape
        if not any(tensor.dtype == getattr(torch, d) for d in dtype.split("/")) or not fits:
            yield f"{what}: {name} is {str(tensor.dtype).removeprefix('torch.')} {shape}, should be {layout}"
