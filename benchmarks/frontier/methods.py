"""Every method and control: how it is trained, how it is served, and the embedding that it gives."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch

from benchmarks.frontier import learn
from benchmarks.frontier.learn import Budget, State
from benchmarks.frontier.study import Choice, Pair, Study
from training.run import FEWEST

Kind = Literal["single", "routed", "unrouted", "ensemble", "chosen"]
ONE, TWO, ROUTED, SIX = "one mask", "two masks", "dispatcher and routed expert", "dispatcher and five experts"
PLAIN = "plain pass"
FAIR_TAIL, ROUTED_TAIL = "one tail, frozen or mask, by validation", "one tail, frozen or mask, for each cluster"
NEIGHBOURS = 0.25  # of an expert's batches that come from the other clusters


@dataclass(frozen=True)
class Method:
    """A point of the plane.

    Attributes:
        served: its row of ``cost.WAYS``. kind: routed methods are compared with unrouted and single ones; what labels
            have chosen for one data set or cluster, only with what they have chosen, too.
        steps: optimiser steps of all that it needs. embed: its embedding of the training and held-out images.
    """

    served: str
    kind: Kind
    steps: Callable[[Budget], int]
    embed: Callable[[Study], Pair]


def experts(s: Study, name: str = "expert", count: int = 0, steps: int = 0, **options: object) -> list[str]:
    """Experts on the router's clusters, from the dispatcher on; one that too few images go to stays the dispatcher."""
    count, steps = count or s.budget.experts, steps or s.budget.expert
    start, choice = s.dispatcher(), s.assigned(count)
    for k in range(count):
        rows = np.flatnonzero(choice[0] == k)
        if len(rows) < FEWEST:
            s.state(f"{name}-{k}", s.dispatcher)
        else:
            s.swav(f"{name}-{k}", steps, rows=rows, **({"start": start} | options))
    return [f"{name}-{k}" for k in range(count)]


