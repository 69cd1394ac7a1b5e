"""The harness of the benchmarks: real processes, honest rounds, and failures that are seen."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks import subprocesses as harness
from benchmarks.report import Rows, figure, single
from benchmarks.subprocesses import Peer, peers, ratios, rounds
from tests.helpers.subprocess_ways import broken, build


@pytest.mark.slow
def test_each_peer_is_a_process_of_its_own_and_its_death_is_seen() -> None:
    with peers({"a": (build, 10), "b": (build, 20)}) as running:
        (_, (a, first)), (_, (b, second)) = running["a"].time(1), running["b"].time(1)
        assert (a, b) == (11, 21) and len({first, second, os.getpid()}) == 3
        assert all(abs(peer.grown()) < 10**9 for peer in running.values())
        seconds = rounds(running, [1, 2, 3])
        assert {way: len(taken) for way, taken in seconds.items()} == {"a": 3, "b": 3}
        assert min(map(min, seconds.values())) > 0
        with pytest.raises(RuntimeError, match="a peer died with exit code 3"):
            running["b"].time(-3)
    assert all(not peer._process.is_alive() for peer in running.values())


def test_a_peer_that_cannot_be_built_says_why() -> None:
    with pytest.raises(RuntimeError, match="broken: ValueError: no such thing"):
        Peer(broken)


def test_a_round_beside_other_work_is_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop takes 1 s, is off in the first round, and for good in the third, which is given up in the end."""
    times = iter([1.0] * 5 + [1.5, 1.0] + [1.0, 1.0] + [1.0, 1.0] + [2.0] * 2 * harness.TRIES)
    monkeypatch.setattr(harness, "_calibrate", lambda: next(times))
    done: list[int] = []

    class Counting:
        def time(self, work: int) -> tuple[float, None]:
            done.append(work)
            return 0.5, None

    seconds = rounds({"a": Counting()}, [1, 2, 3], warm=0)  # type: ignore[dict-item]
    assert done == [1, 1, 2] + [3] * harness.TRIES and seconds == {"a": [0.5] * 3}


def test_figures_know_their_goals() -> None:
    assert figure([3, 1, 2], "<= 2").met and not figure([3, 1, 2], ">= 2.5").met
    assert figure([3, 1, 2]).met is None and figure([3, 1, 2]).spread == (1, 3)
    assert single(1.1, "> 1").met and not single(1.0, "> 1").met
    assert ratios([1, 4], [2, 2]) == [0.5, 2]


def test_the_last_line_is_one_json_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    rows = Rows("title")
    rows.add("a thing", single(0.25), "s", 2_000_000)
    report.report("try", {"speed": figure([1, 2, 3], ">= 1.5"), "bytes": single(7)}, rows.table, executor=None)
    out = capsys.readouterr().out
    last = out.splitlines()[-1]
    assert "a thing" in out and "speed" in out
    assert json.loads(last) == json.loads((tmp_path / "results" / "try.json").read_text())
    assert json.loads(last)["figures"] == {
        "speed": {"value": 2, "goal": ">= 1.5", "met": True, "spread": [1, 3]},
        "bytes": {"value": 7, "goal": None, "met": None, "spread": [7, 7]},
    }
