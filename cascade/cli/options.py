"""Options and arguments that several commands share."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class ExecutorKind(StrEnum):
    """Executors of the backbone, see ``cascade.engine.executors``."""

    auto = "auto"
    plain = "plain"
    folded = "folded"
    tf32 = "tf32"
    bf16 = "bf16"
    onnx = "onnx"


BundlePath = Annotated[Path, typer.Argument(help="A bundle's folder, e.g. model_store/paper/1.")]
Executor = Annotated[ExecutorKind, typer.Option(help="What runs the backbone; auto picks the fastest.")]
Weights = Annotated[Path | None, typer.Option(help="Checkpoint to use instead of the bundle's own weight source.")]
