"""Embeds a data set with a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from mas_embed.errors import UserError, reason_of
from mas_embed.runtime.atomic_files import atomic_file
from mas_embed.runtime.checks import as_whole_number
from mas_embed.runtime.forward import Embed, batch_to, check_batches, device_of, embed_batch
from mas_embed.runtime.modes import eval_mode
from mas_embed.runtime.progress import with_progress


@torch.no_grad()
def embed(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    embed: Embed | str | None = None,
    out: Tensor | NDArray[Any] | str | Path | None = None,
    num_items: int | None = None,
    progress: bool = False,
) -> Tensor:
    """The embeddings [N, D] of all batches, in order, on the CPU; computed in eval mode and without gradients.

    If N is known, from `num_items` or from a `DataLoader` over a data set with a length, the result is allocated once and
    every batch is copied into it. Otherwise all batches are collected and then concatenated, which takes twice the memory.

    Args:
        model: the embedding model; its train or eval mode is restored afterwards.
        batches: see `estimate_importance`.
        embed: a replacement for `model(input)`, see `estimate_importance`.
        out: the destination of the embeddings, instead of a new tensor. A tensor (on any device) or an array [N, D] is
            filled in place and keeps its dtype; after an error it may be partly filled. If `out` is a path, a `.npy` file is
            written batch by batch, with bfloat16 as float32 because the format has no bfloat16. The file appears under
            its name only when it is complete, so an error leaves an existing file unchanged.
        num_items: N, if it is known; the number of embeddings is checked against it.
        progress: show a progress bar.

    Returns:
        The embeddings [N, D]: a tensor on the CPU in the model's dtype; or `out` as a tensor; or, if `out` is a path, the
        file mapped into memory, whose rows are read on access. Changes to a mapped tensor are not written to the file.

    Raises:
        UserError: `batches` is empty; embeddings do not have the shape [N, D], or batches differ in D or dtype; the number of
            items is not the expected one; `out` has the wrong shape; or its folder does not exist.

    Examples:
        >>> embed(torch.nn.Linear(3, 2), torch.zeros(5, 3).split(2)).shape
        torch.Size([5, 2])
    """
    device = device_of(model)
    check_batches(batches)
    num_items = None if num_items is None else as_whole_number("num_items", num_items, 0, 2**48)
    expected = _num_items_of(batches) if num_items is None else num_items
    destination = None if out is None or isinstance(out, str | Path) else _as_destination(out)
    with eval_mode(model):
        embedded = _with_equal_size_and_dtype(
            _embed_numbered(model, index, batch_to(batch, device), embed)
            for index, batch in enumerate(with_progress(batches, "embedding" if progress else None))
        )
        if isinstance(out, str | Path):
            return _write_npy(embedded, Path(out), expected)
        if destination is not None:
            return _fill_given(embedded, destination, num_items)
        return _concatenated(embedded) if expected is None else _fill_new(embedded, expected)


def _embed_numbered(model: nn.Module, index: int, batch: Any, embed: Embed | str | None) -> Tensor:
    """The embeddings of a batch; an error names its index."""
    try:
        return embed_batch(model, batch, embed)
    except UserError as error:
        raise UserError(f"batch {index}: {error}") from error.__cause__


def _as_destination(out: object) -> Tensor:
    """The tensor or array to fill as a tensor that shares its memory; raises `UserError` if it cannot be written."""
    if (
        isinstance(out, np.ndarray) and not out.flags.writeable
    ):  # writing into a read-only file map would end the process
        raise UserError("out is a read-only array; pass one that can be written, such as np.load(..., mmap_mode='r+')")
    try:
        destination = torch.as_tensor(out) if isinstance(out, Tensor | np.ndarray) else None
    except (TypeError, ValueError) as error:
        raise UserError(f"out must be an array of floating-point numbers: {reason_of(error)}") from None
    if destination is None or not destination.is_floating_point() or destination.ndim == 0:
        got = type(out).__name__ if destination is None else f"{destination.dtype} of shape {list(destination.shape)}"
        raise UserError(f"out must be a path, or a floating-point tensor or array [N, D], got {got}")
    return destination


def _with_equal_size_and_dtype(embedded: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same blocks; raises `UserError` if a block differs from the first in D or dtype, or if there is no block."""
    expected = None
    for block in embedded:
        size_and_dtype = f"D = {block.shape[1]} in {block.dtype}"
        expected = expected or size_and_dtype
        if size_and_dtype != expected:
            raise UserError(
                f"the embeddings of all batches must have one size and dtype, got {expected} and then {size_and_dtype}"
            )
        yield block
    if expected is None:
        raise UserError("there is nothing to embed: batches is empty")


