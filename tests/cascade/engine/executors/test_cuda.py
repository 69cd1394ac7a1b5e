"""The executor for GPUs, on a CPU: without kernels, and with graphs that are tapes. On the real device: tests/gpu."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cascade.engine.executors import cuda
from cascade.engine.executors.cuda import CudaExecutor, Graph
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.kernels.weight_layout import PackedMask
from cascade.model.backbone import Backbone
from cascade.model.masks import Mask
from tests.cascade.engine.executors.test_executors import calibrated, features
from tests.cascade.kernels.test_triton import device as device
from tests.helpers.bundles import random_mask

pytestmark = pytest.mark.slow

NETWORKS = [
    "test_resnet",
    "test_efficientnet",
    "test_vit",
    "test_convnext",
    "densenet121",
]  # norms that can't be folded


class Tape(Graph):
    """What a CUDA graph is, on a CPU: the operations of the first call, replayed with the addresses of that call."""

    class _Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[Any, Any, Any, Any]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            alias = lambda tree: tree_map_only(Tensor, lambda t: t.detach(), tree)  # noqa: E731
            self.calls.append((func, alias(args), alias(kwargs or {}), alias(out)))
            return out

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], pool: Any = None) -> None:
        super().__init__(function, inputs, pool)
        with self._Recorder() as recorder:
            out = function(*inputs)
        self._function = lambda *inputs: self._play(recorder.calls, out)

    @staticmethod
    def _play(calls: list[tuple[Any, Any, Any, Any]], out: Tensor) -> Tensor:
        for func, args, kwargs, old in calls:
            new = func(*args, **kwargs)
            for place, value in zip(tree_leaves(old), tree_leaves(new), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)
        return out


@pytest.fixture(params=[Graph, Tape], ids=["called", "replayed"])
def graphs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "Graph", request.param)


@pytest.fixture(scope="module", params=NETWORKS)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return calibrated(request.param)


def masks_of(backbone: Backbone, *starts: int, norms: bool = True) -> list[Mask]:
    generator = torch.Generator().manual_seed(1)
    masks = [random_mask(backbone, f"m{i}", start, generator, norms) for i, start in enumerate(starts)]
    if norms and len(backbone.stages) == 1:  # a stage without a prefix
        moved = [
            {name: t * (1 + torch.rand(t.shape, generator=generator)) for name, t in backbone.norms.items()}
            for _ in masks
        ]
        masks = [replace(mask, norms=own) for mask, own in zip(masks, moved, strict=True)]
    return masks


def images(backbone: Backbone, count: int) -> Tensor:
    size = 160 if backbone.name == "test_vit" else 64
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def close(got: Tensor, want: Tensor) -> None:
    assert len(want) == 1 or want.std(dim=0).max() > 1e-3, "the images must differ, or this proves little"
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.usefixtures("graphs")
def test_equals_the_plain_executor(backbone: Backbone) -> None:
    """Masks that begin early and late, with statistics of their own and without, there and back again."""
    plain, executor = PlainExecutor(backbone, WeightCache(2**30)), CudaExecutor(backbone, WeightCache(2**30))
    last = len(backbone.stages) - 1
    masks = [*masks_of(backbone, last, min(last, 1), 0, last), *masks_of(backbone, 0, min(last, 1), norms=False)]
    packed = {mask: executor.pack(mask) for mask in masks}
    x = images(backbone, 3)
    want = {mask: features(plain, mask, x, mask.start) for mask in masks}
    bare = features(plain, None, x, 0)
    plain.swap(None)
    for mask in [*masks, *masks[::-1]]:
        executor.swap(None)
        close(executor.run(x), bare)
        trunk = executor.run(x, 0, mask.start) if mask.start else x
        executor.swap(packed[mask])
        close(executor.run(trunk, mask.start), want[mask])


@pytest.mark.parametrize("start", [0, 2, -1])
def test_a_mask_for_each_image(backbone: Backbone, start: int) -> None:
    """Each image as if it were alone; masks of one batch may begin at several stages, and come more than once."""
    plain, executor = PlainExecutor(backbone, WeightCache(2**30)), CudaExecutor(backbone, WeightCache(2**30))
    stage = backbone.stage(min(start, len(backbone.stages) - 1))
    masks = masks_of(backbone, stage, 0, stage // 2, stage, stage)
    order = [masks[i] for i in (0, 1, 2, 3, 1)]
    x = executor.run(images(backbone, 5), 0, stage) if stage else images(backbone, 5)
    want = []
    for row, mask in enumerate(order):
        plain.swap(mask)
        want.append(plain.run(x[row : row + 1], stage).clone())
    plain.swap(None)
    packed = {mask: executor.pack(mask) for mask in masks}
    for _ in range(2):
        close(executor.run_each(x, [packed[mask] for mask in order], stage), torch.cat(want))
    turned = executor.run_each(x.flip(0), [packed[mask] for mask in order[::-1]], stage).flip(0)
    close(turned, torch.cat(want))
    close(executor.run(x, stage), features(plain, None, x, stage) if not stage else plain.run(x, stage))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet"])
def test_a_mask_for_each_image_by_the_kernels(name: str, device: str) -> None:
    """The whole way through the table of addresses, in the interpreter, with a bucket that is not full."""
    backbone = calibrated(name)
    executor = CudaExecutor(backbone, WeightCache(2**30))
    masks = [executor.pack(mask) for mask in masks_of(backbone, 0, 2, 1)]
    x = executor.run(images(backbone, 3), 0, 2)
    want = executor.run_each(x, masks, 2)
    executor._graphs.clear()
    executor._bound.kernels = True
    executor.run_each(x.flip(0), masks[::-1], 2)
    close(executor.run_each(x, masks, 2), want)


def test_a_part_of_the_stages_with_a_mask_for_each_image() -> None:
    backbone = calibrated("test_resnet")
    executor = CudaExecutor(backbone, WeightCache(2**30))
    masks = [executor.pack(mask) for mask in masks_of(backbone, 1, 0, 1)]
    x = images(backbone, 3)
    part = executor.run_each(executor.run(x, 0, 1), masks, 1, 3)
    whole = executor.run_each(part, masks, 3)
    close(whole, executor.run_each(executor.run(x, 0, 1), masks, 1))


def test_who_needs_materialized_weights_for_distinct_masks() -> None:
    """Networks with norms that can't be folded; the others leave the weight_cache alone."""
    for name, misses in (("test_resnet", 0), ("test_vit", 0), ("densenet121", 2)):
        backbone, weight_cache = calibrated(name), WeightCache(2**30)
        executor = CudaExecutor(backbone, weight_cache)
        executor.run_each(images(backbone, 2), [executor.pack(m) for m in masks_of(backbone, 0, 0)], 0)
        assert weight_cache.misses == misses, name


