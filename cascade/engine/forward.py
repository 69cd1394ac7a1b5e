"""One forward pass: images of any bundles, over resident backbones, to answers.

    trunk     the plain backbone up to the first masked stage, once for all images that share it
    dispatch  the rest under each bundle's dispatcher: features, and what the experts continue from
    route     each image's cluster; the host waits for it only if it decides which expert runs
    tails     each expert's stages, for the images that need it
    finish    fusion, labels, neighbors, and one transfer back: ``cascade.engine.finish``

An image's answer does not depend on its neighbors in the batch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade import metrics, tracing
from cascade.bundle.format import Bundle
from cascade.engine.executors import Distinct, Executor
from cascade.engine.finish import Group, Tail, finish, route
from cascade.engine.items import Item, download, grouped, stack, trunk, upload
from cascade.engine.results import Prediction
from cascade.engine.weight_cache import WeightCache
from cascade.model.fusion import Mode
from cascade.model.masks import Mask

FEW = 4
"""Below this many images per mask, on average, all masks run in one pass, if the executor supports it."""

CHUNK = 32
"""Images that an executor on a CPU gets at once. A larger batch would only save swaps, and take more memory."""


def forward(
    executors: dict[str, Executor], weight_cache: WeightCache, device: str, items: Sequence[Item]
) -> list[Prediction]:
    """Answers of ``items``, in their order.

    Args:
        executors: by their backbone's fingerprint.
        weight_cache: of all of them.
        device: where the executors run.
        items: of any bundles; items that share the plain trunk run through it together.
    """
    groups: list[Group] = []
    for rows in grouped(range(len(items)), lambda row: trunk(items[row])):
        executor = executors[items[rows[0]].bundle.card.backbone.fingerprint]
        for other in executors.values():  # another backbone must not read weights that are evicted for this one
            if other is not executor:
                other.swap(None)
        groups += _run_trunk(executor, weight_cache, device, items, rows)
    answers = finish(groups)
    for (
        group
    ) in groups:  # break the reference cycle with tails, so that a removed bundle is freed with its last request
        group.tails.clear()
    return [answers[row] for row in range(len(items))]


def _run_trunk(
    executor: Executor, weight_cache: WeightCache, device: str, items: Sequence[Item], rows: list[int]
) -> list[Group]:
    """Run the images that share a plain trunk, up to their features under every mask that they need."""
    bundles = grouped(rows, lambda row: items[row].bundle.identity)
    ordered = [sorted(own, key=lambda row: items[row].mode) for own in bundles]
    groups = [Group(own, [items[row] for row in own]) for own in ordered]
    together = _few(executor, len(rows), len(groups))
    if together:  # adjacent if they stop at the same stage
        groups.sort(key=lambda group: _split(group.bundle))
    else:  # masks that are materialized come first, before they are evicted for the others
        groups.sort(key=lambda group: group.bundle.dispatcher not in weight_cache)
    x = stack([item for group in groups for item in group.items], device)
    with metrics.stage("dispatch"):
        begin, start = groups[0].begin, groups[0].bundle.dispatcher.start
        if begin < start:
            executor.swap(None)
            x = run_stages(executor, x, begin, start)
    if together:
        _dispatch_together(executor, groups, x)  # type: ignore[arg-type]
    else:
        _dispatch(executor, groups, x)
    with metrics.stage("dispatch"):
        route(groups)
    tails = _tails(groups, device)
    if _few(executor, sum(len(tail.images) for tail in tails), len(tails)):
        _run_tails_together(executor, tails)  # type: ignore[arg-type]
    else:
        _run_tails(executor, tails)
    return groups


def _dispatch(executor: Executor, groups: list[Group], x: Tensor) -> None:
    """Run each group under its dispatcher; ``x`` holds the groups' images, one group after another."""
    parts = x.split([len(group.items) for group in groups])
    following = [*(group.bundle.dispatcher for group in groups[1:]), None]
    for group, part, after in zip(groups, parts, following, strict=True):
        mask, split = group.bundle.dispatcher, _split(group.bundle)
        _swap(executor, mask, after)
        with metrics.stage("dispatch"):
            group.trunk = run_stages(executor, part, mask.start, split) if split > mask.start else part
            group.features = run_stages(executor, group.trunk, split)


