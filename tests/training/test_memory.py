"""What does not fit into memory is said before it is computed."""

from pathlib import Path

import pytest

from cascade.errors import CascadeError
from training import memory


def test_the_smaller_of_machine_and_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "LIMITS", (tmp_path / "v2", tmp_path / "v1"))
    (tmp_path / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    2000000 kB\n")
    assert memory.available() == 2_048_000_000
    (tmp_path / "v2").write_text("max\n")
    assert memory.available() == 2_048_000_000
    (tmp_path / "v1").write_text("1000000000\n")
    memory.expect(1_000_000_000, "features")
    with pytest.raises(CascadeError, match=r"^features need 3.0 GB of memory, 1.0 GB are available: use fewer images$"):
        memory.expect(3_000_000_000, "features")
