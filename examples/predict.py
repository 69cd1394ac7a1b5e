"""Predict images in this process: python examples/predict.py [IMAGE ...]"""

import sys
from pathlib import Path

import cascade

images = sys.argv[1:] or sorted(map(str, Path("tests/data/photos").iterdir()))
engine = cascade.load("model_store/paper/1")
for image, answer in zip(images, engine.predict(images), strict=True):
    if answer.ok:
        label = answer.labels[0]
        print(f"{image}: {label.name} {label.score:.2f}, cluster {answer.cluster}, masks {' + '.join(answer.masks)}")
    else:
        print(f"{image}: {answer.error}")
