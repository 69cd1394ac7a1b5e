"""The coder's benchmark, on the demo bundle."""

import json
from pathlib import Path

from benchmarks.coder import measured
from benchmarks.report import report

DEMO = Path(__file__).parents[2] / "model_store" / "demo" / "1"


def test_sizes_and_speeds_of_every_mask(tmp_path: Path) -> None:
    figures, table = measured(DEMO, rounds=1)
    report("coder", figures, table, executor=None, out=tmp_path / "coder.json")
    assert json.loads((tmp_path / "coder.json").read_text())["figures"].keys() == figures.keys()
    assert table.row_count == 6
    assert figures["bytes"].value < 0.9 * figures["bytes_lzma"].value and figures["smaller_than_lzma"].met
    assert figures["decoded_mb_per_second"].value > 0
