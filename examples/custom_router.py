"""Replace the router of a bundle with your own: python examples/custom_router.py

A router is a frozen dataclass of tensors with one method. This one multiplies the trained probabilities by a prior,
for traffic whose mix of clusters differs from that of the training images.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

import cascade
from cascade.bundle.format import read
from cascade.model.router import Prototypes


@dataclass(frozen=True, eq=False)
class PrototypesWithPrior(Prototypes):
    """Attributes: prior: float32 [K], the expected relative frequency of each cluster."""

    prior: Tensor

    def probabilities(self, features: Tensor) -> Tensor:
        """Features float [B, F] to p(cluster), float [B, K]."""
        weighted = super().probabilities(features) * self.prior
        return weighted / weighted.sum(dim=1, keepdim=True)


bundle = read(Path("model_store/paper/1"))
assert isinstance(bundle.router, Prototypes), "this example extends the default router"
trained = {field.name: getattr(bundle.router, field.name) for field in fields(bundle.router)}
prior = torch.tensor([4.0, 1, 1, 1, 1])  # cluster 0 is four times as frequent here

engine = cascade.Engine()
engine.add(replace(bundle, router=PrototypesWithPrior(**trained, prior=prior)))
for answer in engine.predict(sorted(Path("tests/data/photos").iterdir())):
    print(f"cluster {answer.cluster}, confidence {answer.confidence:.2f}" if answer.ok else answer.error)
