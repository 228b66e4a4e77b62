"""Processes that train one model together: what a `torch.distributed` group adds up, gathers and compares.

Sums over processes are taken wherever there is a group. Everything else happens only inside `together()`, where every process
is known to run the same code: elsewhere a process of a group may well be alone, as where the first one evaluates.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, distributed

from mas_embed.errors import RunError, UserError, reason_of

P = ParamSpec("P")
T = TypeVar("T")

_TOGETHER: ContextVar[bool] = ContextVar("processes work together", default=False)
_BATCH_SIZE: ContextVar[int | None] = ContextVar("the size of the batch that all processes share", default=None)


def launched_rank() -> int:
    """The rank that a launcher such as `accelerate launch` or `torchrun` gave to this process; 0 without a launcher."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdecimal() else 0


def launched_processes() -> int:
    """The number of processes that a launcher has started; 1 without a launcher."""
    number = os.environ.get("WORLD_SIZE", "")
    return int(number) if number.isdecimal() else 1


def has_group() -> bool:
    """Whether there is a `torch.distributed` group of several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def process_rank() -> int:
    """The rank of this process in the default group; 0 without a group."""
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def num_processes() -> int:
    """The number of processes that work together, see `together`; 1 elsewhere."""
    return distributed.get_world_size() if _TOGETHER.get() and has_group() else 1


def share_of(num_items: int, rank: int, num_processes: int) -> slice:
    """The items of a process, where the items are divided evenly and in order; the first processes have one more.

    >>> [list(range(5))[share_of(5, rank, 2)] for rank in range(2)]
    [[0, 1, 2], [3, 4]]
    """
    size, remainder = divmod(num_items, num_processes)
    start = rank * size + min(rank, remainder)
    return slice(start, start + size + (rank < remainder))


def sum_over_processes(sums: Mapping[str, Tensor], num_samples: int) -> int:
    """Adds up `sums` in place over all processes of the default group; returns the number of samples of all processes.

    Without a group, nothing changes and `num_samples` is returned. Every process of a group must call this function; a
    process without samples passes zeros.
    """
    if not has_group():
        return num_samples
    count = torch.tensor(num_samples, device=_device())
    for tensor in (count, *sums.values()):
        distributed.all_reduce(tensor)
    return int(count)


@contextmanager
def shared_batch(num_items: int) -> Iterator[None]:
    """In the body of the `with` statement, every process has its share of one batch with this number of items."""
    token = _BATCH_SIZE.set(num_items if num_processes() > 1 else None)
    try:
        yield
    finally:
        _BATCH_SIZE.reset(token)


def is_batch_shared() -> bool:
    """Whether the batch of this process is a share of a larger one, see `shared_batch`."""
    return _BATCH_SIZE.get() is not None


def size_of_whole_batch(num_items: int) -> int:
    """The size of the batch that processes share, of which this process has `num_items`; that number if it is not shared."""
    whole = _BATCH_SIZE.get()
    return num_items if whole is None else whole


def own_share(num_items: int) -> slice:
    """Which of some items, that all processes have chosen alike for a shared batch, this process adds to its share."""
    return share_of(num_items, process_rank(), num_processes()) if is_batch_shared() else slice(0, num_items)


def rows_of_whole_batch(rows: Tensor) -> Tensor:
    """The rows [N, ...] of a shared batch from the shares [n, ...] of the processes, in the order of their ranks.

    The numbers n may differ. The gradient of a loss that every process computes from all rows reaches each process's model by
    its own rows, multiplied by the number of processes: averaged over processes, the gradients of the parameters are those of
    the loss. Without a shared batch, the rows are returned as they are.
    """
    return cat_over_processes(rows) if is_batch_shared() else rows


def cat_over_processes(rows: Tensor, sizes: list[int] | None = None) -> Tensor:
    """The rows [n, ...] of all processes that work together, [N, ...]; see `rows_of_whole_batch` for gradients.

    Args:
        rows: of this process.
        sizes: the numbers of rows of all processes; None if they are not known.
    """
    if num_processes() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, gather_numbers(len(rows)) if sizes is None else sizes)
    return gathered


def gather_numbers(number: int) -> list[int]:
    """The whole number of every process, in the order of their ranks."""
    if num_processes() == 1:
        return [number]
    numbers = [torch.empty(1, dtype=torch.long, device=_device()) for _ in range(num_processes())]
    distributed.all_gather(numbers, torch.tensor([int(number)], device=_device()))
    return [int(value) for value in torch.cat(numbers).tolist()]


class _Gather(torch.autograd.Function):
    """Concatenates the rows of all processes, given their numbers; the gradient is explained in `rows_of_whole_batch`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int]) -> Tensor:
        start = sum(sizes[: process_rank()])
        ctx.own, ctx.num_processes = slice(start, start + len(rows)), len(sizes)
        place, most = rows.device, max(sizes)
        padded = rows.new_zeros(most, *rows.shape[1:], device=_device())
        padded[: len(rows)] = rows
        gathered = [torch.empty_like(padded) for _ in sizes]
        distributed.all_gather(gathered, padded)
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]).to(place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.own] * ctx.num_processes, None


