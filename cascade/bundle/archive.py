"""A bundle as one file to send: masks by the context coder, experts as changes of the dispatcher's.

It is a safetensors file of all the bundle's tensors, named ``PART/NAME``; its metadata holds the card, and a digest of
the tensors as they were. On disk and in stores bundles stay as docs/bundle-format.md has them: who gets the file
unpacks it.
"""

import hashlib
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade.atomic import write_bytes
from cascade.bundle import coder
from cascade.bundle import format as bundles
from cascade.bundle.format import BundleError
from cascade.bundle.schema import Card, MaskCard
from cascade.errors import CascadeError
from cascade.model import masks

FORMAT = "cascade transport 1"


def pack(folder: Path, file: Path) -> Path:
    """Write the bundle in ``folder`` as ``file``; all of it or nothing.

    Raises:
        BundleError: there is no whole bundle, or the file exists or can't be written.
    """
    bundle = bundles.read(folder)
    if file.exists():
        raise BundleError(f"{file} exists: choose another name")
    tensors = {f"{part}/{n}": t for part, ts in bundles.contents(bundle, compress=False).items() for n, t in ts.items()}
    about = {"format": FORMAT, "card": bundle.card.model_dump_json(), "sha256": _digest(tensors)}
    stored = [mask for mask in bundle.card.masks if _plain(mask) in tensors]  # the others keep all weights
    for i, mask in enumerate(stored):
        known = [tail(tensors[_plain(of)], of, mask) for of in stored[:i]]
        coded = coder.encode(tensors[_plain(mask)].numpy(), known)
        tensors[_coded(mask)] = torch.from_numpy(np.frombuffer(coded, np.uint8).copy())
    for mask in stored:
        del tensors[_plain(mask)]
    try:
        write_bytes(file, [safetensors.torch.save(tensors, about)])
    except CascadeError as error:
        raise BundleError(f"can't write the packed bundle: {error}") from error
    return file


def unpack(file: Path, folder: Path) -> Path:
    """Write the bundle that ``file`` holds to ``folder`` (``<name>/<version>``), which must not exist.

    Raises:
        BundleError: the file is not what ``pack`` writes, or was changed since, or the folder can't be written.
    """
    damaged = f"{file} is not a packed bundle, or was damaged on its way: get it again"
    try:
        if file.stat().st_size > bundles.MAX_BYTES:
            raise BundleError(f"{file} is larger than {bundles.MAX_BYTES} bytes; no packed bundle is")
        with safe_open(file, "pt") as held:
            about, tensors = held.metadata() or {}, {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except OSError as error:
        raise BundleError(f"can't read {file}: {error.strerror or error}") from None
    except SafetensorError:
        raise BundleError(damaged) from None
    if about.get("format") != FORMAT:
        raise BundleError(damaged)
    try:
        card = Card.model_validate_json(about["card"])
        stored = [mask for mask in card.masks if _coded(mask) in tensors]
        for i, mask in enumerate(stored):
            known = [tail(tensors[_plain(of)], of, mask) for of in stored[:i]]
            coded = tensors.pop(_coded(mask)).numpy().tobytes()
            tensors[_plain(mask)] = torch.from_numpy(coder.decode(coded, -(-mask.weights // 8), known))
        if _digest(tensors) != about["sha256"]:
            raise BundleError(damaged)
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, own = name.partition("/")
            parts.setdefault(f"{part}.safetensors", {})[own] = tensor
        bundle = bundles.assemble(folder, card, parts)
    except (CascadeError, ValidationError, KeyError, ValueError, TypeError):
        raise BundleError(damaged) from None
    return bundles.write(bundle, folder)


def tail(bits: Tensor, of: MaskCard, mask: MaskCard) -> np.ndarray:
    """The packed bits, of those of one mask, of the weights that another covers: uint8."""
    if mask.weights > of.weights:
        raise BundleError(f"{mask.name} covers more weights than {of.name}")
    return masks.pack(masks.unpack(bits, of.weights)[of.weights - mask.weights :]).numpy()


def _digest(tensors: dict[str, Tensor]) -> str:
    return hashlib.sha256(safetensors.torch.save(tensors)).hexdigest()


def _plain(mask: MaskCard) -> str:
    return f"masks/{mask.name}.bits"


def _coded(mask: MaskCard) -> str:
    return f"masks/{mask.name}.bits.coded"
