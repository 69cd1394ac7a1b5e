"""Distillation without labels: a mask that gives in one pass the embedding that a cascade has from all of its masks."""

from torch import Tensor
from torch.nn.functional import normalize


def distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Cosine and relational loss of a batch (relational knowledge distillation, arXiv 1904.05068).

    Args:
        found: embeddings [V * B, T] of V views of the images, view by view.
        wanted: the teacher's [B, T]; the relations are the cosines between the images of a view.
    """
    a, b = normalize(found).unflatten(0, (-1, len(wanted))), normalize(wanted)
    own = 1 - (a * b).sum(dim=2).mean()
    relations = (a @ a.transpose(1, 2) - b @ b.T).square().sum(dim=2).mean()
    return own + relations