def average_gradients(parameters: Sequence[Tensor], bucket_bytes: int = 2**25) -> None:
    """Replaces every `.grad` by its mean over the processes that work together, in buckets of one dtype.

    A parameter without a gradient in one process and with one in another counts as zero there. Gradients of parameters that are
    sharded (DTensor) are averaged by what has sharded them, and are left alone.
    """
    if num_processes() == 1:
        return
    parameters = [parameter for parameter in parameters if not hasattr(parameter, "device_mesh")]
    has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters], device=_device()).int()
    distributed.all_reduce(has_gradient, distributed.ReduceOp.MAX)
    buckets: dict[torch.dtype, list[Tensor]] = {}
    for parameter, is_used in zip(parameters, has_gradient.tolist(), strict=True):
        if is_used:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = gradient.to_dense() if gradient.is_sparse else gradient
            bucket = buckets.setdefault(gradient.dtype, [])
            bucket.append(parameter.grad)
            if sum(one.numel() * one.element_size() for one in bucket) >= bucket_bytes:
                _average(buckets.pop(gradient.dtype))
    for bucket in buckets.values():
        _average(bucket)


@torch.no_grad()
def _average(tensors: Sequence[Tensor]) -> None:
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(_device())
    distributed.all_reduce(flat)
    flat /= num_processes()
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def take_from_first(tensors: Sequence[Tensor]) -> None:
    """Gives every process the values of the first one, in place."""
    if num_processes() == 1:
        return
    for tensor in tensors:
        values = tensor.detach().to(_device()).contiguous()
        distributed.broadcast(values, 0)
        tensor.copy_(values)


def gather_objects(value: T) -> list[T]:
    """A small value of every process, in the order of their ranks; only of processes that work together."""
    if num_processes() == 1:
        return [value]
    values: list[Any] = [None] * num_processes()
    distributed.all_gather_object(values, value)
    return values


def check_same(value: object, what: str, remedy: str) -> None:
    """Raises `UserError` unless a value is the same in all processes that work together; `what` names it in the plural."""
    values = gather_objects(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise UserError(f"{what} of process {rank} differ from those of process 0; {remedy}")


def on_first(function: Callable[[], T]) -> T:
    """What `function` returns in the first of the processes that work together, which alone calls it, in all of them.

    If it fails, all processes raise its error, that of the others marked for `is_error_of_first`.
    """
    if num_processes() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if process_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            distributed.broadcast_object_list([None, (isinstance(error, UserError), str(error))])
            raise
    distributed.broadcast_object_list(outcome)
    result, failure = outcome
    if failure is not None:
        told = (UserError if failure[0] else RunError)(failure[1])
        told.__dict__["mas_embed_error_of_first"] = True
        raise told
    return cast(T, result)


def first_then_others(function: Callable[[], T]) -> T:
    """Calls `function` in the first process and then, with what that has stored on disk, in the others; see `on_first`."""
    own: list[T] = []
    on_first(lambda: own.append(function()))
    return own[0] if own else function()


def is_error_of_first(error: BaseException, patience: float = 10.0) -> bool:
    """Whether the first process says in this other one's place what has failed.

    Args:
        error: that this process has raised.
        patience: the seconds within which the first process ends if it has failed for the same reason.
    """
    if launched_rank() == 0 or not has_group() or "mas_embed_error_of_first" in error.__dict__:
        return launched_rank() > 0  # before the processes have met, all fail for the same reason
    end = time.monotonic() + patience
    while 0 not in lost_processes() and time.monotonic() < end:
        time.sleep(0.05)
    return 0 in lost_processes()


def _device() -> torch.device:
    """The device whose tensors the group can exchange."""
    is_for_gpus = "nccl" in str(distributed.get_backend())
    return torch.device((is_for_gpus and torch.accelerator.current_accelerator()) or "cpu")


# When a process is lost


def together(function: Callable[P, T]) -> Callable[P, T]:
    """Lets `function`, which every process of the group calls alike, gather over processes.

    If it fails in one process because another one has ended, the error names that one.
    """

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        token = _TOGETHER.set(True)
        try:
            return function(*args, **kwargs)
        except (RunError, UserError):
            raise
        except RuntimeError as error:
            reason = reason_of_loss()
            if not reason:
                raise
            raise RunError(f"process {process_rank()} cannot go on{reason} ({reason_of(error, 100)})") from error
        finally:
            _TOGETHER.reset(token)

    return called


def reason_of_loss() -> str:
    """A clause that names the processes that are lost, as in ", because process 1 of 2 has ended"; empty if none is."""
    lost = lost_processes()
    named = f"process {lost[0]}" if len(lost) == 1 else f"processes {', '.join(map(str, lost))}"
    is_one = "has" if len(lost) == 1 else "have"
    return f", because {named} of {len(_PEERS)} {is_one} ended; look for what was said there last" if lost else ""


_PEERS: list[tuple[str, int]] = []  # host and process id of every process of the group, by rank


def meet() -> None:
    """Lets the processes that work together know of each other, so that one which is lost can be named."""
    if num_processes() > 1 and not _PEERS:
        _PEERS.extend(gather_objects((socket.gethostname(), os.getpid())))


def lost_processes() -> list[int]:
    """The ranks of the processes on this machine that have ended, of those that have met."""
    import psutil  # type: ignore[import-untyped]

    def is_gone(process_id: int) -> bool:
        try:
            return bool(psutil.Process(process_id).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    here = socket.gethostname()
    return [rank for rank, (host, process_id) in enumerate(_PEERS) if host == here and is_gone(process_id)]
