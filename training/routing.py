"""Load the router and the out-of-domain score fitted by the clusters stage."""

from cascade.bundle.format import strip_prefix
from cascade.model.out_of_domain import OutOfDomain
from cascade.model.router import KINDS, Router
from training.run import Run


def router_of(run: Run) -> Router | None:
    """The router of this run; None without clusters."""
    if not run.recipe.clusters:
        return None
    kind = next(k for k in KINDS if k.kind == run.recipe.router)
    return kind(**strip_prefix(run.clusters, "router."))


def ood_of(run: Run) -> OutOfDomain:
    """The out-of-domain score of this run."""
    return OutOfDomain(**strip_prefix(run.clusters, "ood."))
