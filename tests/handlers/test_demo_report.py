"""What the demo says of an answer."""

import io
from dataclasses import replace

import pytest
from PIL import Image
from rich.console import Console

from cascade import Prediction
from cascade.engine.results import Dispatch, Label, Neighbor
from handlers.demo_images import NOBODY, Sample, samples
from handlers.demo_report import Answered, row, same, summary

ANSWER = Prediction(
    "clothes",
    "1",
    "dispatcher",
    0,
    1.0,
    0.25,
    ("dispatcher",),
    (Label("T-shirt/top", 0.75),),
    (Neighbor("a", "Bag", 0.5),),
    dispatch=Dispatch(0.9, (Label("clothes", 0.9),), 0),
)
SHIRT = Sample("clothes/T-shirt-top", b"", customer="clothes", label="T-shirt-top")


def test_a_row_has_customer_label_and_masks() -> None:
    answered = Answered(SHIRT, ANSWER, (0.012, 0.008))
    assert answered.right
    assert row(answered) == [
        "clothes/T-shirt-top", "clothes", "0.90", "[green]T-shirt/top[/] 0.75", "dispatcher", " 12   8",
    ]  # fmt: skip


def test_without_a_head_the_neighbors_vote() -> None:
    """Two that are a little less similar outvote the nearest one."""
    alike = (*ANSWER.neighbors, *(Neighbor(name, "T-shirt/top", 0.47) for name in "bc"))
    for neighbors, right, shown in (
        (alike[:1], False, "[red]Bag[/] 1.00"),
        (alike, True, "[green]T-shirt/top[/] 0.60"),
    ):
        answered = Answered(SHIRT, replace(ANSWER, labels=(), neighbors=neighbors, dispatch=None), (0.0, 0.0))
        assert answered.right is right
        assert row(answered)[2:4] == ["-", shown]


@pytest.mark.parametrize(
    ("sample", "right"),
    [(SHIRT, False), (Sample("x", b"", customer=NOBODY), True), (Sample("mine", b""), None)],
    ids=["of a customer", "of nobody", "one's own"],
)
def test_unknown_is_right_for_images_of_nobody_alone(sample: Sample, right: bool | None) -> None:
    answered = Answered(sample, None, (0.0, 0.0))
    assert answered.right is right and "unknown" in row(answered)[1]


def test_answers_are_the_same_up_to_rounding() -> None:
    one = ANSWER.to_json()
    assert same(one, replace(ANSWER, ood=0.2501).to_json())
    assert not same(one, replace(ANSWER, ood=0.26).to_json())
    assert not same(one, replace(ANSWER, bundle="digits").to_json())


def test_committed_images_have_a_customer_and_a_label() -> None:
    found = samples()
    table = [sample for sample in found if sample.shown]
    for customer in ("objects", "clothes", "groceries", "digits"):
        own = [sample for sample in found if sample.customer == customer and sample.label]
        assert len(own) == 50 and own[:5] == [sample for sample in table if sample.customer == customer]
        assert len({sample.content for sample in own}) == 50
        assert all(Image.open(io.BytesIO(sample.content)).size in ((28, 28), (32, 32), (192, 192)) for sample in own)
    assert [(sample.bundle, sample.customer) for sample in table[20:]] == [(None, NOBODY)] * 2 + [("paper", None)] * 2


def test_counted_images_need_not_be_in_the_table() -> None:
    """Labels and dispatch are counted over all; what belongs to nobody is in the table alone."""
    right = Answered(SHIRT, ANSWER, (0.1, 0.1))
    wrong = Answered(replace(SHIRT, shown=False, label="Bag"), ANSWER, (0.1,))
    lost = Answered(replace(SHIRT, shown=False), None, (0.1,))
    nobody = Answered(Sample("x", b"", customer=NOBODY), None, (0.1, 0.1))
    overview = {"bundles": [{"name": "clothes", "backbone": "b", "bytes": 1}], "memory": {"backbone": 1}}
    out = io.StringIO()
    summary(overview, [right, nobody], [right, wrong, lost], None, Console(file=out, width=100))
    said = out.getvalue()
    assert "1 of 3 are right; the table shows 1" in said
    assert "2 of 3 images went to their customer; 1 of 1 that belong to nobody are unknown" in said