@pytest.mark.parametrize("count", [1, 2, 5, 33, 70])
def test_batches_of_any_size(count: int) -> None:
    backbone = calibrated("test_resnet")
    executor = CudaExecutor(backbone, WeightCache(2**30))
    x = images(backbone, count)[:, :, :32, :32]
    masks = [executor.pack(mask) for mask in masks_of(backbone, 0, 0, 0)]
    order = [masks[i % 3] for i in range(count)]
    want = torch.cat([FoldedOf(backbone, order[i]).run(x[i : i + 1]) for i in range(count)])
    close(executor.run_each(x, order, 0), want)
    executor.swap(masks[0])
    executor.run(images(backbone, 64)[:, :, :32, :32])
    close(executor.run(x)[::3], want[::3])


def FoldedOf(backbone: Backbone, mask: PackedMask) -> CudaExecutor:
    """An executor of its own under a mask."""
    from cascade.engine.executors.folded import FoldedExecutor

    executor = FoldedExecutor(backbone, WeightCache(2**30))
    executor.swap(mask)
    return executor  # type: ignore[return-value]


def test_graphs_serve_all_masks_and_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(Tape):
        def __init__(self, *arguments: Any) -> None:
            made.append(len(arguments[1][0]))
            super().__init__(*arguments)

    monkeypatch.setattr(cuda, "Graph", Counted)
    backbone = calibrated("test_resnet")
    executor = CudaExecutor(backbone, WeightCache(2**30))
    masks = [executor.pack(mask) for mask in masks_of(backbone, 0, 0, 0)]
    for mask in masks:
        for count in (3, 4, 1):
            executor.swap(mask)
            executor.run(images(backbone, count))
            executor.run_each(images(backbone, count), (masks * 2)[: count - 1] + masks[-1:], 0)
    assert sorted(made) == [1, 4, 4], "one image is never a mixture"


def test_old_graphs_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "GRAPHS", 3)
    backbone = calibrated("test_resnet")
    executor = CudaExecutor(backbone, WeightCache(2**30))
    for size in (32, 48, 64, 80):
        executor.run(images(backbone, 1)[:, :, :size, :size])
    assert len(executor._graphs) == 3


# --- memory


def buffer_of(executor: CudaExecutor) -> Tensor:
    buffer = executor._buffer()
    assert buffer is not None
    return buffer


