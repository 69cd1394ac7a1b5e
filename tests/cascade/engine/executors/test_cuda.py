"""The executor for GPUs, on a CPU: without kernels, and with graphs that are tapes. On the real device: tests/gpu."""

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cascade.engine.executors import cuda
from cascade.engine.executors.check import Reference, check
from cascade.engine.executors.cuda import CudaExecutor
from cascade.engine.executors.graph import Graph
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.kernels.weight_layout import PackedMask
from cascade.model.backbone import Backbone
from tests.helpers.networks import NETWORKS, calibrated, features, images, masks_of

pytestmark = pytest.mark.slow


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

    def __init__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], stream: Any = None, pool: Any = None
    ) -> None:
        super().__init__(function, inputs, stream, pool)
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
@pytest.mark.skipif(torch.cuda.is_available(), reason="then the kernels are compiled; tests/gpu runs them")
def test_a_mask_for_each_image_by_the_kernels(name: str) -> None:
    """The whole way through the table of addresses, in the interpreter, with a bucket that is not full."""
    backbone = calibrated(name)
    executor = CudaExecutor(backbone, WeightCache(2**30))
    start = len(backbone.stages) - 2  # every program of every kernel is interpreted: the last stages will do
    masks = [executor.pack(mask) for mask in masks_of(backbone, 0, start, 1)]
    small = images(backbone, 3) if name == "test_vit" else images(backbone, 3)[:, :, :32, :32]
    x = executor.run(small, 0, start)
    want = executor.run_each(x, masks, start)
    executor._graphs.clear()
    executor._bound.kernels = True
    executor.run_each(x.flip(0), masks[::-1], start)
    close(executor.run_each(x, masks, start), want)


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
    for name, misses in (("test_resnet", 0), ("test_vit", 0), ("tiny_densenet", 2)):
        backbone, weight_cache = calibrated(name), WeightCache(2**30)
        executor = CudaExecutor(backbone, weight_cache)
        executor.run_each(images(backbone, 2), [executor.pack(m) for m in masks_of(backbone, 0, 0)], 0)
        assert weight_cache.misses == misses, name


@pytest.mark.parametrize("count", [1, 2, 5, 70, 131])
def test_batches_of_any_size(count: int) -> None:
    backbone = calibrated("test_resnet")
    executor = CudaExecutor(backbone, WeightCache(2**30))
    x = images(backbone, count)[:, :, :32, :32]
    masks = [executor.pack(mask) for mask in masks_of(backbone, 0, 0, 0)]
    order = [masks[i % 3] for i in range(count)]
    folded = [FoldedOf(backbone, mask) for mask in masks]
    want = torch.cat([folded[i % 3].run(x[i : i + 1]) for i in range(count)])
    close(executor.run_each(x, order, 0), want)
    executor.swap(masks[0])
    executor.run(images(backbone, 128)[:, :, :32, :32])
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


def test_what_is_prepared_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pass of a bundle that was prepared captures anything; and one beside a pass changes nothing of it."""
    backbone = calibrated("test_resnet")
    executor = CudaExecutor(backbone, WeightCache(0))
    dispatcher, *experts = (executor.pack(mask) for mask in masks_of(backbone, 1, 3, 3))
    x = images(backbone, 3)
    trunk = executor.run(x, 0, 1)
    executor.swap(dispatcher)
    want = executor.run(trunk, 1, 3)
    executor.prepare([dispatcher, *experts], 64, batch=4)
    graphs = list(executor._graphs)
    assert sorted({key[1:3] for key in graphs}, key=str) == [(0, 1), (1, 3), (3, None)]
    assert executor.run(trunk, 1, 3).equal(want), "the mask in place is still the one in place"
    for count in (1, 2, 3):
        executor.swap(None)
        trunk = executor.run(x[:count], 0, 1)
        executor.swap(dispatcher)
        middle = executor.run(trunk, 1, 3)
        executor.run(middle, 3)
        executor.swap(experts[1])
        executor.run(middle, 3)
        if count > 1:
            executor.run_each(trunk, [dispatcher] * (count - 1) + [executor.pack(masks_of(backbone, 1)[0])], 1, 3)
            executor.run_each(middle, experts[:1] * (count - 1) + experts[1:], 3)
    executor.run(images(backbone, 9), 0, 1)
    assert set(executor._graphs) == set(graphs), "larger batches are split"
    monkeypatch.setattr(cuda, "Graph", lambda *_: pytest.fail("it was prepared already"))
    executor.prepare([dispatcher, *experts], 64, batch=4)


def test_graphs_leave_with_the_last_bundle_that_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others' graphs stay, those that two shapes share among them; and no other graph takes a prepared one's place."""
    monkeypatch.setattr(cuda, "GRAPHS", 1)
    backbone = calibrated("test_resnet")
    executor = CudaExecutor(backbone, WeightCache(0))
    a, b, late = (executor.pack(mask) for mask in masks_of(backbone, 1, 1, 3))
    executor.prepare([a], 64, batch=1)
    first = set(executor._graphs)
    executor.prepare([b], 64, batch=1)
    assert set(executor._graphs) == first
    executor.prepare([late], 64, domain=1, batch=1)
    for size in (32, 48):
        executor.run(images(backbone, 1)[:, :, :size, :size])
    assert len(executor._graphs) == len(first) + 5 + 1, "the trunk up to stage 1 is shared"
    executor.forget([a])
    assert first < set(executor._graphs)
    executor.forget([b, late])
    assert [key[-1] for key in executor._graphs] == [(3, 48, 48)]
    executor.prepare([a], 64, batch=1)
    assert first < set(executor._graphs)


