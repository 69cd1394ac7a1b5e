"""PyTorch's precision switches, which belong to the process: set for as long as it takes, by one thread at a time."""

import threading

import torch

from cascade.engine.executors.precision import exact, products

GPU = torch.device("cuda")  # no device is needed to set the switches


def switches() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def test_exact_and_tf32_and_back() -> None:
    before = switches()
    with products(True, GPU):
        assert switches() == ("high", True)
        with exact(GPU):
            assert switches() == ("highest", False)
        assert switches() == ("high", True)
    assert switches() == before


def test_restored_after_a_failure() -> None:
    before = switches()
    try:
        with exact(GPU):
            raise ValueError
    except ValueError:
        pass
    assert switches() == before


def test_threads_take_turns() -> None:
    """Two of them would restore each other's switches."""
    seen: list[tuple[str, bool]] = []
    before, inside, leave = switches(), threading.Event(), threading.Event()

    def other() -> None:
        inside.wait()
        leave.set()
        with products(True, GPU):
            seen.append(switches())

    thread = threading.Thread(target=other)
    thread.start()
    with exact(GPU):
        inside.set()
        leave.wait()
        thread.join(0.1)
        assert thread.is_alive() and switches() == ("highest", False)
    thread.join()
    assert seen == [("high", True)] and switches() == before


def test_nothing_changes_for_a_cpu() -> None:
    before = switches()
    with products(True, torch.device("cpu")):
        assert switches() == before
