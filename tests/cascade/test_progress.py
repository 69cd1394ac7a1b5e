"""Progress where there is no terminal: one line every few seconds."""

import time

import pytest

from cascade import progress


def test_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.progress("predicting") as advance:
        for done in range(100, 131):  # one item a second; 100 were done before
            advance(done, 200)
            now[0] += 1
    assert capsys.readouterr().err.splitlines() == [
        "predicting: 110 of 200, 1.0/s, 90 s left",
        "predicting: 120 of 200, 1.0/s, 80 s left",
        "predicting: 130 of 200, 1.0/s, 70 s left",
    ]


def test_track_passes_everything_on() -> None:
    assert list(progress.track(iter("abc"), "x", 3)) == ["a", "b", "c"]
