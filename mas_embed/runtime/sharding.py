"""Tensors that processes hold in shards (`DTensor`), as the parameters of a model after `fully_shard` are."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a shard of the tensor only."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Any) -> Any:
    """The whole tensor, in every process, which all must call this for; a tensor that is not sharded as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_shard(tensor: Any) -> Any:
    """The shard of this process, which shares the tensor's memory; a tensor that is not sharded as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def sharded_like(tensor: Tensor, other: Any) -> Tensor:
    """A copy of a whole tensor on the device of another one, and sharded as that is."""
    if not is_sharded(other):
        return tensor.to(other.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole(tensor).to(other.device, copy=True), other.device_mesh, other.placements)
