"""Print a bundle's card: ``cascade inspect``."""

from collections.abc import Iterator
from typing import Any, TypeVar, cast

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from cascade.bundle.bundle import Bundle
from cascade.bundle.schema import Card, MaskCard
from cascade.errors import printable

T = TypeVar("T")


def show(bundle: Bundle, console: Console | None = None) -> None:
    """Print what the bundle adapts, its masks and clusters, its measured accuracies and its bytes."""
    console, card = console or Console(markup=False), _printable(bundle.card)  # a bundle's words are no markup
    console.print(f"{bundle.name}/{bundle.version} · {card.mode} · {card.dim}-d embedding", style="bold")
    back = card.backbone
    console.print(f"backbone {back.name} from {back.source} · fingerprint {back.fingerprint[:12]}")
    size, crop = card.preprocessing["size"], card.preprocessing["crop_pct"]
    console.print(f"input {size} px, crop {crop:g}, {card.preprocessing['interpolation']}")
    trained = card.training
    if {"recipe", "images", "data"} <= trained.keys():
        how = "with their labels" if trained["recipe"].get("labels") else "without labels"
        console.print(f"trained on {trained['images']} images of {trained['data']}, {how}")
    if bundle.domain is not None and card.domain is not None:
        stage = back.stages[card.domain.stage]
        console.print(f"images can be dispatched to it: {len(bundle.domain.prototypes)} prototypes before {stage}")
    if (d := card.deferral) is not None:
        console.print(
            f"asked again at {d.preprocessing['size']} px below a probability of {d.threshold:.3f}:"
            f" {d.share:.1%} of the validation images"
        )
    for name, moved in card.accuracy.get("precision", {}).items():
        console.print(
            f"embeddings in {name} against float32: cosine {moved['cosine']:.5f}, at least {moved['least']:.5f},"
            f" on {moved['images']} images"
        )
    for table in (_masks(card), *_accuracies(card.accuracy), _bytes(card)):
        console.print(table)
    if trained.get("calibration_error") is not None:
        console.print(f"expected calibration error of the routing confidence: {trained['calibration_error']:.3f}")
    if "ood_auroc" in card.accuracy:
        for other, found in card.accuracy["ood_auroc"].items():
            console.print(
                f"out-of-domain score against {other}: AUROC {found['ood']:.3f}"
                f" (1 - confidence: {found['one_minus_confidence']:.3f})"
            )


def _printable(value: T) -> T:
    """The card with control characters escaped in every text: a terminal would obey them."""
    cleaned: Any = value
    match cleaned:
        case str():
            cleaned = printable(cleaned)
        case BaseModel():
            fields = {name: _printable(getattr(cleaned, name)) for name in type(cleaned).model_fields}
            cleaned = cleaned.model_copy(update=fields)
        case dict():
            cleaned = {_printable(key): _printable(item) for key, item in cleaned.items()}
        case list() | tuple():
            cleaned = type(cleaned)(map(_printable, cleaned))
    return cast(T, cleaned)


def _masks(card: Card) -> Table:
    table = Table("mask", "from stage", "weights", "active", "differs", "share of images", title="masks")
    for k, mask in enumerate(card.masks):
        share = f"{card.router.shares[k - 1]:.1%}" if k and card.router else ""
        differs = f"{mask.differs_from_dispatcher:.2%}" if k else ""
        table.add_row(*_described(mask, card, mask.name), differs, share)
    if (d := card.deferral) is not None:
        name = f"at {d.preprocessing['size']} px"
        table.add_row(*_described(d.mask, card, name), f"{d.mask.differs_from_dispatcher:.2%}", f"{d.share:.1%}")
    return table


def _described(mask: MaskCard, card: Card, name: str) -> tuple[str, ...]:
    stage = [*card.backbone.stages, "none (frozen)"][mask.start]
    return name, stage, f"{mask.weights:,}", f"{mask.density:.2%}"


def _accuracies(accuracy: dict[str, Any]) -> Iterator[Table]:
    if not {"whitened", "plain", "held_out_images", "k", "dim"} <= accuracy.keys():
        return  # some other trainer's own
    seeds = f", {accuracy['seeds']} seeds (mean ± standard deviation)" if "seeds" in accuracy else ""
    title = (
        f"accuracy in %, {accuracy['held_out_images']} held-out images, k = {accuracy['k']},"
        f" whitened to {accuracy['dim']}{seeds}"
    )
    table = Table("method", "k-NN", "probe", "k-NN, not whitened", "probe, not whitened", title=title)
    for method, whitened in accuracy["whitened"].items():
        plain = accuracy["plain"][method]
        table.add_row(method, *(percent(t[m]) for t in (whitened, plain) for m in ("knn", "probe")))
    yield table


def _bytes(card: Card) -> Table:
    table = Table("file", "bytes", title="size")
    for name, size in card.bytes.items():
        table.add_row(name, f"{size:,}")
    table.add_row("together", f"{sum(card.bytes.values()):,}")
    return table


def percent(share: float | list[float]) -> str:
    """An accuracy, or its [mean, standard deviation] over seeds, in %."""
    if isinstance(share, list):
        return f"{100 * share[0]:.1f} ± {100 * share[1]:.1f}"
    return f"{100 * share:.1f}"


def headline(card: Card, labels: bool) -> tuple[str, float] | None:
    """The one accuracy in [0, 1] that says most of a bundle, on held-out images, and of what it is.

    None where the card has none, or some other trainer's own.

    Args:
        labels: whether the bundle has a head.
    """
    found = card.accuracy
    try:
        if "rows" in found:  # the head of the frozen backbone or the copy before, then what was trained
            first, second = list(found["rows"].values())[:2]
            return "labels", float((first if found["serves"] == "frozen" else second)["test"])
        if "whitened" in found:
            scores = found["whitened"][card.mode]
            score = scores["probe"] if labels else scores["knn"]
            value = float(score[0] if isinstance(score, list) else score)
            return "labels" if labels else "nearest neighbors", value
        return ("labels", float(found["accuracy"])) if "accuracy" in found else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
