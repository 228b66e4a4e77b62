"""Embedding a data set."""

from __future__ import annotations

import os
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

from mas_embed.errors import UserError
from mas_embed.runtime.forward import Embed, batch_to, device_of, embed_batch
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
    """The embeddings [N, D] of all batches in order, taken in eval mode without gradients, on the CPU.

    Every batch is copied to its place as soon as it is embedded. Where N is known (by `num_items`, or from a `DataLoader`
    over a data set with a length) the place is allocated once; where it is not, the batches are kept until the last and then
    joined, which takes twice the memory.

    Args:
        model: the embedding model; left in the mode in which it was.
        batches: see `estimate_importance`.
        embed: how to embed instead of `model(input)`: `(model, batch) -> Tensor [N, D]`, or the name of a method of the
            model.
        out: where to put the embeddings instead. A tensor (on any device) or an array [N, D] is filled, cast to its
            dtype; a failure leaves it filled in part. A path is written as `.npy`, batch by batch (bfloat16, which the
            format lacks, as float32), beside its place and then renamed: after a failure the file that was there before
            still is.
        num_items: N, which is then checked.
        progress: show a progress bar.

    Returns:
        [N, D] on the CPU in the model's dtype; or `out`; or, for a path, the file mapped into memory: rows are read when
        they are looked at, and what is written into the tensor does not reach the file.

    Raises:
        UserError: no batches; embeddings that are not [N, D], or not of one D and dtype; another number of items than
            expected; an `out` of another shape, or in a folder that does not exist.

    Example:
        >>> embed(torch.nn.Linear(3, 2), torch.zeros(5, 3).split(2)).shape
        torch.Size([5, 2])
    """
    device = device_of(model)
    expected = _known_size(batches) if num_items is None else num_items
    with eval_mode(model):
        embedded = _alike(
            embed_batch(model, batch_to(batch, device), embed)
            for batch in with_progress(batches, "embedding" if progress else None)
        )
        if isinstance(out, str | Path):
            return _write(embedded, Path(out), expected)
        if out is not None:
            return _fill_given(embedded, torch.as_tensor(out), num_items)
        return _join(embedded) if expected is None else _fill_new(embedded, expected)


def _alike(embedded: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same blocks; the first says which size and dtype the others have."""
    expected = None
    for block in embedded:
        kind = f"D = {block.shape[1]} in {block.dtype}"
        expected = expected or kind
        if kind != expected:
            raise UserError(f"all batches must be embedded in one size and dtype, got {expected} and then {kind}")
        yield block
    if expected is None:
        raise UserError("there is nothing to embed: batches is empty")


def _join(embedded: Iterator[Tensor]) -> Tensor:
    return torch.cat([block.cpu() for block in embedded])


def _fill_new(embedded: Iterator[Tensor], num_items: int) -> Tensor:
    first = next(embedded)
    return _fill(torch.empty(num_items, first.shape[1], dtype=first.dtype), chain([first], embedded))


def _fill_given(embedded: Iterator[Tensor], place: Tensor, num_items: int | None) -> Tensor:
    first = next(embedded)
    wanted = [len(place) if num_items is None else num_items, first.shape[1]]
    if list(place.shape) != wanted:
        raise UserError(f"out must have shape {wanted}, got {list(place.shape)}")
    return _fill(place, chain([first], embedded))


def _fill(place: Tensor, embedded: Iterable[Tensor]) -> Tensor:
    filled = 0
    for block in embedded:
        if filled + len(block) > len(place):
            _check_count(f"at least {filled + len(block)}", len(place))
        place[filled : filled + len(block)] = block
        filled += len(block)
    _check_count(filled, len(place))
    return place


def _write(embedded: Iterator[Tensor], path: Path, num_items: int | None) -> Tensor:
    """Streams the embeddings to a `.npy` file, which appears once it is whole, and maps it."""
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist; make it first, to write {path.name} there")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            written = _write_blocks(file, embedded)
            file.flush()
            os.fsync(file.fileno())
        _check_count(written, num_items)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _write_blocks(file: BinaryIO, embedded: Iterator[Tensor]) -> int:
    """Writes header and rows; returns how many rows. The header comes twice, as only the end tells their number."""
    num_rows, body = 0, 0
    for block in embedded:
        rows = (block.float() if block.dtype == torch.bfloat16 else block).cpu().contiguous().numpy()
        if not body:
            _write_header(file, rows, 0)
            body = file.tell()
        file.write(rows.data)
        num_rows += len(rows)
    file.seek(0)
    _write_header(file, rows, num_rows)
    if file.tell() != body:  # NumPy leaves room for a number of rows that grows
        raise RuntimeError("the header of a .npy file has changed its length")
    return num_rows


def _write_header(file: BinaryIO, rows: NDArray[Any], num_rows: int) -> None:
    description = {"descr": rows.dtype.str, "fortran_order": False, "shape": (num_rows, rows.shape[1])}
    write_array_header_1_0(file, description)


def _check_count(num_embedded: int | str, num_items: int | None) -> None:
    if num_items not in (None, num_embedded):
        raise UserError(
            f"{num_items} items were expected but {num_embedded} were embedded; pass their number as num_items"
        )


def _known_size(batches: Iterable[Any]) -> int | None:
    """How many items a `DataLoader` hands out, if it cuts a sampler of known length into batches; else None."""
    if not isinstance(batches, DataLoader) or type(batches.batch_sampler) is not BatchSampler:
        return None
    cut = batches.batch_sampler
    try:
        num_items = len(cut.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return num_items - num_items % cut.batch_size if cut.drop_last else num_items
