"""The options of a prediction and its answer: plain data, no torch.

An answer is a ``Prediction`` or an ``ItemError``; ``answer.ok`` tells which, ``answer.error`` is the error or None.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np

from cascade.engine.tenants import Priority

AUTO = "auto"
"""Used instead of a bundle's name: dispatch the image to the bundle that it fits best."""
DispatchMode = Literal["top2", "image", "set"]
InputMode = Literal["fast", "adaptive", "full"]
Unknown = Literal["error", "embedding"]
UNKNOWN_CHOICES: tuple[Unknown, ...] = ("error", "embedding")
INPUT_MODES: tuple[InputMode, ...] = ("fast", "adaptive", "full")
"""Modes of a bundle with two input sizes, see ``cascade.engine.deferral``."""
DISPATCH_MODES: tuple[DispatchMode, ...] = ("top2", "image", "set")


@dataclass(frozen=True)
class Options:
    """What one image's answer should contain.

    Attributes:
        bundle: name; ``auto`` dispatches the image to the bundle that it fits best, and so does None if several are
            loaded.
        version: None for the latest.
        mode: ``dispatcher``, ``conditional``, ``unconditional``, or for a bundle with two input sizes ``fast``,
            ``adaptive``, ``full``; None for the bundle's default.
        embedding: return the embedding.
        labels: most labels to return. neighbors: most neighbors to return.
        priority: in the queue, ``interactive`` or ``batch``; None for the tenant's default.
        dispatch: how an image without a bundle's name is dispatched: ``top2`` sends it to its likeliest bundle, or asks
            two if that is uncertain, and takes the likelier label; ``image`` never asks a second one; ``set`` sends all
            images of a request to the bundle that most of them fit.
        among: names of the bundles that it may be dispatched to; None for all.
        unknown: the answer for an image without a bundle's name that fits no bundle: an ``error``, or the ``embedding``
            of the frozen backbone, with an empty name of the bundle.
    """

    bundle: str | None = None
    version: str | None = None
    mode: str | None = None
    embedding: bool = False
    labels: int = 5
    neighbors: int = 5
    priority: Priority | None = None
    dispatch: DispatchMode = "top2"
    among: frozenset[str] | None = None
    unknown: Unknown = "error"


@dataclass(frozen=True)
class Label:
    """A class and its probability."""

    name: str
    score: float


@dataclass(frozen=True)
class Neighbor:
    """A training image, its class if it has one, and its cosine similarity."""

    name: str
    label: str | None
    similarity: float


@dataclass(frozen=True)
class Dispatch:
    """Why an image without a bundle's name was dispatched to this bundle.

    Attributes:
        confidence: calibrated probability that the image belongs to this bundle.
        likely: the likeliest bundles, best first, each with its probability.
        repeated_stages: stages of the backbone that ran twice, because the bundle's mask begins before dispatch.
        passes: that followed dispatch, at the first input size; those of both bundles if two were asked.
    """

    confidence: float
    likely: tuple[Label, ...]
    repeated_stages: int
    passes: int = 1


@dataclass(frozen=True)
class Deferral:
    """The pass that gave the labels of an answer.

    Attributes:
        input_size: side of its images, pixels.
        deferred: whether it was the second pass, because the first one was unsure.
    """

    input_size: int
    deferred: bool


@dataclass(frozen=True)
class Prediction:
    """The answer for one image.

    Attributes:
        bundle, version, mode: what produced it; bundle and version are empty for the frozen backbone's embedding of an
            image that fits no bundle.
        cluster: assigned by the router; confidence: calibrated probability of this assignment.
        ood: out-of-domain score in [0, 1].
        masks: the masks that were applied, by name.
        labels, neighbors: best first; empty without head or bank.
        embedding: float32 [D], if requested.
        dispatch: None if the request named the bundle.
        deferral: None unless the bundle has two input sizes and the mode uses them.
    """

    bundle: str
    version: str
    mode: str
    cluster: int
    confidence: float
    ood: float
    masks: tuple[str, ...]
    labels: tuple[Label, ...] = ()
    neighbors: tuple[Neighbor, ...] = ()
    embedding: np.ndarray | None = None
    dispatch: Dispatch | None = None
    deferral: Deferral | None = None
    ok: ClassVar[Literal[True]] = True
    error: ClassVar[None] = None

    def to_json(self) -> dict[str, Any]:
        """Plain types; the embedding is a list of floats. Embedding, dispatch and deferral are omitted if None."""
        out = asdict(replace(self, embedding=None)) | {"masks": list(self.masks)}
        for name in ("embedding", "dispatch", "deferral"):
            if out[name] is None:
                del out[name]
        return out if self.embedding is None else out | {"embedding": self.embedding.tolist()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """The inverse of ``to_json``."""
        parts: dict[str, Any] = {
            "masks": tuple(data["masks"]),
            "labels": tuple(Label(**label) for label in data["labels"]),
            "neighbors": tuple(Neighbor(**neighbor) for neighbor in data["neighbors"]),
        }
        if "dispatch" in data:
            likely = tuple(Label(**label) for label in data["dispatch"]["likely"])
            parts["dispatch"] = Dispatch(**data["dispatch"] | {"likely": likely})
        if "deferral" in data:
            parts["deferral"] = Deferral(**data["deferral"])
        if "embedding" in data:
            parts["embedding"] = np.array(data["embedding"], np.float32)
        return cls(**data | parts)


@dataclass(frozen=True)
class ItemError:
    """Why one image has no answer.

    Attributes:
        kind: a short name for programs, like ``not_an_image``; front ends map it to their own codes.
        message: one line that says what is wrong and what to do.
        retry_after: seconds after which a retry is worthwhile; 0 if unknown.
    """

    kind: str
    message: str
    retry_after: float = field(default=0.0, compare=False)
    ok: ClassVar[Literal[False]] = False

    @property
    def error(self) -> Self:
        """The error itself, so that every answer has this attribute."""
        return self

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        return {"error": {"kind": self.kind, "message": self.message}}
