"""Fusion combines the blocks ``[D(x), E1(x) .. EK(x)]`` into one embedding (paper §3.4; method.md §3).

``dispatcher`` uses the first block only, ``conditional`` the dispatcher's block and the routed expert's,
``unconditional`` all of them. Centering, PCA and whitening are folded into one affine map:
``embedding = bias + sum over blocks of block_i @ weight_i``, where absent blocks count as zero.
In ``dispatcher`` mode a bundle may omit the fusion: then the embedding is the features themselves.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Mode = Literal["dispatcher", "conditional", "unconditional"]
MODES: tuple[Mode, ...] = ("dispatcher", "conditional", "unconditional")


@dataclass(frozen=True, eq=False)
class Fusion:
    """The folded projection of one mode.

    Attributes:
        weight: float16 [slots, F, dim]. With two slots in conditional mode all experts share the second
            ("one slot"); with K + 1 each expert has its own and the others count as zero, as in the paper.
        bias: float32 [dim], the embedding if all blocks are zero.
    """

    layout: ClassVar[dict[str, str]] = {"weight": "float16 slots F dim", "bias": "float32 dim"}
    weight: Tensor
    bias: Tensor

    def embed(self, features: Tensor) -> Tensor:
        """The embedding before any expert's block is added: features of the dispatcher [B, F] to float32 [B, dim]."""
        return torch.addmm(self.bias, features.float(), self.weight[0].float())

    def project(self, features: Tensor, expert: int | None) -> Tensor:
        """The contribution of one block to the embedding: features [B, F] to float32 [B, dim].

        Args:
            features: of one mask.
            expert: index of the expert, or None for the dispatcher.
        """
        return features.float() @ self.weight[self.slot(expert)].float()

    def slot(self, expert: int | None) -> int:
        """Index of the weight's slot for a block; see ``project``."""
        return 0 if expert is None else 1 if len(self.weight) == 2 else expert + 1


@dataclass(frozen=True, eq=False)
class SlotBias(Fusion):
    """A projection with a bias for each slot, which is added with its block: heads of experts are stored so.

    Attributes:
        bias: float32 [slots, dim].
    """

    layout: ClassVar[dict[str, str]] = {"weight": "float16 slots F dim", "bias": "float32 slots dim"}

    def project(self, features: Tensor, expert: int | None) -> Tensor:
        return super().project(features, expert) + self.bias[self.slot(expert)]

    def embed(self, features: Tensor) -> Tensor:
        return self.project(features, None)


@dataclass(frozen=True, eq=False)
class Identity(Fusion):
    """No projection, in ``dispatcher`` mode: the embedding is the features. Bundles do not store it."""

    layout: ClassVar[dict[str, str]] = {"bias": "float32 dim"}

    @classmethod
    def of(cls, features: int) -> "Identity":
        """The identity for features of this width."""
        return cls(torch.empty(1, features, 0, dtype=torch.float16), torch.zeros(features))

    def embed(self, features: Tensor) -> Tensor:
        return self.project(features, None)

    def project(self, features: Tensor, expert: int | None) -> Tensor:
        return features.float()


def fold(mean: Tensor, basis: Tensor, slots: int) -> Fusion:
    """Fold ``(x - mean) @ basis`` over concatenated blocks into a Fusion.

    Args:
        mean: float [slots * F].
        basis: float [slots * F, dim], already divided by the components' scale if whitened.
        slots: number of blocks.
    """
    weight = basis.to(torch.float16)
    # Computed from the rounded weight, so that the training mean still maps to zero.
    bias = -(mean.double() @ weight.double()).float()
    return Fusion(weight.view(slots, -1, basis.shape[1]).contiguous(), bias)