def test_passes_run_while_graphs_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """One capture at a time, but a pass that waits has its turn before the next one."""

    class Slow(Graph):
        def __init__(self, *arguments: Any) -> None:
            time.sleep(0.02)
            super().__init__(*arguments)

    backbone = calibrated("test_resnet")
    executor = CudaExecutor(backbone, WeightCache(0))
    mask, x = executor.pack(masks_of(backbone, 1)[0]), images(backbone, 1)[:, :, :32, :32]
    executor.run(x)
    monkeypatch.setattr(cuda, "Graph", Slow)
    loader = threading.Thread(target=executor.prepare, args=([mask], 32))
    loader.start()
    passes = 0
    while loader.is_alive():
        executor.run(x)
        passes += loader.is_alive()
    assert len(executor._graphs) > 15 and passes > 5


def test_wrong_products_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask for each image is checked against the plain model, as one mask for all is."""
    backbone = calibrated("test_resnet")
    reference, executor = Reference.of(backbone, 64), CudaExecutor(backbone, WeightCache(0))
    assert check(executor, reference) < 1e-4
    right = executor._run_each
    monkeypatch.setattr(executor, "_run_each", lambda *parts: right(*parts) * 1.01)
    with pytest.raises(CascadeError, match="under a mask for each image of test_resnet"):
        check(executor, reference)


# --- memory


def test_one_buffer_that_never_moves() -> None:
    """It is the executor's own: the weight cache holds nothing, and no mask that leaves takes it away."""
    backbone, weight_cache = calibrated("test_resnet"), WeightCache(0)
    executor = CudaExecutor(backbone, weight_cache)
    a, b, late = (executor.pack(mask) for mask in masks_of(backbone, 0, 0, 3))
    executor.swap(a)
    where = executor._buffer.data_ptr()
    for mask, hits, misses in ((b, 0, 2), (late, 0, 3), (None, 0, 3), (late, 1, 3), (late, 1, 3), (a, 1, 4)):
        executor.swap(mask)
        weight_cache.drop(mask)
        assert executor._buffer.data_ptr() == where
        assert (weight_cache.hits, weight_cache.misses, weight_cache.used) == (hits, misses, 0)


@pytest.mark.usefixtures("graphs")
def test_late_and_early_masks_share_the_buffer() -> None:
    backbone = calibrated("test_resnet")
    executor = CudaExecutor(backbone, WeightCache(0))
    late, early = (executor.pack(mask) for mask in masks_of(backbone, 4, 1))
    x = images(backbone, 2)
    trunks = {mask: executor.run(x, 0, mask.start) for mask in (late, early)}
    want = {mask: FoldedOf(backbone, mask).run(trunks[mask], mask.start) for mask in (late, early)}
    for mask in (late, early, late, early):
        executor.swap(mask)
        close(executor.run(trunks[mask], mask.start), want[mask])
    keys = list(executor._graphs)
    executor.swap(None)
    executor.swap(late)
    executor.run(trunks[late], 4)
    assert list(executor._graphs) == [*(key for key in keys if key[1] != 4), *(key for key in keys if key[1] == 4)]


def test_all_memory_is_counted() -> None:
    backbone = calibrated("test_resnet")
    executor = CudaExecutor(backbone, WeightCache(0))
    assert executor.size(executor.pack(masks_of(backbone, 0)[0])) == 0, "nothing beside the buffer"
    before = executor.bytes()
    assert before > 2 * executor.plain.nbytes, "the plain weights, and the working buffer"
    executor.run(images(backbone, 3))
    assert executor.bytes() - before == sum(graph.bytes for graph in executor._graphs.values()) == 4 * 3 * 64 * 64 * 4


def test_a_mask_that_is_gone_is_freed() -> None:
    backbone = calibrated("test_resnet")
    executor = CudaExecutor(backbone, WeightCache(0))
    mask = executor.pack(masks_of(backbone, 0)[0])
    executor.swap(mask)
    executor.swap(None)
    gone = weakref.ref(mask)
    del mask
    assert gone() is None and executor._last() is None


@pytest.mark.usefixtures("graphs")
def test_two_backbones_in_turn() -> None:
    """Each has a buffer of its own, so nothing is filled again."""
    backbones = [calibrated("test_resnet"), calibrated("test_resnet")]
    backbones[1].weights.mul_(0.9)
    executors = [CudaExecutor(backbone, WeightCache(0)) for backbone in backbones]
    masks = [executor.pack(masks_of(executor.backbone, 0)[0]) for executor in executors]
    x = images(backbones[0], 2)
    want = [FoldedOf(e.backbone, mask).run(x) for e, mask in zip(executors, masks, strict=True)]
    for i in (0, 1, 1, 0, 1, 0):
        executors[1 - i].swap(None)
        executors[i].swap(masks[i])
        close(executors[i].run(x), want[i])
    assert [e.weight_cache.misses for e in executors] == [1, 1]


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
