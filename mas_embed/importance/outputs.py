"""The outputs: scalars per sample whose gradients with respect to the parameters define the importance.

Every output maps the embeddings [N, D] of a batch to values [N, K]: K scalars per sample, each of which is differentiated
separately. N samples, D embedding size, K scalars.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mas_embed.errors import UserError, unknown_name
from mas_embed.runtime.checks import as_whole_number, check_at_least, shown
from mas_embed.runtime.seeding import LARGEST_SEED


class Output(Protocol):
    """K scalars per sample; the importance is the sum or the mean of their K absolute gradients (`reduction`)."""

    @property
    def name(self) -> str: ...
    @property
    def reduction(self) -> Literal["sum", "mean"]: ...
    def values(self, embeddings: Tensor, batch: Any) -> Tensor:
        """The scalars [N, K] of the embeddings [N, D] of a batch."""
        ...


@dataclass(frozen=True)
class SquaredNorm:
    """`||F(x)||_2^2`, the output of Memory Aware Synapses (Aljundi et al., ECCV 2018). K = 1."""

    name: str = "squared_norm"
    reduction: Literal["sum"] = "sum"

    def values(self, embeddings: Tensor, batch: Any) -> Tensor:
        return embeddings.square().sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Vector:
    """Each unit of the embedding, `sum_c |dF_c/dtheta|`: the paper's vector variant. K = D backward passes."""

    name: str = "vector"
    reduction: Literal["sum"] = "sum"

    def values(self, embeddings: Tensor, batch: Any) -> Tensor:
        return embeddings


@dataclass(frozen=True)
class Projection:
    """`<v, z(x)>`, averaged over K directions v, where z is the embedding scaled to unit length.

    It measures changes of the direction of an embedding only. The directions v are random and orthonormal (in blocks of D if
    K > D). They are drawn from `seed` and are the same for all samples, so that the estimate depends neither on the batch
    size nor on the order of the samples, and merging shards is exact. An all-zero embedding has no direction; its value is
    zero.

    Args:
        num_directions: K >= 1, which is also the number of backward passes per batch.
        seed: of the random generator that draws the directions.

    Raises:
        UserError: `num_directions` is not a whole number >= 1, or `seed` is none from 0 to 2^63 - 1.
    """

    num_directions: int = 8
    seed: int = 0
    reduction: Literal["mean"] = "mean"

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_directions", as_whole_number("num_directions", self.num_directions))
        object.__setattr__(self, "seed", as_whole_number("seed", self.seed, 0, LARGEST_SEED))
        check_at_least("num_directions", self.num_directions, 1)

    @property
    def name(self) -> str:
        return f"projection(num_directions={self.num_directions}, seed={self.seed})"

    def values(self, embeddings: Tensor, batch: Any) -> Tensor:
        norms = embeddings.norm(dim=1, keepdim=True)
        # The gradient of a norm at zero is not defined: all-zero rows are divided by one instead, and their values set to zero.
        is_zero = (norms == 0).detach()
        directions_KD = _directions(self.num_directions, embeddings.shape[1], self.seed).to(embeddings)
        unit_ND = embeddings / torch.where(is_zero, torch.ones_like(norms), norms)
        return (unit_ND @ directions_KD.T) * (~is_zero)


@lru_cache(maxsize=8)
def _directions(num_directions: int, size: int, seed: int) -> Tensor:
    """Orthonormal rows [K, D] in blocks of D. They are cached because random numbers cannot be drawn inside `vmap`."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for start in range(0, num_directions, size):
        gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        blocks.append(torch.linalg.qr(gaussian).Q.T[: num_directions - start])
    return torch.cat(blocks)


@dataclass(frozen=True)
class Custom:
    """A user's `function(embeddings [N, D], batch) -> Tensor [N]`, whose entry n must depend on sample n only. K = 1."""

    function: Callable[[Tensor, Any], Tensor]
    reduction: Literal["sum"] = "sum"

    @property
    def name(self) -> str:
        return f"custom({getattr(self.function, '__name__', type(self.function).__name__)})"

    def values(self, embeddings: Tensor, batch: Any) -> Tensor:
        values = self.function(embeddings, batch)
        shape = values.shape if isinstance(values, Tensor) else None
        if shape != embeddings.shape[:1]:
            got = type(values).__name__ if shape is None else list(shape)
            raise UserError(f"output must return one value per sample, shape {list(embeddings.shape[:1])}, got {got}")
        return values.unsqueeze(1)


OUTPUTS: dict[str, type[SquaredNorm | Vector | Projection]] = {
    "squared_norm": SquaredNorm,
    "vector": Vector,
    "projection": Projection,
}


def resolve_output(output: str | Output | Callable[[Tensor, Any], Tensor]) -> Output:
    """The `Output` for a name or a callable; an `Output` is returned as it is.

    Raises:
        UserError: `output` is an unknown name, or none of the three.
    """
    if isinstance(output, str):
        if output not in OUTPUTS:
            raise unknown_name("output", output, OUTPUTS)
        return OUTPUTS[output]()
    is_output = all(hasattr(output, name) for name in ("name", "reduction", "values"))
    if isinstance(output, type) or not (callable(output) or is_output):
        names = ", ".join(OUTPUTS)
        raise UserError(
            f"output must be one of {names}, an output such as Projection(), or a callable, got {shown(output)}"
        )
    return output if is_output else Custom(output)  # type: ignore[return-value, arg-type]
