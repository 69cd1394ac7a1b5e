"""Deferral inside a bundle: a small input size answers, and images about which it is unsure get a second pass.

A bundle with two input sizes has three more modes. ``fast`` is the small size, ``full`` the larger one, and
``adaptive``, the default, tries the small one first: if the probability of its most likely class is below the bundle's
threshold, the first pass returns another item, at the larger size, which shares a pass with others of that size. The
second pass gives the labels. Everything else comes from the first pass, so that embeddings stay comparable.
"""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from cascade import metrics
from cascade.bundle.bundle import Bundle
from cascade.bundle.format import LARGER
from cascade.engine.items import Entry, Item, Resolution
from cascade.engine.results import INPUT_MODES, Deferral, Dispatch, ItemError, Options, Prediction
from cascade.model.fusion import MODES
from cascade.model.preprocessing import Preprocessing

NO_LARGER = ItemError(
    "bad_pixels", "there are no pixels of the larger input size: name the bundle, and send an encoded image"
)


def modes_of(bundle: Bundle) -> tuple[str, ...]:
    """The bundle's modes, the default first."""
    if bundle.larger is not None:
        return ("adaptive", "fast", "full", *bundle.fusions)
    return (bundle.card.mode, *(mode for mode in bundle.fusions if mode != bundle.card.mode))


def mode_of(bundle: Bundle, options: Options) -> str | ItemError:
    """The requested mode, or the bundle's default."""
    modes = modes_of(bundle)
    mode = options.mode or modes[0]
    if mode in modes:
        return mode
    if mode not in (*MODES, *INPUT_MODES):
        return ItemError("unknown_mode", f"unknown mode; choose one of: {' '.join((*MODES, *INPUT_MODES))}")
    return ItemError("mode_missing", f"this bundle has no mode {mode}; it has: {' '.join(modes)}")


def preprocessings(bundle: Bundle, mode: str) -> list[Preprocessing]:
    """The preprocessings that an item needs: both sizes at once, so that the image is decoded only once."""
    small, *large = (part.preprocessing for part in bundle.parts)
    return large if mode == "full" else [small, *large] if mode == "adaptive" else [small]


def item_of(
    bundle: Bundle,
    mode: str,
    options: Options,
    pixels: Tensor | None,
    larger: Tensor | None,
    entry: Entry | None = None,
    dispatch: Dispatch | None = None,
) -> Item | ItemError:
    """Make the item of the first pass.

    Args:
        mode: one of the bundle's modes.
        pixels: at the small size; ``full`` needs none. larger: at the larger size; None if they are unavailable,
            because the caller sent preprocessed pixels or there are too many sizes; ``adaptive`` then becomes ``fast``.
    """
    if mode == "full" and bundle.larger is not None:
        full = Resolution(mode, _cost(bundle))
        return NO_LARGER if larger is None else Item(bundle.larger, "dispatcher", options, larger, None, dispatch, full)
    assert pixels is not None
    if mode not in INPUT_MODES:
        return Item(bundle, next(m for m in MODES if m == mode), options, pixels, entry, dispatch)
    asked = Resolution("fast" if larger is None else mode, larger=larger if mode == "adaptive" else None)
    return Item(bundle, "dispatcher", options, pixels, entry, dispatch, asked)


def next_of(item: Item, answer: Prediction) -> Prediction | Item:
    """The result of a pass: the image's answer, or its item for a second pass."""
    how, card = item.resolution, item.bundle.card
    if how is None:
        return answer
    if how.first is not None:
        masks = (*how.first.masks, *(LARGER + name for name in answer.masks))
        return replace(how.first, labels=answer.labels, masks=masks, deferral=Deferral(_size(item), True))
    if item.bundle.larger is None:  # the larger size itself
        masks = tuple(LARGER + name for name in answer.masks)
        return replace(answer, mode=how.mode, masks=masks, deferral=Deferral(_size(item), False))
    answer = replace(answer, mode=how.mode, deferral=Deferral(_size(item), False))
    unsure = card.deferral is not None and answer.labels and answer.labels[0].score < card.deferral.threshold
    if how.larger is None or not unsure:  # also without labels, since the second pass would change nothing
        return answer
    again = Resolution(how.mode, _cost(item.bundle), first=answer)
    return Item(item.bundle.larger, "dispatcher", item.options, how.larger, None, item.dispatch, again)


def surest(items: Sequence[Item], answers: Sequence[Prediction]) -> tuple[Item, Prediction]:
    """Of two bundles' answers for one image, choose the one with the likelier label, or of the likelier bundle.

    A label is as likely as its bundle times itself in this bundle. By its own score alone, easy tasks would win.
    """

    def likely(pair: tuple[Item, Prediction]) -> float:
        dispatch, labels = pair[0].dispatch, pair[1].labels
        return (labels[0].score if labels else 0.0) * (dispatch.confidence if dispatch else 1.0)

    return max(zip(items, answers, strict=True), key=likely)


def count(answer: Prediction) -> Prediction:
    """Count the answer, once per image however many passes it took and bundles were asked, and return it."""
    if not answer.bundle:  # the frozen backbone's
        metrics.count_answer(None, None)
        return answer
    metrics.count_answer(answer.bundle, answer.cluster, version=answer.version)
    metrics.ROUTING_CONFIDENCE.observe(answer.confidence)
    if answer.dispatch is not None:
        metrics.count_dispatch(answer.bundle, answer.dispatch.confidence)
    if answer.deferral is not None:
        metrics.count_deferral(answer.bundle, answer.deferral.deferred)
    return answer


def _cost(bundle: Bundle) -> int:
    """The cost of a pass at the larger size in passes at the small size, by number of pixels."""
    small, large = (part.preprocessing.size for part in bundle.parts)
    return max(1, round((large / small) ** 2))


def _size(item: Item) -> int:
    return item.bundle.preprocessing.size
