"""Data-parallel training: the processes of ``torchrun``, each with its share of every batch.

    torchrun --nproc-per-node 2 -m -- training.dispatcher cifar10 --run runs/cifar --size 64

They take the same step on the same gradient, so that all have the same mask; the first one writes. Without ``torchrun``
there is one process, and every function here does nothing.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = 3600  # seconds that the others wait, for example while the first one decodes images


@contextmanager
def together() -> Iterator[None]:
    """Connect the processes that ``torchrun`` has started, by gloo on CPUs and NCCL on GPUs; disconnect at the end."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    from datetime import timedelta

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=TIMEOUT))
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def first() -> Iterator[None]:
    """Run the block in the first process alone, then in the others, which find its results."""
    if rank():
        wait()
    yield
    if not rank():
        wait()


def wait() -> None:
    """Barrier: wait until all processes have arrived."""
    if dist.is_initialized():
        dist.barrier()


def gather(x: Tensor) -> Tensor:
    """Gather the rows of all processes in order, without a gradient: [B, ...] to [world * B, ...]."""
    x = x.detach().contiguous()
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(world())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def total(x: Tensor) -> Tensor:
    """The sum over all processes, as a new tensor."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def average(tensors: Iterable[Tensor]) -> None:
    """Average over all processes, in place, in one message."""
    if not dist.is_initialized():
        return
    parts = list(tensors)
    flat = torch.cat([t.detach().flatten().float() for t in parts])
    dist.all_reduce(flat)
    flat /= world()
    for tensor, part in zip(parts, flat.split([t.numel() for t in parts]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))
