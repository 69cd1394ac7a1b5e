"""Start the ASGI server on a free port, send it images, stop it: python examples/serve_and_ask.py [IMAGE ...]"""

import re
import subprocess
import sys

import cascade

images = sys.argv[1:] or ["tests/data/photos/cat-0000.png", "tests/data/photos/ship-0001.png"]
command = "cascade serve --model-store model_store --port 0 --log-level warning"
server = subprocess.Popen(command.split(), stdout=subprocess.PIPE, text=True)
try:
    assert server.stdout is not None
    url = next(match[0] for line in server.stdout if (match := re.search(r"http://[\d.]+:\d+", line)))
    with cascade.Client(url, patience=30) as client:  # patience: seconds to retry while the server is busy
        print("bundles:", client.models())
        for image in images:
            answer = client.predict(image, cascade.Options(bundle="paper"))
            print(f"{image}: {answer.labels[0].name}" if answer.ok else f"{image}: {answer.error}")
        columns = client.infer(images, bundle="paper", outputs=["label", "confidence", "error"])  # all in one request
        print(columns["label"], columns["confidence"])
finally:
    server.terminate()  # the server answers the requests in progress, then exits
    server.wait()
