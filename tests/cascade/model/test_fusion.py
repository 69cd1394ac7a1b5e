"""Fusion: one folded map a mode, the same as projecting the concatenated blocks."""

import pytest
import torch
from torch import Tensor

from cascade.model.fusion import Fusion, SlotBias, fold

F, DIM, K = 6, 4, 3


@pytest.fixture
def blocks() -> Tensor:
    """Features of the dispatcher and of three experts, for five images: [4, 5, 6]."""
    return torch.randn(K + 1, 5, F, generator=torch.Generator().manual_seed(0))


def folded(slots: int) -> tuple[Tensor, Tensor, Fusion]:
    """A projection that float16 can hold exactly, and its fold."""
    generator = torch.Generator().manual_seed(slots)
    basis = torch.randint(-64, 64, (slots * F, DIM), generator=generator).double() / 32
    mean = torch.randn(slots * F, generator=generator).double()
    return mean, basis, fold(mean, basis, slots)


def project(fusion: Fusion, blocks: Tensor, experts: list[int]) -> Tensor:
    out = fusion.embed(blocks[0])
    for expert in experts:
        out = out + fusion.project(blocks[expert + 1], expert)
    return out


def test_layout() -> None:
    _, _, fusion = folded(2)
    assert (fusion.weight.dtype, fusion.weight.shape) == (torch.float16, (2, F, DIM))
    assert (fusion.bias.dtype, fusion.bias.shape) == (torch.float32, (DIM,))


def test_dispatcher_is_the_first_block_alone(blocks: Tensor) -> None:
    mean, basis, fusion = folded(1)
    want = (blocks[0].double() - mean) @ basis
    torch.testing.assert_close(project(fusion, blocks, []).double(), want, rtol=1e-5, atol=1e-5)


def test_unconditional_is_all_blocks(blocks: Tensor) -> None:
    mean, basis, fusion = folded(K + 1)
    want = (torch.cat(list(blocks), dim=1).double() - mean) @ basis
    torch.testing.assert_close(project(fusion, blocks, [0, 1, 2]).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("expert", range(K))
def test_padded_slots_are_blocks_of_zeros(blocks: Tensor, expert: int) -> None:
    """The paper's conditional embedding: the other experts' blocks are zero, and are centered like all."""
    mean, basis, fusion = folded(K + 1)
    padded = torch.zeros(5, (K + 1) * F).double()
    padded[:, :F] = blocks[0]
    padded[:, (expert + 1) * F : (expert + 2) * F] = blocks[expert + 1]
    want = (padded - mean) @ basis
    torch.testing.assert_close(project(fusion, blocks, [expert]).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("expert", range(K))
def test_one_slot_is_shared_by_all_experts(blocks: Tensor, expert: int) -> None:
    mean, basis, fusion = folded(2)
    want = (torch.cat([blocks[0], blocks[expert + 1]], dim=1).double() - mean) @ basis
    torch.testing.assert_close(project(fusion, blocks, [expert]).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("expert", range(K))
def test_each_slot_may_have_a_bias(blocks: Tensor, expert: int) -> None:
    """It is added with its block only."""
    _, _, fusion = folded(K + 1)
    biases = torch.arange(4.0 * DIM).view(K + 1, DIM)
    plain = project(Fusion(fusion.weight, torch.zeros(DIM)), blocks, [expert])
    found = project(SlotBias(fusion.weight, biases), blocks, [expert])
    torch.testing.assert_close(found, plain + biases[0] + biases[expert + 1])


def test_the_mean_lands_on_zero_whatever_float16_rounds_away() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, basis = torch.rand(2 * F, generator=generator) * 9, torch.randn(2 * F, DIM, generator=generator) / 3
    fusion = fold(mean, basis, 2)
    at_mean = project(fusion, torch.stack([mean[:F], mean[F:]])[:, None], [0])
    torch.testing.assert_close(at_mean, torch.zeros(1, DIM), rtol=0, atol=1e-5)
