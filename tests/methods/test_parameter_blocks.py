import pytest
import torch

from mas_embed.methods import parameter_blocks as blocks
from mas_embed.methods.parameter_blocks import in_blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "CPU_BLOCK", 10)


def test_every_element_is_in_one_block_and_blocks_are_small():
    shapes = [(3,), (), (4, 2, 3), (0,), (30, 1), (2, 25)]
    tensors = [torch.zeros(shape) for shape in shapes]
    sizes = []
    for ones, others in in_blocks([(tensor, tensor) for tensor in tensors]):
        torch._foreach_add_(ones, 1)
        assert [one.data_ptr() for one in ones] == [other.data_ptr() for other in others]
        sizes.append(sum(one.numel() for one in ones))
    assert all((tensor == 1).all() for tensor in tensors)
    assert max(sizes) == 25  # a single row of the last is not cut
    assert sum(sizes) == sum(tensor.numel() for tensor in tensors)
    assert sorted(sizes)[-3] <= 10


def test_tensors_of_different_memory_formats():
    one = torch.zeros(8, 3, 2, 2).to(memory_format=torch.channels_last)
    other = torch.arange(96.0).view(8, 3, 2, 2)
    for ones, others in in_blocks([(one, other)]):
        torch._foreach_add_(ones, others)
    assert torch.equal(one, other)


def test_no_tensors_give_no_blocks():
    assert list(in_blocks([])) == []