def _concatenated(embedded: Iterator[Tensor]) -> Tensor:
    return torch.cat([block.cpu() for block in embedded])


def _fill_new(embedded: Iterator[Tensor], num_items: int) -> Tensor:
    first = next(embedded)
    return _fill(torch.empty(num_items, first.shape[1], dtype=first.dtype), chain([first], embedded))


def _fill_given(embedded: Iterator[Tensor], out: Tensor, num_items: int | None) -> Tensor:
    first = next(embedded)
    expected_shape = [len(out) if num_items is None else num_items, first.shape[1]]
    if list(out.shape) != expected_shape:
        raise UserError(f"out must have shape {expected_shape}, got {list(out.shape)}")
    return _fill(out, chain([first], embedded))


def _fill(out: Tensor, embedded: Iterable[Tensor]) -> Tensor:
    """Copies the blocks into `out` [N, D] and returns it; raises `UserError` if they do not have N rows together."""
    num_filled = 0
    for block in embedded:
        if num_filled + len(block) > len(out):
            _check_count(f"at least {num_filled + len(block)}", len(out))
        out[num_filled : num_filled + len(block)] = block
        num_filled += len(block)
    _check_count(num_filled, len(out))
    return out


def _write_npy(embedded: Iterator[Tensor], path: Path, num_items: int | None) -> Tensor:
    """Writes the embeddings block by block to a `.npy` file, renames it when it is complete, and returns it mapped."""
    with atomic_file(path) as file:
        _check_count(_write_blocks(file, embedded), num_items)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _write_blocks(file: BinaryIO, embedded: Iterator[Tensor]) -> int:
    """Writes the header and the rows, and returns the number of rows.

    The number of rows, which is part of the header, is known only at the end. The header is therefore overwritten then.
    """
    num_rows, header_size = 0, 0
    for block in embedded:
        rows = (block.float() if block.dtype == torch.bfloat16 else block).cpu().contiguous().numpy()
        if not header_size:
            _write_header(file, rows, 0)
            header_size = file.tell()
        file.write(rows.data)
        num_rows += len(rows)
    file.seek(0)
    _write_header(file, rows, num_rows)
    if file.tell() != header_size:  # NumPy pads the header so that a larger number of rows fits
        raise RuntimeError("the second header of the .npy file differs in length from the first")
    return num_rows


def _write_header(file: BinaryIO, rows: NDArray[Any], num_rows: int) -> None:
    description = {"descr": rows.dtype.str, "fortran_order": False, "shape": (num_rows, rows.shape[1])}
    write_array_header_1_0(file, description)


def _check_count(num_embedded: int | str, num_items: int | None) -> None:
    """Raises `UserError` if a number of items is expected and another number was embedded."""
    if num_items not in (None, num_embedded):
        raise UserError(
            f"{num_items} items were expected but {num_embedded} were embedded; pass the right number as num_items"
        )


def _num_items_of(batches: Iterable[Any]) -> int | None:
    """The number of items that a `DataLoader` yields, if it batches a sampler of known length; otherwise None."""
    if not isinstance(batches, DataLoader) or type(batches.batch_sampler) is not BatchSampler:
        return None
    batch_sampler = batches.batch_sampler
    try:
        num_items = len(batch_sampler.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return num_items - num_items % batch_sampler.batch_size if batch_sampler.drop_last else num_items
