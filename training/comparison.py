"""Compare a trained mask with the frozen backbone: a table, a verdict, and the choice of what the bundle serves.

With labels the rows are classifiers, by accuracy. Without labels they are embeddings, by k-NN accuracy where there are
class folders to measure it with, otherwise by their distance to the teacher.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zstandard
from rich.table import Table
from torch import Tensor

from cascade.bundle.format import strip_prefix
from cascade.model import masks
from cascade.model.heads import Linear
from cascade.model.masks import Mask
from training import dispatcher, embed, finetune, heads
from training.frozen import Candidate, frozen_head, trained_head
from training.lora import lora_backbone
from training.masking import MaskedModel
from training.run import Run, write_json
from training.tuned import tune_backbone

LORA_LR = 0.003
TITLES = {
    "frozen": "frozen backbone, linear head",
    "mask": "mask",
    "channels": "scales and shifts",
    "both": "mask, scales and shifts",
    "delta": "1-bit delta",
    "fine-tuned": "full fine-tuning",
    "lora": "LoRA, rank 8",
}


@dataclass(frozen=True)
class Row:
    """One row of the table: accuracies in [0, 1], and the bytes to ship for this model."""

    title: str
    validation: float
    test: float
    bytes: int

    def facts(self) -> dict[str, Any]:
        """For the card."""
        return {"validation": _share(self.validation), "test": _share(self.test), "bytes": self.bytes}


def compare(run: Run, *, others: bool = False) -> tuple[Candidate, dict[str, Any]]:
    """The better of frozen head and trained mask on the validation images, and the facts about both for the card.

    Args:
        others: also fine-tune every weight, and train LoRA, for the same steps.
    """
    frozen, mask = frozen_head(run), trained_head(run, "dispatcher")
    chosen = mask if mask.beats(frozen) else frozen
    rows = [
        Row(TITLES["frozen"], frozen.validation, frozen.test, compressed(_head(frozen.head))),
        Row(
            TITLES[run.recipe.adapt],
            mask.validation,
            mask.test,
            compressed(shipped(run, run.dispatcher) | _head(mask.head)),
        ),
    ]
    rows += [other(run, name) for name in ("lora", "fine-tuned")] if others else []
    facts: dict[str, Any] = {
        "serves": "frozen" if chosen is frozen else run.recipe.adapt,
        "validation_images": len(run.rows[1]),
        "held_out_images": len(run.held_out),
        "temperature": round(chosen.temperature, 4),
        "calibration_error": round(chosen.calibration_error, 4),
        "rows": {row.title: row.facts() for row in rows},
    }
    write_json(run.folder / "comparison.json", facts)
    return chosen, facts


def show(facts: dict[str, Any]) -> Table:
    """The comparison as a table."""
    table = Table("model", "validation %", "held-out %", "KB to ship")
    for title, row in facts["rows"].items():
        shares = ("-" if row[k] is None else f"{100 * row[k]:.1f}" for k in ("validation", "test"))
        table.add_row(title, *shares, f"{row['bytes'] / 1000:,.0f}")
    return table


def verdict(facts: dict[str, Any]) -> str:
    """One sentence: whether the mask is worth having."""
    frozen, mask = list(facts["rows"].values())[:2]
    what = "delta" if TITLES["delta"] in facts["rows"] else "mask"
    if facts["serves"] == "frozen":
        return (
            f"the {what} is not worth having: {100 * mask['validation']:.1f} % of the validation images against"
            f" {100 * frozen['validation']:.1f} % with a head on the frozen backbone, so the bundle serves that head;"
            " more images or more --steps may change this"
        )
    key = "validation" if frozen["test"] is None else "test"
    gain = 100 * (mask[key] - frozen[key])
    if gain < 0:
        return (
            f"in doubt: the {what} is better on the validation images and served, but {-gain:.1f} points worse on the"
            " test images; more images or more --steps would decide, --frozen keeps the head alone"
        )
    return (
        f"the {what} is worth having: {100 * mask[key]:.1f} % against {100 * frozen[key]:.1f} % with a head on the"
        f" frozen backbone ({gain:+.1f} points), for {mask['bytes'] / 1000:,.0f} KB instead of"
        f" {frozen['bytes'] / 1000:,.0f} KB"
    )


def compressed(tensors: dict[str, Tensor]) -> int:
    """Bytes of the tensors with zstd."""
    raw = b"".join(t.contiguous().cpu().numpy().tobytes() for t in tensors.values())
    return len(zstandard.ZstdCompressor(level=19).compress(raw))


def adapter_tensors(model: MaskedModel) -> dict[str, Tensor]:
    """The tensors to ship for an adapted model: bits and half-precision channels, or the trained weights."""
    if "weights" in model.groups:
        return {n: p.detach() for n, p in model.learned.items()}
    bits = [model.active_bits(name) for name in model.scores]
    packed = {"bits": masks.pack(torch.cat(bits))} if bits else {}
    return packed | {n: p.detach().half() for n, p in model.channels.items()}


def _head(head: Linear) -> dict[str, Tensor]:
    return {"weight": head.weight.half(), "bias": head.bias.half()}


def shipped(run: Run, mask: Mask) -> dict[str, Tensor]:
    """The tensors of a mask or delta to ship."""
    tensors = {} if masks.density(run.backbone, mask) == 1 and not mask.deltas else {"bits": mask.bits}
    return tensors | mask.norms | mask.channels | {f"{n}.delta": t for n, t in mask.deltas.items()}


def other(run: Run, name: str) -> Row:
    """Full fine-tuning or LoRA: the same images, steps and head, without a mask."""
    model = (
        lora_backbone(run.backbone, run.mask_from)
        if name == "lora"
        else tune_backbone(run.backbone, run.mask_from, train_norms=False)
    )
    done = "dispatcher" if name == "fine-tuned" and run.recipe.adapt == "delta" else name  # that training is the same
    dispatcher.train(run, done, model=model, lr=LORA_LR if name == "lora" else finetune.LR)
    own = strip_prefix(run.trained(done), "objective.")
    head = Linear(own["weight"], own["bias"])
    labels, truth = run.images.labels, run.held_out.labels
    assert labels is not None
    validation = run.rows[1]
    inputs = run.inputs("train")[validation], run.inputs("test")
    features = [finetune.features(model, embed.normalized(x, run.preprocessing)) for x in inputs]
    score = heads.accuracy(head, features[0], labels[validation])
    measured = heads.accuracy(head, features[1], truth) if truth is not None else float("nan")
    return Row(TITLES[name], score, measured, compressed(adapter_tensors(model) | _head(head)))


def _share(value: float) -> float | None:
    return None if np.isnan(value) else round(value, 4)
