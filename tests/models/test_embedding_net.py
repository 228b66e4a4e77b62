import pytest
import torch
from torch import nn

from mas_embed import EmbeddingNet, UserError, small_conv


def test_embeddings_are_the_head_of_the_trunk_scaled_to_unit_length():
    trunk, head = nn.Linear(3, 4), nn.Linear(4, 2)
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    expected = head(trunk(inputs))
    free, scaled = (EmbeddingNet(trunk, head, is_normalized=is_normalized) for is_normalized in (False, True))
    assert torch.equal(free(inputs), expected)
    assert torch.equal(scaled.unnormalized(inputs), expected)
    torch.testing.assert_close(scaled(inputs), expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("side", [8, 19, 32])
def test_small_conv_embeds_images_of_any_size_with_one_number_of_parameters(side):
    model = small_conv(embedding_size=5, channels=3, width=2)
    assert model(torch.zeros(2, 3, side, side)).shape == (2, 5)
    convolutions = 2 * (3 * 9 + 1) + 4 * (2 * 9 + 1)
    linear_layers = 8 * (4 * 16 + 1) + 5 * (8 + 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == convolutions + linear_layers


def test_sizes_below_one():
    for option in ("embedding_size", "channels", "width"):
        with pytest.raises(UserError, match=f"{option} must be a whole number >= 1, got 0"):
            small_conv(**{option: 0})


def test_sizes_that_no_memory_holds():
    for option in ("embedding_size", "channels", "width"):
        with pytest.raises(UserError, match=f"{option} must be at most 2147483648, got 100000000000000000000000$"):
            small_conv(**{option: 10**23})
