"""Choose an executor: the fastest on this hardware, by a short benchmark whose result is recorded."""

import json
import logging
import platform
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

import torch

from cascade import atomic
from cascade.cache import cache_folder
from cascade.cpus import cpu_count
from cascade.engine.executors import Executor
from cascade.engine.executors.check import EXACT, ROUNDED, TF32, Reference, check
from cascade.engine.executors.plain import PlainExecutor
from cascade.engine.weight_cache import WeightCache
from cascade.errors import CascadeError
from cascade.model.backbone import Backbone

Kind = Literal["auto", "plain", "folded", "tf32", "bf16", "onnx"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ON_CPU: tuple[Kind, ...] = ("folded", "onnx")  # a measurement chooses among these; both compute in float32
ON_GPU: tuple[Kind, ...] = ("folded", "tf32", "bf16", "onnx")
COARSE: tuple[Kind, ...] = ("tf32", "bf16")  # too coarse to reveal a small folding error, unlike float32
TOLERANCE: dict[Kind, float] = {"folded": EXACT, "onnx": EXACT, "tf32": TF32, "bf16": ROUNDED}
BATCH, ROUNDS = {"cpu": 4, "cuda": 32}, 7
RECORDED = 200  # most measurements to keep, the newest
log = logging.getLogger(__name__)


def choose(backbone: Backbone, weight_cache: WeightCache, kind: Kind = "auto", size: int | None = None) -> Executor:
    """Choose an executor for a backbone, and free the backbone's copy of the weights if the executor has its own.

    Args:
        kind: ``auto`` picks the fastest: on a CPU in float32, on a GPU in float32, TF32 or bfloat16, each within its
            own tolerance. ``folded`` computes in float32 anywhere, ``bf16`` keeps three digits.
        size: side of the images, pixels.

    Raises:
        CascadeError: the requested executor can't run here, or can't run this model.
    """
    if kind not in KINDS:
        raise CascadeError(f"there is no executor {kind!r}; choose one of: {' '.join(KINDS)}")
    size = size or backbone.config["input_size"][-1]
    if kind == "plain":
        return make(backbone, weight_cache, kind)
    reference = Reference.of(backbone, size)
    if kind == "auto":
        executor = _fastest(backbone, weight_cache, size, reference)
    else:
        executor = _checked(backbone, weight_cache, kind, reference)
    if not isinstance(executor, PlainExecutor):
        backbone.release()
    return executor


def _checked(backbone: Backbone, weight_cache: WeightCache, kind: Kind, reference: Reference) -> Executor:
    """Make an executor and check that it gives the plain model's features."""
    if kind in COARSE:
        _tried(backbone, weight_cache, "folded", reference)
    return _tried(backbone, weight_cache, kind, reference)


def _tried(backbone: Backbone, weight_cache: WeightCache, kind: Kind, reference: Reference) -> Executor:
    """Make an executor and check its features within its tolerance."""
    try:
        executor = make(backbone, weight_cache, kind)
        error = check(executor, reference, TOLERANCE[kind])
    except RuntimeError as failure:  # out of memory, or no C compiler, which Triton needs at its first launch
        if not backbone.weights.is_cuda:
            raise
        reason = (str(failure).splitlines() or [type(failure).__name__])[0]
        raise CascadeError(f"executor {kind} fails on {backbone.weights.device}: {reason}") from failure
    executor.kind, executor.error = kind, error
    log.info("executor %s of %s: relative error %.2g, %g allowed", kind, backbone.name, error, TOLERANCE[kind])
    return executor


def make(backbone: Backbone, weight_cache: WeightCache, kind: Kind) -> Executor:
    """Make an executor of one kind."""
    if kind == "plain":
        return PlainExecutor(backbone, weight_cache)
    if kind == "onnx":
        from cascade.engine.executors.onnx import OnnxExecutor

        return OnnxExecutor(backbone, weight_cache)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    if backbone.weights.is_cuda:
        from cascade.engine.executors.cuda import CudaExecutor

        return CudaExecutor(backbone, weight_cache, dtype, tf32=kind == "tf32")
    if kind == "tf32":
        raise CascadeError("TF32 needs a GPU: choose folded, or --device cuda if there is one")
    from cascade.engine.executors.folded import FoldedExecutor

    return FoldedExecutor(backbone, weight_cache, dtype)


def _fastest(backbone: Backbone, weight_cache: WeightCache, size: int, reference: Reference) -> Executor:
    """Choose by the recorded times, or measure: the best of interleaved passes, because other work only adds time."""
    device = backbone.weights.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    threads = f"{torch.get_num_threads()} threads on {cpu_count()} CPUs"
    key = f"{where}, {threads}, torch {torch.__version__}, {_onnxruntime()}, {backbone.name}, {size} px"
    record, kinds = _read(), ON_GPU if device.type == "cuda" else ON_CPU
    if (times := record.get(key)) and (kind := min(times, key=times.__getitem__)) in kinds:
        try:
            return _checked(backbone, weight_cache, kind, reference)
        except CascadeError as error:  # the environment has changed since the record was made
            log.warning("executor %s can't be used any more: %s", kind, error)
    executors: dict[Kind, Executor] = {}
    for kind in kinds:
        if kind in COARSE and "folded" not in executors:
            continue
        try:
            executors[kind] = _tried(backbone, weight_cache, kind, reference)
        except CascadeError as error:
            level = logging.WARNING if device.type == "cuda" else logging.INFO  # the image for GPUs has all of them
            log.log(level, "executor %s is left out for %s: %s", kind, backbone.name, error)
    if not executors:
        log.warning("%s runs with the plain executor: no faster one computes the same", backbone.name)
        return make(backbone, weight_cache, "plain")
    seconds: dict[Kind, list[float]] = {kind: [] for kind in executors}
    x = torch.zeros(BATCH[device.type], 3, size, size, device=device)
    for nth in range(ROUNDS + 1 if len(executors) > 1 else 0):
        for kind, executor in executors.items():
            begin = time.perf_counter()
            executor.run(x)[0, 0].item()
            if nth:
                seconds[kind].append(time.perf_counter() - begin)
    took = {kind: round(min(s) / len(x), 9) for kind, s in seconds.items() if s}
    best: Kind = min(took, key=took.__getitem__) if took else next(iter(executors))
    log.info("executor %s for %s: seconds an image %s", best, key, took)
    if took:
        _write(_read() | {key: took})
    return executors[best]


def _onnxruntime() -> str:
    """The installed version of ONNX Runtime."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with suppress(PackageNotFoundError):
            return f"{package} {version(package)}"
    return "no onnxruntime"


def path() -> Path:
    """The file of recorded measurements: seconds per image, by executor, hardware, backbone and size."""
    return cache_folder() / "executors.json"


def _read() -> dict[str, dict[Kind, float]]:
    try:
        record = json.loads(path().read_text())
        return record if isinstance(record, dict) else {}
    except (OSError, ValueError):  # missing or damaged: measure again
        return {}


def _write(record: dict[str, dict[Kind, float]]) -> None:
    """Write the record atomically; without a writable cache the next start measures again."""
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        with atomic.file(path()) as temporary:
            temporary.write_text(json.dumps(dict([*record.items()][-RECORDED:]), indent=1))
    except OSError as error:
        log.info("the choice of an executor is not recorded: %s", error)


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
