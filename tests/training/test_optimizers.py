"""Learning rates: scores travel as far in a short training as in a long one."""

from dataclasses import replace

from pytest import approx

from training.optimizers import channel_rate, score_rate
from training.recipe import Recipe


def test_a_short_training_with_labels_has_a_higher_rate() -> None:
    steps, recipe = (0, 100, 300, 600, 1000, 1500, 9000), Recipe("photos", labels=True)
    assert [score_rate(recipe, n) for n in steps] == approx([0.05, 0.05, 0.05, 0.05, 0.045, 0.03, 0.02])
    alone = replace(recipe, adapt="mask")
    assert [score_rate(alone, n) for n in steps] == approx([0.05, 0.05, 0.05, 0.05, 0.03, 0.02, 0.02])


def test_an_explicit_rate_is_kept_and_so_is_that_without_labels() -> None:
    assert score_rate(Recipe("photos", labels=True, lr=0.3), 300) == 0.3
    assert {score_rate(Recipe("photos", objective=kind), 300) for kind in ("distill", "swav")} == {0.02}
    assert score_rate(Recipe("photos", objective="distill+swav"), 300) == approx(0.002), (
        "it would undo the distillation"
    )


def test_channels_move_less_in_a_long_training_beside_scores() -> None:
    steps = (0, 300, 750, 1500, 9000)
    labeled = Recipe("photos", labels=True)
    assert [channel_rate(labeled, n) for n in steps] == approx([0.002, 0.002, 0.001, 0.0005, 0.0005])
    for recipe in (replace(labeled, adapt="channels"), Recipe("photos", objective="distill")):
        assert {channel_rate(recipe, n) for n in steps} == {0.002}
    assert channel_rate(replace(labeled, channel_lr=0.01), 9000) == 0.01
    assert channel_rate(Recipe("photos", objective="distill+swav"), 300) == approx(0.0002)
