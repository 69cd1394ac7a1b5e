"""Find images similar to a given one: python examples/search.py [FOLDER [IMAGE]]"""

import sys
import tempfile
from pathlib import Path

import cascade
from cascade.offline import index
from cascade.offline.predict import predict_files

folder = sys.argv[1] if len(sys.argv) > 1 else "tests/data/photos"
image = sys.argv[2] if len(sys.argv) > 2 else "tests/data/photos/cat-0000.png"
engine = cascade.load("model_store/paper/1")
with tempfile.TemporaryDirectory() as scratch:
    predictions, built = Path(scratch) / "predictions", Path(scratch) / "index"
    predict_files(engine, [folder], predictions, embedding="float32")
    index.build(predictions, built)
    (results,) = index.search(index.read(built), engine, [image], k=5)
if isinstance(results, cascade.ItemError):
    sys.exit(f"{image}: {results}")
for result in results:
    print(f"{result['similarity']:.3f}  {result['path']}")
