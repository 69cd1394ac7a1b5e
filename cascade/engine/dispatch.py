"""Dispatch between bundles: an image without a bundle's name goes to the bundle whose domain it fits best.

An open item carries pixels for every space of domains. The plain backbone runs up to the stage where the domains were
fitted, its pooled activations are compared with all prototypes, and the item of the best bundle is made. It continues
from these activations unless its bundle's mask begins earlier; then the trunk runs again. If the bundle is not in
memory, the pass answers with a ``ColdItem``: the bundle is loaded between two passes.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cascade import metrics
from cascade.bundle.bundle import Bundle
from cascade.engine.deferral import item_of, mode_of
from cascade.engine.dispatch_table import DispatchTable, Space, Target
from cascade.engine.executors import Executor
from cascade.engine.forward import run_stages
from cascade.engine.frozen_answers import frozen_bundle, frozen_item
from cascade.engine.items import AnyItem, ColdItem, Entry, Item, OpenItem, download, passes, stack_pixels, upload
from cascade.engine.results import Dispatch, ItemError, Label, Options, Prediction
from cascade.engine.unknown import UnknownImages
from cascade.model.domain import UNKNOWN, pooled

Find = Callable[[Target], Bundle | None]
Settled = tuple[Item, ...] | ColdItem | ItemError
LIKELY = 5  # bundles listed in an answer
BEYOND = 1e9  # strangeness of a bundle that the caller may not use
CONTESTED = 0.9  # confidence below which ``top2`` runs the two likeliest bundles
UNKNOWN_DOMAIN = ItemError(
    "unknown_domain", "this image does not fit any available bundle: name a bundle to use it anyway"
)

EVICTED = ItemError("bundle_unavailable", "the backbone has just left memory: send the request again", 1.0)


def dispatch(
    executors: dict[str, Executor],
    device: str,
    items: Sequence[AnyItem],
    loaded: Find,
    keep: UnknownImages | None = None,
) -> list[Settled]:
    """The items to run for each item: itself, or for an open item its target (``top2``: up to two), or an error.

    Args:
        loaded: the bundle of a target if it is in memory.
        keep: where images are kept that fit no bundle, not even one that their caller may not use.
    """
    settled: list[Settled] = [(i,) if isinstance(i, Item) else UNKNOWN_DOMAIN for i in items]
    tables: dict[DispatchTable, list[int]] = {}
    for row, item in enumerate(items):
        if isinstance(item, OpenItem):
            tables.setdefault(item.table, []).append(row)
    for table, rows in tables.items():
        own = [item for row in rows if isinstance(item := items[row], OpenItem)]
        if all(space.fingerprint in executors for space in table.spaces):
            results = _dispatch(executors, device, table, own, loaded, keep)
        else:
            results = [EVICTED] * len(own)
        for row, result in zip(rows, results, strict=True):
            settled[row] = result
    return settled


def _dispatch(
    executors: dict[str, Executor],
    device: str,
    table: DispatchTable,
    items: list[OpenItem],
    loaded: Find,
    keep: UnknownImages | None,
) -> list[Settled]:
    """Dispatch open items: one trunk per space, all scores in one matrix [N, B], one transfer."""
    trunks: list[Tensor] = []
    chances: list[Tensor] = []
    strangeness: list[Tensor] = []
    embeddings: list[Tensor] = []
    everywhere: list[Tensor] = []
    for n, space in enumerate(table.spaces):
        with metrics.stage("dispatch"):
            executor = executors[space.fingerprint]
            executor.swap(None)
            x = stack_pixels([item.pixels[n] for item in items], space.preprocessing, device)
            trunks.append(run_stages(executor, x, 0, space.stage) if space.stage else x)
            features = pooled(trunks[-1])
            scores = space.domains.scores(features)
            distance = space.domains.distance(features, scores)
            strange, likelihood = space.domains.strangeness(distance), space.domains.likelihood(distance)
            embeddings.append(features)
            everywhere.append(strange)
            if any(item.options.among is not None for item in items):
                forbidden = upload(_forbidden(space, items), device, torch.bool)
                scores, likelihood = (part.masked_fill(forbidden, -BEYOND) for part in (scores, likelihood))
                strange = strange.masked_fill(forbidden, BEYOND)
            # p(bundle) = p(space) p(bundle | space); with one space, the first is 1
            of_space = likelihood.max(dim=1, keepdim=True).values
            chances.append((scores / space.temperature).log_softmax(dim=1) + of_space)
            strangeness.append(strange)
    best = torch.cat(chances, dim=1).softmax(dim=1).topk(min(LIKELY, len(table.columns)))
    distant = torch.cat(strangeness, dim=1).gather(1, best.indices[:, :1])
    nearest, spaces = torch.stack([strange.amin(dim=1) for strange in everywhere], dim=1).min(dim=1)
    wanted = [best.values, best.indices, distant] + ([nearest, spaces, *embeddings] if keep is not None else [])
    probable, columns, far, *more = download(wanted)
    settled: list[Settled] = []
    for row, item in enumerate(items):
        likely = [(int(c), float(p)) for c, p in zip(columns[row], probable[row], strict=True)]
        if item.options.among is not None:  # callers learn nothing about bundles that they may not use
            likely = [(c, p) for c, p in likely if table.columns[c][1].name in item.options.among]
        if likely and far[row, 0] <= UNKNOWN:
            settled.append(_settle(table, item, likely, [x[row] for x in trunks], loaded))
        else:
            metrics.count_dispatch(None)
            settled.append(UNKNOWN_DOMAIN)
            if item.options.unknown == "embedding":
                n = table.columns[int(columns[row, 0])][0]
                space, labels = table.spaces[n], [Label(table.columns[c][1].name, p) for c, p in likely]
                if n not in table.plain:
                    table.plain[n] = frozen_bundle(space, executors[space.fingerprint], device)
                settled[-1] = (frozen_item(table.plain[n], space.stage, item, item.pixels[n], trunks[n][row], labels),)
    if keep is not None:
        _keep(keep, table, items, *more)
    return settled


def _keep(
    keep: UnknownImages,
    table: DispatchTable,
    items: list[OpenItem],
    strangeness: np.ndarray,
    spaces: np.ndarray,
    *embeddings: np.ndarray,
) -> None:
    """Offer the images that fit no bundle at all.

    Args:
        strangeness: for the nearest bundle of any space, [N]. spaces: the space of this bundle, [N].
        embeddings: in each space, [N, D].
    """
    for row, (least, n) in enumerate(zip(strangeness, spaces.astype(int), strict=True)):
        file = items[row].file
        if file is not None and least > UNKNOWN:
            keep.offer(file, table.spaces[n], embeddings[n][row])


def _settle(
    table: DispatchTable, item: OpenItem, likely: list[tuple[int, float]], trunks: list[Tensor], loaded: Find
) -> Settled:
    """Make the item of the likeliest bundle; with ``top2``, for a contested image, also that of the second one.

    The second one is only asked if it is in memory and has the mode, and if both have labels to compare.

    Args:
        likely: columns of scores and their probabilities, best first.
        trunks: the image's activations in each space.
    """
    likely_labels = tuple(Label(table.columns[column][1].name, chance) for column, chance in likely)

    def settle(column: int, chance: float) -> Item | ColdItem | ItemError:
        n, target = table.columns[column]
        bundle, reason = loaded(target), Dispatch(chance, likely_labels, 0)
        if bundle is None:  # the activations are copied, because those of the whole batch should not stay
            return ColdItem(target, partial(_item, item, n, table.spaces[n].stage, trunks[n].clone(), reason))
        return _item(item, n, table.spaces[n].stage, trunks[n], reason, bundle)

    first = settle(*likely[0])
    if not isinstance(first, Item):
        return first
    contested = item.options.dispatch == "top2" and likely[0][1] < CONTESTED and len(likely) > 1
    second = settle(*likely[1]) if contested and _has_labels(first) else None
    if not isinstance(second, Item) or not _has_labels(second):
        return (first,)
    cost = passes(first) + passes(second)
    return tuple(replace(i, dispatch=i.dispatch and replace(i.dispatch, passes=cost)) for i in (first, second))


def _has_labels(item: Item) -> bool:
    """Whether its answer will have labels."""
    return item.options.labels > 0 and item.mode in item.bundle.linear


def _item(open_item: OpenItem, n: int, stage: int, x: Tensor, reason: Dispatch, bundle: Bundle) -> Item | ItemError:
    """Make the item of a dispatched image.

    Args:
        n: index of the space. stage: of the dispatch. x: the image's activations before this stage.
    """
    mode = mode_of(bundle, open_item.options)
    if isinstance(mode, ItemError):
        return mode
    reused = bundle.dispatcher.start >= stage > 0
    larger = None if bundle.larger is None else open_item.larger.get(bundle.larger.preprocessing)
    entry = Entry(stage, x) if reused else None
    reason = replace(reason, repeated_stages=0 if reused else stage)
    item = item_of(bundle, mode, open_item.options, open_item.pixels[n], larger, entry, reason)
    return replace(item, dispatch=replace(reason, passes=passes(item))) if isinstance(item, Item) else item


def second_round(options: Options, answers: Sequence[Prediction | ItemError]) -> tuple[Options, list[int]]:
    """For images dispatched as a set: the rows that its majority bundle has yet to answer, and the options for them.

    There are none if the images are not dispatched as a set.
    """
    votes = Counter(a.bundle for a in answers if isinstance(a, Prediction) and a.dispatch is not None and a.bundle)
    if options.dispatch != "set" or not votes:
        return options, []
    winner = votes.most_common(1)[0][0]
    others = [
        row
        for row, a in enumerate(answers)
        if (a.bundle != winner if isinstance(a, Prediction) else a.kind == UNKNOWN_DOMAIN.kind)
    ]
    return replace(options, bundle=winner, dispatch="image"), others


def _forbidden(space: Space, items: list[OpenItem]) -> list[list[bool]]:
    """[N, B]: whether an item may not be sent to a bundle."""
    allowed = [item.options.among for item in items]
    of = {own: [own is not None and target.name not in own for target in space.targets] for own in set(allowed)}
    return [of[own] for own in allowed]