def late(s: Study) -> list[str]:
    """Half of the steps as an unrouted second mask, half by cluster from there on, in the dispatcher's space."""
    half = s.budget.second // 2
    start = s.swav("shared-half", half, start=s.dispatcher())
    return experts(s, "late", steps=half // s.budget.experts, start=start, freeze_head=True, others=NEIGHBOURS)


def together(s: Study, count: int) -> list[str]:
    """Experts trained at once in one space, in the steps of an unrouted second mask."""
    names = [f"together-{count}-{k}" for k in range(count)]

    @cache
    def trained() -> dict[str, State]:
        route, seed = s.route_views(count), s.key(f"together-{count}")
        states = learn.together(s.tail, s.data, s.budget.second, seed, route, count, s.dispatcher())
        return dict(zip(names, states, strict=True))

    for name in names:
        s.state(name, lambda: trained()[name])  # noqa: B023
    return names


def clustered(s: Study, count: int) -> list[str]:
    """As many steps over another number of clusters."""
    return experts(s, f"of-{count}", count, s.budget.second // count)


def plain_experts(s: Study) -> Pair:
    """Experts on clusters of the frozen features, from the dispatcher's mask on: the first pass is the plain one."""
    choice, start = s.plain_route(s.budget.experts), s.dispatcher()
    names = [f"plain-{k}" for k in range(s.budget.experts)]
    for k, name in enumerate(names):
        s.swav(name, s.budget.expert, rows=np.flatnonzero(choice[0] == k), start=start)
    return s.pick(names, choice)


def routed(s: Study, names: list[str]) -> Pair:
    """The routed expert's features of each image."""
    return s.pick(names, s.assigned(len(names)))


def dispatcher(s: Study) -> Pair:
    s.dispatcher()
    return s.features("dispatcher")


def single(s: Study, name: str, steps: int, **options: object) -> Pair:
    """A mask that sees everything."""
    s.swav(name, steps, **options)
    return s.features(name)


def one_tail(s: Study, by_cluster: bool) -> Pair:
    """Features under one tail an image, the frozen one or the mask of all steps, as the validation labels say.

    Args:
        by_cluster: may also be the mask but for those clusters of the trunk's maps that are worse off with it; else it
            is one for all images.
    """
    mask = single(s, "equal-steps", s.budget.cascade)
    choices = [s.frozen, mask]
    if by_cluster:
        choices.append(s.unharmed(mask, s.frozen, s.trunk_route(s.budget.experts)))
    return max(choices, key=lambda features: s.right(s.fused(features))[s.data.validation].mean())


def fifths(s: Study) -> list[Pair]:
    """Experts on random parts instead of clusters."""
    part = np.random.default_rng(s.seed).integers(0, s.budget.experts, len(s.data.clean))
    start, names = s.dispatcher(), [f"fifth-{k}" for k in range(s.budget.experts)]
    for k, name in enumerate(names):
        s.swav(name, s.budget.expert, rows=np.flatnonzero(part == k), start=start)
    return [s.features(name) for name in names]


def teacher(s: Study) -> Pair:
    """The unconditional cascade's embedding."""
    return s.once("teacher", lambda: s.fused(dispatcher(s), *[s.features(e) for e in experts(s)]))


def distilled(s: Study) -> Pair:
    """One mask that was taught the unconditional embedding, from the dispatcher on."""
    s.distil("distilled", s.budget.distil, lambda: teacher(s)[0], s.dispatcher())
    return s.features("distilled")


def distilled_experts(s: Study) -> list[str]:
    """Half of the steps shared by all, half by cluster, each with its neighbours."""
    half, choice = s.budget.distil // 2, s.assigned(s.budget.experts)
    start = s.distil("distilled-half", half, lambda: teacher(s)[0], s.dispatcher())
    names = [f"routed-{k}" for k in range(s.budget.experts)]
    for k, name in enumerate(names):
        rows = np.flatnonzero(choice[0] == k)
        if len(rows) < FEWEST:
            s.state(name, lambda: start)
        else:
            each = half // s.budget.experts
            s.distil(name, each, lambda: teacher(s)[0], start, rows=rows, others=NEIGHBOURS)
    return names


def top_two(s: Study) -> Pair:
    """The two likeliest experts' features, weighed by their probabilities."""
    names, out = experts(s), []
    for split, p in enumerate(s.route(s.budget.experts)):
        best = p.topk(2, dim=1)
        weights = torch.zeros_like(p).scatter(1, best.indices, best.values / best.values.sum(dim=1, keepdim=True))
        each = torch.stack([s.features(name)[split].float() for name in names], dim=1)
        out.append((each * weights[..., None]).sum(dim=1))
    return out[0], out[1]


def by_cluster(s: Study, *blocks: Pair) -> Pair:
    """A fusion for each cluster, fitted on its own images; embeddings of two clusters share nothing."""
    choice = s.assigned(s.budget.experts)
    return s.fused_apart(choice, *blocks)


def _mapped(s: Study, second: Pair | None, choice: Choice | None = None) -> Pair:
    return s.regressed(teacher(s)[0], dispatcher(s), second, choice)


def _five(s: Study) -> Choice:
    return s.assigned(s.budget.experts)


METHODS: dict[str, Method] = {
    "frozen backbone": Method(PLAIN, "single", lambda b: 0, lambda s: s.fused(s.frozen)),
    "dispatcher": Method(ONE, "single", lambda b: b.dispatcher, lambda s: s.fused(dispatcher(s))),
    "dispatcher, all steps": Method(
        ONE, "single", lambda b: b.cascade, lambda s: s.fused(single(s, "equal-steps", s.budget.cascade))
    ),
    "two masks, no routing": Method(
        TWO,
        "unrouted",
        lambda b: b.cascade,
        lambda s: s.fused(dispatcher(s), single(s, "unrouted", s.budget.second, start=s.dispatcher())),
    ),
    "frozen tail and a mask of all steps": Method(
        TWO,
        "unrouted",
        lambda b: b.cascade,
        lambda s: s.fused(s.frozen, single(s, "equal-steps", s.budget.cascade)),
    ),
    FAIR_TAIL: Method(ONE, "chosen", lambda b: b.cascade, lambda s: s.fused(one_tail(s, False))),
    ROUTED_TAIL: Method(ONE, "chosen", lambda b: b.cascade, lambda s: s.fused(one_tail(s, True))),
    "conditional, padded": Method(
        ROUTED,
        "routed",
        lambda b: b.cascade,
        lambda s: s.padded(dispatcher(s), routed(s, experts(s)), _five(s), s.budget.experts),
    ),
    "conditional, one slot": Method(
        ROUTED, "routed", lambda b: b.cascade, lambda s: s.fused(dispatcher(s), routed(s, experts(s)))
    ),
    "unconditional": Method(SIX, "ensemble", lambda b: b.cascade, teacher),
    "conditional, mapped to the unconditional": Method(
        ROUTED, "routed", lambda b: b.cascade, lambda s: _mapped(s, routed(s, experts(s)))
    ),
    "conditional, a map for each expert": Method(
        ROUTED, "routed", lambda b: b.cascade, lambda s: _mapped(s, routed(s, experts(s)), _five(s))
    ),
}
"""What every data set, backbone and seed is measured by."""

MORE: dict[str, Method] = {
    "learning rate 0": Method(ONE, "single", lambda b: 0, lambda s: s.fused(single(s, "zero-rate", 20, lr=0.0))),
    "dispatcher, steps of distillation too": Method(
        ONE, "single", lambda b: b.distilled, lambda s: s.fused(single(s, "all-steps", s.budget.distilled))
    ),
    "two masks, steps of distillation too": Method(
        TWO,
        "unrouted",
        lambda b: b.distilled,
        lambda s: s.fused(dispatcher(s), single(s, "second", s.budget.second + s.budget.distil, start=s.dispatcher())),
    ),
    "two masks, the second from scratch": Method(
        TWO,
        "unrouted",
        lambda b: b.distilled,
        lambda s: s.fused(dispatcher(s), single(s, "independent", s.budget.second + s.budget.distil)),
    ),
    "frozen tail and routed expert": Method(
        ROUTED, "routed", lambda b: b.cascade, lambda s: s.fused(s.frozen, plain_experts(s))
    ),
    "dispatcher, mapped to the unconditional": Method(ONE, "single", lambda b: b.cascade, lambda s: _mapped(s, None)),
    "distilled mask": Method(ONE, "single", lambda b: b.distilled, lambda s: s.fused(distilled(s))),
    "dispatcher and distilled mask": Method(
        TWO, "unrouted", lambda b: b.distilled, lambda s: s.fused(dispatcher(s), distilled(s))
    ),
    "dispatcher and distilled experts": Method(
        ROUTED, "routed", lambda b: b.distilled, lambda s: s.fused(dispatcher(s), routed(s, distilled_experts(s)))
    ),
    "distilled experts, a map for each": Method(
        ROUTED, "routed", lambda b: b.distilled, lambda s: _mapped(s, routed(s, distilled_experts(s)), _five(s))
    ),
    "unconditional, random fifths": Method(
        SIX, "ensemble", lambda b: b.cascade, lambda s: s.fused(dispatcher(s), *fifths(s))
    ),
    "conditional, top two experts": Method(
        "dispatcher and two experts", "routed", lambda b: b.cascade, lambda s: s.fused(dispatcher(s), top_two(s))
    ),
    "conditional, frozen head and neighbours": Method(
        ROUTED,
        "routed",
        lambda b: b.cascade,
        lambda s: s.fused(dispatcher(s), routed(s, experts(s, "aligned", freeze_head=True, others=NEIGHBOURS))),
    ),
    "conditional, experts from a shared second mask": Method(
        ROUTED, "routed", lambda b: b.cascade, lambda s: s.fused(dispatcher(s), routed(s, late(s)))
    ),
    "conditional, a head and prototypes for each cluster": Method(
        ROUTED,
        "routed",
        lambda b: b.cascade,
        lambda s: s.fused(dispatcher(s), routed(s, experts(s, "own-head", own_head=True))),
    ),
    "conditional, experts at lr 0.1": Method(
        ROUTED,
        "routed",
        lambda b: b.cascade,
        lambda s: s.fused(dispatcher(s), routed(s, experts(s, "fast0.1", lr=0.1))),
    ),
    "conditional, experts at lr 0.1, padded": Method(
        ROUTED,
        "routed",
        lambda b: b.cascade,
        lambda s: s.padded(dispatcher(s), routed(s, experts(s, "fast0.1", lr=0.1)), _five(s), s.budget.experts),
    ),
    "conditional, lr 0.1, frozen head and neighbours": Method(
        ROUTED,
        "routed",
        lambda b: b.cascade,
        lambda s: s.fused(
            dispatcher(s), routed(s, experts(s, "fastaligned0.1", lr=0.1, freeze_head=True, others=NEIGHBOURS))
        ),
    ),
    "conditional, experts trained together": Method(
        ROUTED,
        "routed",
        lambda b: b.cascade,
        lambda s: s.fused(dispatcher(s), routed(s, together(s, s.budget.experts))),
    ),
    "conditional, two experts trained together": Method(
        ROUTED, "routed", lambda b: b.cascade, lambda s: s.fused(dispatcher(s), routed(s, together(s, 2)))
    ),
    "two masks, the second at twice the rate": Method(
        TWO,
        "unrouted",
        lambda b: b.cascade,
        lambda s: s.fused(
            dispatcher(s), single(s, "fast-second", s.budget.second, start=s.dispatcher(), lr=2 * learn.RECIPE.lr)
        ),
    ),
    "conditional, ten clusters": Method(
        ROUTED, "routed", lambda b: b.cascade, lambda s: s.fused(dispatcher(s), routed(s, clustered(s, 10)))
    ),
    "conditional, three clusters": Method(
        ROUTED, "routed", lambda b: b.cascade, lambda s: s.fused(dispatcher(s), routed(s, clustered(s, 3)))
    ),
    "conditional, a fusion for each cluster": Method(
        ROUTED, "routed", lambda b: b.cascade, lambda s: by_cluster(s, dispatcher(s), routed(s, experts(s)))
    ),
    "dispatcher, a fusion for each cluster": Method(
        ONE, "routed", lambda b: b.dispatcher, lambda s: by_cluster(s, dispatcher(s))
    ),
}
"""What was tried on the first seed, to choose by its validation images what all seeds are measured by."""
