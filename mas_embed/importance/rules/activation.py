"""The rule of `nn.PReLU`, `y = max(x, 0) + w min(x, 0)`.

N samples, C channels (with one weight each, or one for all), L positions.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from mas_embed.importance.rules.memory import accumulation_dtype, sum_of_powers
from mas_embed.importance.rules.registry import rule


@rule(nn.PReLU, min_ndim=2)
def prelu(
    layer: nn.PReLU, input: Tensor, grad_output: Tensor, exponent: int, names: Collection[str]
) -> dict[str, Tensor]:
    """The per-sample gradient is `sum_l delta min(x, 0)`."""
    dtype = accumulation_dtype(grad_output)
    product = grad_output.to(dtype) * input.detach().to(dtype).clamp_max(0)
    shape = (len(input), layer.num_parameters, -1) if layer.num_parameters > 1 else (len(input), 1, -1)
    return {"weight": sum_of_powers(product.reshape(shape).sum(2), exponent)}
