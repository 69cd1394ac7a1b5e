"""Read and write bundles, the files that turn a backbone into an adapted one (docs/bundle-format.md).

``model_store/<name>/<version>/`` holds ``cascade.json`` (the card), safetensors files (masks, router,
fusion, heads; those of a larger input size as ``larger.*``) and ``SHA256SUMS`` over all of them. Only the
folder carries the bundle's name, so a renamed copy has the same bytes. There is no pickle and no timestamp:
the same inputs give the same bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import safetensors.torch
import torch
import zstandard
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from cascade import atomic
from cascade.bundle.bundle import Bundle as Bundle
from cascade.bundle.bundle import BundleError as BundleError
from cascade.bundle.files import CARD as CARD
from cascade.bundle.files import SUMS as SUMS
from cascade.bundle.files import check_name, digest_of, sums_of
from cascade.bundle.files import read as read_files
from cascade.bundle.files import size as files_size
from cascade.bundle.map import Map
from cascade.bundle.schema import FORMAT, Card, MaskCard, Versioned
from cascade.bundle.thumbnails import Thumbnails
from cascade.bundle.validate import domain_inconsistencies, inconsistencies, preprocessing_inconsistencies
from cascade.errors import CascadeError, OutOfMemory
from cascade.model import backbone as backbones
from cascade.model.discriminant import Discriminant
from cascade.model.domain import Domain
from cascade.model.fusion import MODES, Fusion, Identity, SlotBias
from cascade.model.heads import Bank, Linear
from cascade.model.masks import Mask, all_ones
from cascade.model.out_of_domain import OutOfDomain
from cascade.model.preprocessing import Preprocessing
from cascade.model.router import KINDS, Calibration, tensors

ALWAYS, RATIO = 2**28, 100
DOMAIN = "domain.safetensors"
LARGER = "larger."
"""Prefix of the files of the larger input size."""


def read(
    path: Path, identity: tuple[str, str] | None = None, memory: int | None = None, packed: int | None = None
) -> Bundle:
    """Read and verify a bundle: its format, its checksums, and that its parts are consistent.

    Args:
        path: its folder, ``<name>/<version>``.
        identity: name and version, if ``path`` is a temporary folder.
        memory: bytes that the bundle may take, files and masks together; None for no limit beyond ``check_claims``.
        packed: bytes of the archive that the files came from, possibly fewer than theirs; None without an archive.

    Raises:
        BundleError: names the bad file and the reason.
        OutOfMemory: it needs more than ``memory``; nothing was allocated.
    """
    path = Path(path)
    name, version = identity or check_name(path)
    try:
        if memory is not None and (size := files_size(path)) > memory:
            raise OutOfMemory(f"{path} has {size} bytes, {memory} are allowed: raise the limit")
        files, digest = read_files(path)
    except OSError as error:
        raise BundleError(f"{error.filename or path}: {error.strerror}; copy the whole bundle again") from error
    card = _card(path, files[CARD])
    check_claims(path, card, sum(map(len, files.values())) if packed is None else packed, memory)
    parts = {n: _tensors(path / n, raw) for n, raw in files.items() if n != CARD}
    try:
        bundle = replace(assemble(card, parts), name=name, version=version, digest=digest)
    except (CascadeError, KeyError, ValueError, TypeError, zstandard.ZstdError) as error:
        raise BundleError(f"{path}: its parts do not fit together ({error!r}); export the bundle again") from None
    for what in inconsistencies(bundle):
        raise BundleError(f"{path}: {what}; export the bundle again")
    return bundle


def read_domain(path: Path) -> tuple[Card, Domain | None]:
    """Read the card and the domain of a bundle, a few dozen kilobytes, and verify these two files; ``read`` checks all.

    Raises:
        BundleError: names the bad file and the reason.
    """
    try:
        check_name(path)
        files, _ = read_files(path, (CARD, DOMAIN))
    except OSError as error:
        raise BundleError(f"{error.filename or path}: {error.strerror}; copy the whole bundle again") from error
    card = _card(path, files[CARD])
    try:
        stored = strip_prefix(_tensors(path / DOMAIN, files[DOMAIN]), "domain.") if DOMAIN in files else {}
        domain = Domain(**stored) if stored else None
        preprocessing = Preprocessing.from_json(card.preprocessing)
    except (CascadeError, TypeError) as error:
        raise BundleError(f"{path}: its parts do not fit together ({error!r}); export the bundle again") from None
    for what in (*preprocessing_inconsistencies(preprocessing), *domain_inconsistencies(card, domain)):
        raise BundleError(f"{path}: {what}; export the bundle again")
    return card, domain


def _card(path: Path, raw: bytes) -> Card:
    try:
        if not 1 <= (number := Versioned.model_validate_json(raw).format) <= FORMAT:
            advice = "rebuild the bundle or update Cascade"
            raise BundleError(f"{path / CARD}: format {number}, this version reads 1 to {FORMAT}; {advice}")
        return Card.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{path / CARD}: {'.'.join(map(str, first['loc']))}"
        raise BundleError(f"{where}: {first['msg']}; this is not a bundle of format 1 to {FORMAT}") from None


def check_claims(path: Path, card: Card, size: int, memory: int | None) -> None:
    """Compare the sizes that a card claims with the actual bytes, before anything is allocated.

    Masks may expand to ``ALWAYS`` bytes, or to ``RATIO`` times the bundle's ``size`` in bytes.

    Raises:
        BundleError: the masks claim more.
        OutOfMemory: they claim more than ``memory``.
    """
    masks = [*card.masks, *([card.deferral.mask] if card.deferral else [])]
    bits = sum(-(-mask.weights // 8) for mask in masks)
    if any(mask.weights > card.backbone.maskable for mask in masks):
        raise BundleError(f"{path / CARD}: a mask covers more weights than the backbone has; export the bundle again")
    if bits > max(ALWAYS, RATIO * size):
        raise BundleError(f"{path / CARD}: {size} bytes of files claim {bits} bytes of masks; copy the bundle again")
    if memory is not None and size + bits > memory:
        raise OutOfMemory(f"{path} needs {size + bits} bytes, {memory} are allowed: raise the limit")


def check(bundle: Bundle, backbone: backbones.Backbone) -> None:
    """Check that the bundle belongs to exactly this backbone, and that every shape fits.

    Raises:
        BundleError: names what does not fit.
    """
    label, card = f"bundle {bundle.name}/{bundle.version}", bundle.card.backbone
    if backbone.fingerprint != card.fingerprint:
        raise BundleError(
            f"{label} was trained on {card.name} with fingerprint {card.fingerprint[:12]}, these weights"
            f" ({backbone.source}) have {backbone.fingerprint[:12]}; pass the right ones with --weights"
        )
    if backbone.features != card.features or backbone.weights.numel() != card.maskable:
        raise BundleError(f"{label}: {card.features} features and {card.maskable} weights do not fit {backbone.name}")
    if (stages := [stage.name for stage in backbone.stages]) != card.stages:
        raise BundleError(f"{label} has the stages {' '.join(card.stages)}, {backbone.name} has {' '.join(stages)}")
    for mask in [mask for part in bundle.parts for mask in part.masks]:
        n = backbone.weights.numel() - backbone.offset(mask.start)
        if mask.bits.shape != (-(-n // 8),):
            raise BundleError(f"{label}: mask {mask.name} has {mask.bits.numel()} bytes, {n} weights need {-(-n // 8)}")
        for name, tensor in mask.norms.items():
            pristine = backbone.norms.get(name)
            if pristine is None or pristine.shape != tensor.shape or pristine.dtype != tensor.dtype:
                raise BundleError(
                    f"{label}: mask {mask.name}: {backbone.name} has no statistics {name} {list(tensor.shape)}"
                )
        trainable = backbone.channels(mask.start) if mask.channels else {}
        for name, tensor in mask.channels.items():
            if trainable.get(name) != tensor.shape:
                raise BundleError(
                    f"{label}: mask {mask.name}: from its first stage on {backbone.name} has no parameter {name}"
                    f" {list(tensor.shape)} with a value for each channel"
                )
        rows = backbone.rows(mask.start) if mask.deltas else {}
        for name, tensor in mask.deltas.items():
            if list(tensor.shape) != [rows.get(name)]:
                raise BundleError(
                    f"{label}: delta {mask.name}: from its first stage on {backbone.name} has no weight {name} with"
                    f" {list(tensor.shape)} output channels"
                )


def serialize(bundle: Bundle, *, compress: bool = True) -> dict[str, bytes]:
    """Serialize a bundle to its files by name, without ``SHA256SUMS``.

    Args:
        bundle: what to serialize.
        compress: store mask bits as zstd frames.
    """
    tensors_by_part = contents(bundle, compress=compress)
    files = {
        f"{part}.safetensors": safetensors.torch.save(tensors) for part, tensors in tensors_by_part.items() if tensors
    }
    sizes = {name: len(raw) for name, raw in sorted(files.items())}
    card = bundle.card.model_copy(update={"format": format_of(bundle), "bytes": sizes})
    document = card.model_dump(exclude={name for name in ("domain", "deferral") if getattr(card, name) is None})
    return files | {CARD: (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()}


def write(bundle: Bundle, path: Path, *, compress: bool = True) -> Path:
    """Write a bundle to ``path`` (``<name>/<version>``), which must not exist, atomically.

    Args:
        bundle: its name and version are not written; the folder carries them.
        path: the folder to create.
        compress: store mask bits as zstd frames.

    Raises:
        BundleError: ``path`` exists, has an invalid name, or can't be written.
    """
    files = serialize(bundle, compress=compress)
    return write_files(path, files | {SUMS: sums_of(files)})


def write_files(path: Path, files: Mapping[str, bytes], packed: int | None = None) -> Path:
    """Verify the files of a bundle, including ``SHA256SUMS``, and write them atomically to a new folder.

    Args:
        path: the folder to create.
        files: content by name.
        packed: as for ``read``.

    Raises:
        BundleError: as for ``write``, or the files are not a valid bundle.
    """
    path = Path(path)
    name = check_name(path)
    if path.exists():
        raise BundleError(f"{path} exists and versions are never overwritten: choose a new version")
    try:
        with atomic.folder(path) as staging:
            for file, raw in files.items():
                (staging / file).write_bytes(raw)
            read(staging, name, packed=packed)
    except OSError as error:
        raise BundleError(f"can't write {path}: {error.strerror}; free disk space or choose another folder") from error
    return path


def format_of(bundle: Bundle) -> int:
    """The oldest format that can hold the bundle."""
    halves = any(head.weight.dtype != torch.float32 for head in bundle.linear.values())
    parts_of_2 = bundle.domain, bundle.discriminant, bundle.larger
    new = halves or any(part is not None for part in parts_of_2)
    new |= any(isinstance(f, (Identity, SlotBias)) for f in bundle.fusions.values())
    for mask, card in zip(bundle.masks, bundle.card.masks, strict=True):
        new |= bool(mask.channels or mask.deltas) or _keeps_all(mask, card)
    return 2 if new else 1


def _keeps_all(mask: Mask, card: MaskCard) -> bool:
    """Whether all bits are ones; then they are not stored."""
    return mask.bits.cpu().equal(all_ones(card.weights))


def digest(bundle: Bundle) -> str:
    """Digest that identifies a bundle, in hex, over every byte of its files, also if it has not been written yet."""
    return bundle.digest or digest_of(serialize(bundle))


def _tensors(path: Path, raw: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(raw)
    except SafetensorError as error:
        raise BundleError(f"{path}: not a safetensors file ({error}); copy the bundle again") from None


def contents(bundle: Bundle, *, compress: bool) -> dict[str, dict[str, Tensor]]:
    """The tensors of each file, by file name without the extension."""
    masks: dict[str, Tensor] = {}
    for m, card in zip(bundle.masks, bundle.card.masks, strict=True):
        if not _keeps_all(m, card):
            masks |= {f"{m.name}.bits.zst": _zstd(m.bits)} if compress else {f"{m.name}.bits": m.bits}
        masks |= {f"{m.name}.norms.{name}": t for name, t in m.norms.items()}
        masks |= {f"{m.name}.channels.{name}": t for name, t in m.channels.items()}
        masks |= {f"{m.name}.deltas.{name}": t for name, t in m.deltas.items()}
    router = {} if bundle.router is None else {f"router.{n}": t for n, t in tensors(bundle.router).items()}
    ood = {} if bundle.ood is None else {f"ood.{f.name}": getattr(bundle.ood, f.name) for f in fields(bundle.ood)}
    domain = {} if bundle.domain is None else {f"domain.{n}": getattr(bundle.domain, n) for n in Domain.layout}
    projected = [(mode, f) for mode, f in bundle.fusions.items() if not isinstance(f, Identity)]
    fusion = {f"{mode}.{n}": getattr(f, n) for mode, f in projected for n in ("weight", "bias")}
    heads = {f"{mode}.linear.{n}": getattr(h, n) for mode, h in bundle.linear.items() for n in ("weight", "bias")}
    for mode, bank in bundle.banks.items():
        heads |= {f"{mode}.bank": bank.embeddings, "bank.names": _text(bank.names)}
        heads |= {"bank.labels": _text(bank.labels)} if bank.labels else {}
    thumbnails = bundle.thumbnails
    pictures = (
        {} if thumbnails is None else {f"thumbnails.{f.name}": getattr(thumbnails, f.name) for f in fields(thumbnails)}
    )
    parts = {"masks": masks, "router": router | ood, "domain": domain, "fusion": fusion, "heads": heads}
    parts["thumbnails"] = pictures
    parts["map"] = {} if bundle.map is None else {f"map.{n}": getattr(bundle.map, n) for n in Map.layout}
    discriminant = bundle.discriminant
    parts["discriminant"] = {} if discriminant is None else {n: getattr(discriminant, n) for n in Discriminant.layout}
    larger = {} if bundle.larger is None else contents(bundle.larger, compress=compress)
    # Copies, because safetensors rejects tensors that share memory.
    copies = {part: {n: t.detach().cpu().contiguous().clone() for n, t in ts.items()} for part, ts in parts.items()}
    return copies | {LARGER + part: tensors for part, tensors in larger.items()}


def assemble(card: Card, parts: Mapping[str, Mapping[str, Tensor]]) -> Bundle:
    """Build a bundle, still without a name, from its card and the tensors of each file; ``read`` checks more."""
    masks = [_mask(parts.get("masks.safetensors", {}), m, card.format) for m in card.masks]
    routing = parts.get("router.safetensors", {})
    fusion, heads = parts.get("fusion.safetensors", {}), parts.get("heads.safetensors", {})
    pictures, domain = parts.get("thumbnails.safetensors", {}), parts.get(DOMAIN, {})
    places = parts.get("map.safetensors", {})
    router = None
    if card.router is not None:
        kind = next((k for k in KINDS if k.kind == card.router.kind), None)
        if kind is None:
            raise ValueError(f"unknown router {card.router.kind}")
        router = kind(**strip_prefix(routing, "router."))
    labels = _lines(heads["bank.labels"]) if "bank.labels" in heads else ()
    larger, of_larger = card.larger(), {n.removeprefix(LARGER): t for n, t in parts.items() if n.startswith(LARGER)}
    if of_larger and larger is None:
        raise ValueError("there are files of a larger input size, but the card has none")
    return Bundle(
        name="",
        version="",
        card=card,
        preprocessing=Preprocessing.from_json(card.preprocessing),
        dispatcher=masks[0],
        experts=tuple(masks[1:]),
        router=router,
        calibration=Calibration(card.router.slope, card.router.intercept) if card.router else Calibration(),
        ood=OutOfDomain(**strip_prefix(routing, "ood.")) if "ood.mean" in routing else None,
        fusions={m: _fusion(strip_prefix(fusion, f"{m}.")) for m in MODES if f"{m}.weight" in fusion}
        or {"dispatcher": Identity.of(card.dim)},
        linear={m: Linear(**strip_prefix(heads, f"{m}.linear.")) for m in MODES if f"{m}.linear.weight" in heads},
        banks={m: Bank(heads[f"{m}.bank"], _lines(heads["bank.names"]), labels) for m in MODES if f"{m}.bank" in heads},
        domain=Domain(**strip_prefix(domain, "domain.")) if domain else None,
        thumbnails=Thumbnails(**strip_prefix(pictures, "thumbnails.")) if pictures else None,
        map=Map(**strip_prefix(places, "map.")) if places else None,
        discriminant=Discriminant(**parts["discriminant.safetensors"]) if "discriminant.safetensors" in parts else None,
        larger=None if larger is None else assemble(larger, of_larger),
    )


def _mask(stored: Mapping[str, Tensor], card: MaskCard, version: int) -> Mask:
    size = -(-card.weights // 8)
    if (packed := stored.get(f"{card.name}.bits.zst")) is not None:
        bits = _unzstd(packed, size)
    elif f"{card.name}.bits" in stored or version == 1:
        bits = stored[f"{card.name}.bits"]
    else:
        bits = all_ones(card.weights)
    if bits.dtype != torch.uint8 or bits.shape != (size,):
        raise ValueError(f"mask {card.name} has {bits.numel()} bytes, not {size}")
    parts = [strip_prefix(stored, f"{card.name}.{part}.") for part in ("norms", "channels", "deltas")]
    if version == 1 and any(parts[1:]):
        raise ValueError(f"mask {card.name} has trained channels or deltas, which format 1 does not have")
    return Mask(card.name, card.start, bits, *parts)


def _fusion(stored: Mapping[str, Tensor]) -> Fusion:
    return (SlotBias if stored["bias"].dim() == 2 else Fusion)(**stored)


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose name begins with ``prefix``, by the rest of their name."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _zstd(bits: Tensor) -> Tensor:
    return _bytes(zstandard.ZstdCompressor(level=19).compress(bits.numpy().tobytes()))


def _unzstd(packed: Tensor, size: int) -> Tensor:
    frame = packed.numpy().tobytes()
    if zstandard.frame_content_size(frame) != size:  # checked before anything is expanded
        raise ValueError(f"a mask expands to {zstandard.frame_content_size(frame)} bytes, not {size}")
    return _bytes(zstandard.ZstdDecompressor().decompress(frame))


def _text(lines: tuple[str, ...]) -> Tensor:
    return _bytes("\n".join(lines).encode())


def _lines(stored: Tensor) -> tuple[str, ...]:
    return tuple(stored.numpy().tobytes().decode().split("\n"))


def _bytes(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)
