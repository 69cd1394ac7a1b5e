"""A GPU that is not there: what would make the host wait for it, and what would be launched on it.

Everything that an executor returns acts as a device's, and so does what is computed from it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cascade.engine.executors.cuda import CudaExecutor
from cascade.kernels import per_image
from cascade.model.masks import Mask, unpack


class OnDevice(Tensor):
    """Counts what would make the host wait for a GPU; everything that is computed from one is one, too."""

    WAITS = (
        *("cpu", "item", "tolist", "numpy", "nonzero", "masked_select", "unique", "equal", "allclose"),
        *("__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__", "__repr__", "__format__"),
    )
    waits: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        name = func.__name__
        by_list = name in ("__getitem__", "__setitem__") and isinstance(args[1], list | np.ndarray)
        if name in cls.WAITS or by_list:
            cls.waits.append(name)
        return out.as_subclass(Tensor) if name == "cpu" else out


class Launches(TorchDispatchMode):
    """Counts operations that would launch a kernel: all but views and the allocation of memory."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        allocates = func.overloadpacket.__name__ in ("empty", "empty_like", "empty_strided", "new_empty", "detach")
        if not func.is_view and not allocates:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Uploads(TorchFunctionMode):
    """Counts copies of host memory to the device for which the host would wait: all that don't say ``non_blocking``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        to_device = func is Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device)
        from_host = not isinstance(args[0], OnDevice) if to_device else func is torch.tensor and "device" in kwargs
        if from_host and not kwargs.get("non_blocking"):
            OnDevice.waits.append(func.__name__)
        return func(*args, **kwargs)


@contextmanager
def waits() -> Iterator[list[str]]:
    """What makes the host wait in this block, by name."""
    OnDevice.waits.clear()
    with Uploads():
        yield OnDevice.waits


class Calls:
    """The parts of the backbone that ran: (start, stop, images, masks), and features that act as a device's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[tuple[int, int | None, int]] = []
        self.each: list[tuple[int, int | None, int, int]] = []
        run, run_each = CudaExecutor.run, CudaExecutor.run_each

        def seen(executor: CudaExecutor, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
            self.runs.append((start, stop, len(x)))
            return run(executor, x.as_subclass(Tensor), start, stop).as_subclass(OnDevice)

        def each(
            executor: CudaExecutor, x: Tensor, masks: Sequence[Mask], start: int, stop: int | None = None
        ) -> Tensor:
            self.each.append((start, stop, len(x), len(set(masks))))
            return run_each(executor, x.as_subclass(Tensor), masks, start, stop).as_subclass(OnDevice)

        def hidden(bits: Tensor, n: int) -> Tensor:
            with torch._C.DisableTorchFunction():
                return unpack(bits, n)

        monkeypatch.setattr(per_image, "unpack", hidden)  # of the reference, which no GPU runs
        monkeypatch.setattr(CudaExecutor, "run", seen)
        monkeypatch.setattr(CudaExecutor, "run_each", each)
        monkeypatch.setattr(
            "cascade.engine.resident.choose", lambda backbone, weight_cache, *_: CudaExecutor(backbone, weight_cache)
        )