def _dispatch_together(executor: Distinct, groups: list[Group], x: Tensor) -> None:
    """The same with one mask per image, in one pass for all groups that stop at the same stage."""
    for members in grouped(groups, lambda group: _split(group.bundle)):
        sizes = [len(group.items) for group in members]
        masks = [item.bundle.dispatcher for group in members for item in group.items]
        part, x = x[: len(masks)], x[len(masks) :]
        start, split = masks[0].start, _split(members[0].bundle)
        with metrics.stage("dispatch"):
            trunk = executor.run_each(part, masks, start, split) if split > start else part
            features = executor.run_each(trunk, masks, split)
        for group, *results in zip(members, trunk.split(sizes), features.split(sizes), strict=True):
            group.trunk, group.features = results


def _tails(groups: list[Group], device: str) -> list[Tail]:
    """The experts that at least one image needs, adjacent for each bundle."""
    routed = [group for group in groups if any(item.mode == "conditional" for item in group.items)]
    clusters = dict(zip(routed, download([group.cluster for group in routed]), strict=True))
    for group in groups:
        cluster = clusters[group].tolist() if group in clusters else [0] * len(group.items)
        for k in range(len(group.bundle.experts)):
            images = [i for i, item in enumerate(group.items) if _wants(item.mode, k, cluster[i])]
            group.tails += [Tail(group, k, images)] if images else []
    tails = [tail for group in groups for tail in group.tails]
    if tails:
        index = upload([i for tail in tails for i in tail.images], device)
        for tail, part in zip(tails, index.split([len(tail.images) for tail in tails]), strict=True):
            tail.index = part
            metrics.GROUP_IMAGES.observe(len(tail.images))
    return tails


def _run_tails(executor: Executor, tails: list[Tail]) -> None:
    """Run one expert after another, and prefetch the next one's weights."""
    experts = [tail.group.bundle.experts[tail.expert] for tail in tails]
    for tail, expert, after in zip(tails, experts, [*experts[1:], None], strict=False):
        _swap(executor, expert, after)
        with metrics.stage("expert"):
            tail.features = run_stages(executor, tail.input(), expert.start)


def _run_tails_together(executor: Distinct, tails: list[Tail]) -> None:
    """Run all experts that continue from the same stage in one pass, with one mask per image."""
    for members in grouped(tails, lambda tail: _split(tail.group.bundle)):
        masks = [tail.group.bundle.experts[tail.expert] for tail in members for _ in tail.images]
        with metrics.stage("expert"):
            x = torch.cat([tail.input() for tail in members])
            features = executor.run_each(x, masks, masks[0].start)
        for tail, result in zip(members, features.split([len(tail.images) for tail in members]), strict=True):
            tail.features = result


def _few(executor: Executor, images: int, masks: int) -> bool:
    """Whether one pass with a mask per image costs less than one pass per mask."""
    return isinstance(executor, Distinct) and masks > 1 and images < FEW * masks


def run_stages(executor: Executor, x: Tensor, start: int, stop: int | None = None) -> Tensor:
    """Run stages of the backbone under the current mask, for any number of images."""
    if len(x) <= CHUNK or isinstance(executor, Distinct):  # which splits batches where its graphs end
        return executor.run(x, start, stop)
    return torch.cat([executor.run(part, start, stop) for part in x.split(CHUNK)])


def _swap(executor: Executor, mask: Mask, following: Mask | None) -> None:
    """Swap in a mask, and prefetch the weights of the following one."""
    with metrics.stage("swap"), tracing.part("swap"):
        executor.swap(mask)
    if following is not None:
        executor.prefetch(following)


def _split(bundle: Bundle) -> int:
    """The stage up to which the dispatcher's pass is shared with the experts, which all begin at the same stage."""
    return bundle.experts[0].start if bundle.experts else bundle.dispatcher.start


def _wants(mode: Mode, expert: int, cluster: int) -> bool:
    """Whether an image in this mode, routed to this cluster, needs a pass under this expert."""
    return mode == "unconditional" or (mode == "conditional" and cluster == expert)