def test_one_buffer_that_never_moves() -> None:
    backbone, weight_cache = calibrated("test_resnet"), WeightCache(2**30)
    executor = CudaExecutor(backbone, weight_cache)
    a, b, late = (executor.pack(mask) for mask in masks_of(backbone, 0, 0, 3))
    executor.swap(a)
    where = buffer_of(executor).data_ptr()
    for mask, hits, misses in ((b, 0, 2), (late, 0, 3), (None, 0, 3), (late, 1, 3), (late, 1, 3), (a, 1, 4)):
        executor.swap(mask)
        assert buffer_of(executor).data_ptr() == where
        assert (weight_cache.hits, weight_cache.misses) == (hits, misses)
        assert weight_cache.used == executor.size(a), "the whole buffer, whatever is in it"
        assert [m in weight_cache for m in (a, b, late)] == [m is (mask or late) for m in (a, b, late)]


def test_the_buffer_is_as_long_as_it_must_be() -> None:
    backbone, weight_cache = calibrated("test_resnet"), WeightCache(2**30)
    executor = CudaExecutor(backbone, weight_cache)
    late, early = (executor.pack(mask) for mask in masks_of(backbone, 4, 1))
    executor.swap(late)
    assert weight_cache.used == executor.size(late) == buffer_of(executor).nbytes < executor.size(early)
    executor.run(torch.zeros(1, *executor.run(images(backbone, 1), 0, 4).shape[1:]), 4)
    executor.swap(early)
    assert weight_cache.used == executor.size(early) == buffer_of(executor).nbytes
    assert all(key[0] is None for key in executor._graphs), "graphs of a buffer that is gone are gone"


def test_a_budget_below_one_mask() -> None:
    backbone = calibrated("test_resnet")
    executor = CudaExecutor(backbone, WeightCache(100))
    with pytest.raises(CascadeError, match="the budget of 100 bytes is below one mask's weights"):
        executor.swap(executor.pack(masks_of(backbone, 0)[0]))
    x = images(backbone, 2)
    assert executor.run(x).isfinite().all(), "the plain backbone still runs"


@pytest.mark.usefixtures("graphs")
def test_two_backbones_share_a_budget_of_one_mask() -> None:
    """What one evicts, the other must neither keep nor look at."""
    weight_cache = WeightCache(0)
    backbones = [calibrated("test_resnet"), calibrated("test_resnet")]
    backbones[1].weights.mul_(0.9)
    executors = [CudaExecutor(backbone, weight_cache) for backbone in backbones]
    masks = [executor.pack(masks_of(executor.backbone, 0)[0]) for executor in executors]
    weight_cache.budget = executors[0].size(masks[0])
    x = images(backbones[0], 2)
    want = [FoldedOf(e.backbone, mask).run(x) for e, mask in zip(executors, masks, strict=True)]
    for i in (0, 1, 1, 0, 1, 0):
        executors[1 - i].swap(None)
        executors[i].swap(masks[i])
        close(executors[i].run(x), want[i])
        assert weight_cache.used == weight_cache.budget
        executors[i].swap(None)
    executors[0].swap(masks[0])
    executors[1].swap(masks[1])  # evicts it: nothing else holds the buffer, but what took it over
    held = {buffer.data_ptr() for e in executors if (buffer := e._buffer()) is not None}
    assert len(held) == 1


def test_evicted_weights_are_freed() -> None:
    backbone, weight_cache = calibrated("test_resnet"), WeightCache(2**30)
    executor = CudaExecutor(backbone, weight_cache)
    mask = executor.pack(masks_of(backbone, 0)[0])
    executor.swap(mask)
    executor.run(images(backbone, 2))
    weight_cache.clear()
    assert executor._buffer() is None
    with pytest.raises(AssertionError, match="is held"):
        executor.run(images(backbone, 2))


def test_bfloat16() -> None:
    backbone = calibrated("test_resnet")
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16; tests/gpu has the same on a GPU")
    plain, executor = (
        PlainExecutor(backbone, WeightCache(2**30)),
        CudaExecutor(backbone, WeightCache(2**30), torch.bfloat16),
    )
    masks = masks_of(backbone, 0, 0, 0)
    x = images(backbone, 3)
    want = torch.cat([features(plain, mask, x[i : i + 1], 0) for i, mask in enumerate(masks)])
    packed = [executor.pack(mask) for mask in masks]
    got = executor.run_each(x, packed, 0)
    assert got.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(got, want).min() > 0.999
    executor.swap(packed[1])
    assert torch.nn.functional.cosine_similarity(executor.run(x)[1], want[1], dim=0) > 0.999
    plain.swap(None)
