"""SwAV: swapped prediction of prototype assignments by optimal transport (Caron et al. 2020; method.md §2)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax, normalize


class Projector(nn.Module):
    """The self-supervised head: a linear layer to a low-dimensional unit sphere, and prototypes on it.

    Both are trained with the mask and then discarded, unless images are routed by prototypes.
    """

    def __init__(self, features: int, projection: int, prototypes: int) -> None:
        super().__init__()
        self.head = nn.Linear(features, projection)
        self.prototypes = nn.Parameter(normalize(torch.randn(prototypes, projection)))

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, F] to unit vectors z [B, P]."""
        return normalize(self.head(features))

    @torch.no_grad()
    def renormalize(self) -> None:
        """Project the prototypes back onto the sphere; call it before every step."""
        self.prototypes.copy_(normalize(self.prototypes))


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes Q of the entropic optimal transport that spreads images evenly over prototypes.

    Args:
        scores: z . c, float [B, C].
        epsilon: smoothness; iterations: of the row and column normalization.

    Returns:
        float [B, C], rows summing to 1.
    """
    # Subtract the largest score before exp: small epsilons would overflow float32. No row underflows to zero.
    q = ((scores - scores.max()) / epsilon).clamp(min=-80).exp()
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def swapped_loss(scores: Sequence[Tensor], codes: Sequence[Tensor], temperature: float) -> Tensor:
    """Mean cross-entropy of predicting each code (of crops 0, 1, ..) from every other crop's scores.

    Args:
        scores: one float [B, C] per crop.
        codes: one float [B, C] for each of the first crops.
    """
    losses = [
        -(code * log_softmax(other / temperature, dim=1)).sum(dim=1).mean()
        for i, code in enumerate(codes)
        for v, other in enumerate(scores)
        if v != i
    ]
    return torch.stack(losses).mean()


def push(queue: Tensor, z: Tensor) -> Tensor:
    """Push the newest rows to the front of the queues [views, Q, P] and drop the oldest; z is [views, B, P]."""
    return torch.cat([z, queue], dim=1)[:, : queue.shape[1]]
