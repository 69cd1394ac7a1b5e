"""A typical TorchServe handler: one worker with a full copy per model. TorchServe requires a single class here."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import synthetic
from cascade.model.decoding import decode
from cascade.model.preprocessing import Preprocessing


class CopyHandler:
    """A timm model with its own weights in plain PyTorch, images channels last."""

    def initialize(self, context: Any) -> None:
        settings = context.model_yaml_config["copy"]
        torch.set_num_threads(settings["threads"])
        backbone = synthetic.load(settings["backbone"])
        self.model = backbone.model
        self.model.load_state_dict(load_file(Path(settings["weights"])))
        self.transform = Preprocessing.of(backbone.config).transform()

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        images = [self.transform(decode(bytes(next(iter(each.values()))))) for each in data]
        with torch.inference_mode():
            features = self.model(torch.stack(images).contiguous(memory_format=torch.channels_last))
        return [json.dumps(row.tolist()[: synthetic.DIM]) for row in features]
