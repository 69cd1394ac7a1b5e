"""Train a bundle from Python: python examples/train.py IMAGES STORE/NAME/VERSION

IMAGES is a folder of photos. The few steps below only show how it works; omit ``steps`` and ``expert_steps`` for a
real run. ``cascade train`` does the same on the command line.
"""

import sys
from pathlib import Path

import cascade
from training import pipeline
from training.cli import Watch
from training.recipe import Recipe
from training.run import begin

images, out = sys.argv[1], Path(sys.argv[2])
recipe = Recipe(images, size=32, mask_from="blocks.6", steps=4, expert_steps=2, clusters=2, local_crops=0, dim=32)
run = begin(out.with_name(f"{out.name}-run"), recipe, Watch(None))  # resumes if this folder holds an interrupted run
pipeline.train(run, out)

photo = next(path for path in sorted(Path(images).rglob("*")) if path.suffix in (".jpg", ".png"))
(answer,) = cascade.load(out).predict([photo])
print(f"{photo}: cluster {answer.cluster}, masks {' + '.join(answer.masks)}" if answer.ok else answer.error)
