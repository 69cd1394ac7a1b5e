"""A bundle with two input sizes on disk: the parts of the larger one, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image
from rich.console import Console
from safetensors import safe_open

from cascade.bundle import archive
from cascade.bundle.export import export
from cascade.bundle.format import Bundle, BundleError, check, read, serialize, write
from cascade.bundle.inspect import show
from cascade.bundle.validate import inconsistencies
from cascade.model import backbone as backbones
from tests.helpers.bundle_files import contents, edit_card, edit_tensors, equal, refusal, seal
from tests.helpers.deferral import two_sizes


@pytest.fixture(scope="module", params=[False, True], ids=["mask", "frozen"])
def pair(request: pytest.FixtureRequest, cifar: list[Image.Image]) -> Bundle:
    return two_sizes(cifar[:20], plain=request.param)


@pytest.fixture
def folder(cifar: list[Image.Image], tmp_path: Path) -> Path:
    return write(two_sizes(cifar[:20]), tmp_path / "hand" / "1")


def test_roundtrip(pair: Bundle, tmp_path: Path) -> None:
    folder = write(pair, tmp_path / "other" / "3")
    found = read(folder)
    assert found.larger is not None and found.larger.identity == found.identity == ("other", "3")
    assert equal(replace(found, name="hand", version="1"), pair)
    assert contents(write(found, tmp_path / "again" / "1")) == contents(folder)
    check(found, backbones.load(pair.card.backbone.name, pair.card.backbone.source))
    packed = archive.pack(folder, tmp_path / "one.cascade")
    assert contents(archive.unpack(packed, tmp_path / "unpacked" / "1")) == contents(folder)


def test_without_it_a_bundle_is_what_it_was(pair: Bundle) -> None:
    alone = replace(pair, larger=None, card=pair.card.model_copy(update={"deferral": None}))
    files, card = serialize(alone), json.loads(serialize(alone)["cascade.json"])
    assert card["format"] == 1 and "deferral" not in card and not any("larger" in name for name in files)


def test_the_mask_of_the_larger_size_must_fit_the_backbone(pair: Bundle, cifar: list[Image.Image]) -> None:
    assert pair.larger is not None
    mask = pair.larger.dispatcher
    wrong = replace(pair, larger=replace(pair.larger, dispatcher=replace(mask, bits=mask.bits.new_zeros(7))))
    with pytest.raises(BundleError, match="7 bytes"):
        check(wrong, backbones.load(pair.card.backbone.name, pair.card.backbone.source))


CARD: dict[str, Callable[[dict[str, Any]], object]] = {
    "but the card has none": lambda card: card.pop("deferral"),
    "threshold": lambda card: card["deferral"].update(threshold=1.5),
    "is not more than 32 px": lambda card: card["deferral"]["preprocessing"].update(size=32),
    "is not within": lambda card: card["deferral"]["preprocessing"].update(size=100_000),
    "more weights than the backbone": lambda card: card["deferral"]["mask"].update(weights=10**9),
    "fit": lambda card: card["deferral"]["mask"].update(weights=100),
}


@pytest.mark.parametrize("says", CARD)
def test_a_bad_card_is_refused(folder: Path, says: str) -> None:
    edit_card(folder, CARD[says])
    assert says in refusal(folder)


def test_a_larger_size_without_a_head_is_refused(folder: Path) -> None:
    (folder / "larger.heads.safetensors").unlink()
    seal(folder)
    assert "head" in refusal(folder)


def test_a_head_of_other_classes_is_refused(folder: Path) -> None:
    edit_tensors(
        folder, "larger.heads", lambda t: t.update({"dispatcher.linear.bias": t["dispatcher.linear.bias"][1:]})
    )
    assert "larger: head dispatcher" in refusal(folder)


def test_numbers_of_the_larger_size_are_finite(folder: Path) -> None:
    edit_tensors(folder, "larger.heads", lambda t: t["dispatcher.linear.weight"].fill_(float("nan")))
    assert "larger: linear dispatcher: not all of its numbers are finite" in refusal(folder)


def test_the_larger_size_has_no_other_parts(pair: Bundle) -> None:
    assert pair.larger is not None
    more = replace(pair, larger=replace(pair.larger, banks=pair.banks))
    assert "larger: it has more than a mask and a head" in [*inconsistencies(more)]


def test_inspect_says_when_it_asks_again(pair: Bundle) -> None:
    out = StringIO()
    show(pair, Console(file=out, width=200))
    assert "asked again at 64 px below a probability of 0.500: 50.0% of the validation images" in out.getvalue()
    row = next(line for line in out.getvalue().splitlines() if "at 64 px" in line and "asked" not in line)
    assert pair.card.deferral is not None and f"{pair.card.deferral.mask.weights:,}" in row and "50.0%" in row


def test_either_size_is_a_plain_model(folder: Path, tmp_path: Path) -> None:
    for larger, size in ((False, 32), (True, 64)):
        file = export(folder, tmp_path / f"{size}.safetensors", larger=larger)
        with safe_open(file, "pt") as stored:
            assert json.loads(stored.metadata()["preprocessing"])["size"] == size
            state = {name: stored.get_tensor(name) for name in [*stored.keys()]}
        timm.create_model("test_resnet", num_classes=3).load_state_dict(state)


def test_one_size_has_no_larger_one_to_export(pair: Bundle, tmp_path: Path) -> None:
    alone = replace(pair, larger=None, card=pair.card.model_copy(update={"deferral": None}))
    with pytest.raises(BundleError, match="one input size"):
        export(write(alone, tmp_path / "alone" / "1"), tmp_path / "out.safetensors", larger=True)
