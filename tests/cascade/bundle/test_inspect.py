"""The card for a person."""

from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from cascade.bundle.format import Bundle
from cascade.bundle.inspect import headline, percent, show
from tests.helpers.bundles import handmade


@pytest.fixture(scope="module")
def hand(cifar: list[Image.Image]) -> Bundle:
    return handmade(cifar[:40])


def shown(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed, spaces evened out."""
    show(bundle)
    return " ".join(capsys.readouterr().out.split())


def changed(bundle: Bundle, **fields: Any) -> Bundle:
    return replace(bundle, card=bundle.card.model_copy(update=fields))


def test_the_trained_bundle(trained: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    text, card = shown(trained, capsys), trained.card
    assert f"small/1 · conditional · {card.dim}-d embedding" in text
    assert f"backbone tf_efficientnet_lite0 from {card.backbone.source} · fingerprint 4cf934214273" in text
    assert "input 32 px" in text
    assert "trained on 240 images of" in text and "without labels" in text
    for mask in card.masks:
        assert f"{mask.name} │ blocks.6 │ {mask.weights:,} │ {mask.density:.2%}" in text
    assert f"{card.masks[1].differs_from_dispatcher:.2%}" in text
    assert card.router is not None and all(f"{share:.1%}" in text for share in card.router.shares)
    for method, found in card.accuracy["whitened"].items():
        assert f"{method} │ {percent(found['knn'])} │ {percent(found['probe'])}" in text
    assert f"together │ {sum(card.bytes.values()):,}" in text


def test_accuracies_over_seeds(hand: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"knn": [0.711, 0.0042], "probe": [0.724, 0.001]}
    accuracy = {
        "held_out_images": 2000,
        "k": 20,
        "dim": 256,
        "seeds": 3,
        "whitened": {"dispatcher": one},
        "plain": {"dispatcher": one},
        "precision": {"bf16": {"images": 64, "cosine": 0.99991, "least": 0.9987}},
        "ood_auroc": {"fashion-mnist": {"ood": 0.912, "one_minus_confidence": 0.6}},
    }
    text = shown(changed(hand, accuracy=accuracy, training={"calibration_error": 0.0321}), capsys)
    assert "dispatcher │ 71.1 ± 0.4 │ 72.4 ± 0.1" in text
    assert "3 seeds (mean ± standard deviation)" in text
    assert "out-of-domain score against fashion-mnist: AUROC 0.912 (1 - confidence: 0.600)" in text
    assert "expected calibration error of the routing confidence: 0.032" in text
    assert "embeddings in bf16 against float32: cosine 0.99991, at least 0.99870, on 64 images" in text


@pytest.mark.parametrize("training", [{}, {"note": "by hand"}])
@pytest.mark.parametrize("accuracy", [{}, {"top1": 0.5}, {"whitened": {}}])
def test_a_card_that_says_little(
    hand: Bundle, capsys: pytest.CaptureFixture[str], training: dict[str, Any], accuracy: dict[str, Any]
) -> None:
    text = shown(changed(hand, training=training, accuracy=accuracy), capsys)
    assert "hand/1 · conditional · 8-d embedding" in text and "expert-1" in text


def test_a_single_mask(cifar: list[Image.Image], capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(handmade(cifar[:40], experts=0), capsys)
    assert "hand/1 · dispatcher" in text and "expert" not in text


def test_words_are_no_markup(hand: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders are named by people: brackets are shown, not obeyed."""
    training = {"recipe": {"labels": True}, "images": 5, "data": "holiday [2019] [/x]"}
    odd = replace(changed(hand, training=training, bytes={"[red]a": 1}), name="[bold]mine[/y]")
    text = shown(odd, capsys)
    assert "trained on 5 images of holiday [2019] [/x], with their labels" in text
    assert "[bold]mine[/y]/1" in text and "[red]a" in text


def test_on_a_console_of_ones_own(hand: Bundle, tmp_path: Path) -> None:
    out = StringIO()
    show(hand, Console(file=out, width=200))
    assert "hand/1" in out.getvalue()


def test_no_escape_sequence_of_a_card_reaches_the_terminal(hand: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    training = {"recipe": {}, "images": 3, "data": "x\x1b]0;owned\x07"}
    backbone = hand.card.backbone.model_copy(update={"source": "file:\x1b[31mred"})
    show(changed(hand, training=training, backbone=backbone))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\x07" not in printed and "x\\x1b]0;owned" in printed


ROWS = {"a head": {"test": 0.7}, "a mask": {"test": 0.9}}


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        ({"serves": "both", "rows": ROWS}, ("labels", 0.9)),
        ({"serves": "frozen", "rows": ROWS}, ("labels", 0.7)),
        ({"serves": "frozen", "accuracy": 0.6}, ("labels", 0.6)),
        ({"whitened": {"conditional": {"probe": 0.7}}}, ("labels", 0.7)),
        ({"whitened": {"conditional": {"probe": [0.8, 0.01]}}}, ("labels", 0.8)),
        ({}, None),
        ({"rows": [], "whitened": 3, "accuracy": "good"}, None),
        ({"serves": "both", "rows": {"alone": {"test": None}}}, None),
    ],
)
def test_headline_is_that_of_what_is_served(hand: Bundle, accuracy: dict[str, Any], expected: object) -> None:
    assert headline(changed(hand, accuracy=accuracy, mode="conditional").card, labels=True) == expected


def test_headline_without_a_head_is_that_of_the_neighbors(hand: Bundle) -> None:
    accuracy = {"whitened": {"conditional": {"knn": 0.75, "probe": 0.8}}}
    bundle = replace(changed(hand, accuracy=accuracy, mode="conditional"), linear={})
    assert headline(bundle.card, labels=False) == ("nearest neighbors", 0.75)
