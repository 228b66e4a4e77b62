"""Training in several processes: which items each of them learns, and what is checked so that they learn as one process would.

Every process draws the same order of the items and takes its share of every batch. Embeddings and labels are gathered, so that
every process computes the miner and the loss of the whole batch, and gradients are averaged.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from itertools import islice
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from mas_embed.data import Split
from mas_embed.errors import RunError, UserError, reason_of
from mas_embed.methods import Method
from mas_embed.runtime.distributed import (
    cat_over_processes,
    check_same,
    gather_numbers,
    gather_objects,
    launched_processes,
    meet,
    num_processes,
    process_rank,
    share_of,
    shared_batch,
    size_of_whole_batch,
    take_from_first,
)
from mas_embed.runtime.fingerprint import fingerprint_of
from mas_embed.runtime.seeding import seeded
from mas_embed.runtime.sharding import is_sharded
from mas_embed.training.recipe import Recipe

_CONVERTIBLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # by `nn.SyncBatchNorm`

TIMEOUT = timedelta(minutes=30)  # that a process waits for the others


def make_accelerator(recipe: Recipe | None = None) -> Accelerator:
    """The accelerator of a training: what `accelerate` finds, with the precision of the recipe and its accumulated batches.

    Raises:
        UserError: the precision does not exist on this device.
    """
    precision = recipe.precision if recipe is not None else None
    _forget_precision(precision)
    try:
        accelerator = Accelerator(
            cpu=launched_processes() > 1 and not torch.accelerator.is_available(),  # `torchrun` does not say it
            gradient_accumulation_steps=1 if recipe is None else recipe.accumulate,
            mixed_precision=precision,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)],
        )
    except ValueError as error:
        raise UserError(f"precision '{precision}' does not work here: {reason_of(error)}") from None
    AcceleratorState._shared_state[_BY_RECIPE] = precision is not None
    return accelerator


_BY_RECIPE = "mas_embed_precision_is_of_a_recipe"


def _forget_precision(precision: str | None) -> None:
    """Lets the next accelerator have another precision than the last, which `accelerate` stores for the whole process."""
    stored = AcceleratorState._shared_state
    if stored and (stored.get(_BY_RECIPE) or precision not in (None, stored.get("_mixed_precision"))):
        AcceleratorState._reset_state(reset_partial_state=False)


def prepare_model(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model on the accelerator's device and in its precision; every process starts with the weights of the first one.

    It is not wrapped for several processes: `average_gradients` does what `DistributedDataParallel` would do, also where
    parameters are not used by every batch, or are frozen in some splits.
    """
    prepared: nn.Module = accelerator.prepare_model(model, evaluation_mode=num_processes() > 1)
    take_from_first([*model.parameters(), *model.buffers()])
    return prepared


# What is checked before training


def check_processes(accelerator: Accelerator, model: nn.Module, method: Method, recipe: Recipe) -> None:
    """Raises `UserError` for what several processes could not train exactly as one does; they must work together."""
    numbers = (launched_processes(), num_processes(), accelerator.num_processes)
    if len(set(numbers)) > 1 and max(numbers) > 1:
        raise UserError(
            f"{numbers[0]} processes were launched, the torch.distributed group has {numbers[1]}, and the accelerator knows of "
            f"{numbers[2]}; start them with `accelerate launch` or `torchrun`, and let Accelerator() make the group"
        )
    if any(map(is_sharded, model.parameters())):
        raise UserError(
            "train_sequence does not train a model that is sharded over processes; leave out fully_shard, or call the hooks of "
            "the method in a loop of your own"
        )
    if num_processes() == 1:
        return
    meet()
    if recipe.batch_size % num_processes():
        raise UserError(
            f"batch_size is the number of items of a batch of all processes, and {recipe.batch_size} cannot be divided by "
            f"{num_processes()} processes; take a multiple of {num_processes()}"
        )
    if not method.is_exact_in_processes:
        raise UserError(
            f"{method.name} adds to the batches in training ({', '.join(sorted(method.batch_hooks))}) and does not say that it "
            "does so in several processes as in one; start one process, or see Method.is_exact_in_processes"
        )
    _check_batch_norm(model, accelerator.device)


def check_same_data(splits: Sequence[Split], *, seed: int) -> None:
    """Raises `UserError` if the processes hold other splits or another seed."""
    if num_processes() > 1:
        digest = hashlib.sha256(repr((seed, [split.name for split in splits])).encode(errors="surrogatepass"))
        for split in splits:
            for part in (split.train, split.query, split.gallery):
                digest.update(part.labels.cpu().numpy().tobytes())
        check_same(digest.hexdigest(), "the labels or the seed", "build the same splits in every process")


def check_same_weights(model: nn.Module, split: str) -> None:
    """Raises `RunError` if the models of the processes are no longer equal."""
    if num_processes() > 1 and len(set(gather_objects(fingerprint_of(model)))) > 1:
        raise RunError(
            f"after split '{split}' the models of the processes differ: a layer changes its weights or buffers by the items of "
            "its own process alone; train with one process, or without that layer"
        )


def _check_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Raises `UserError` for batch norms that would see the items of one process only; on GPUs torch can synchronize them."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    names = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and module.training]
    for module, mode in modes.items():
        module.training = mode
    convertible = (nn.SyncBatchNorm, *(_CONVERTIBLE if device.type == "cuda" else ()))
    names = [name for name in names if type(model.get_submodule(name)) not in convertible]
    if names:
        raise UserError(
            f"the batch norm '{names[0]}' would normalize by the items of one process alone"
            + (", because it is of a kind" if device.type == "cuda" else " on a CPU, because there it is a layer")
            + " that torch cannot synchronize; freeze it (frozen_batch_norm=True of a backbone), or start one process"
        )


# What a process learns


def shared_loader(loader: DataLoader[Any], accelerator: Accelerator) -> Any:
    """Batches of the process's share of the inputs and the labels of the whole batch, on the accelerator's device.

    In one process these are the batches of the loader.
    """
    if num_processes() == 1:
        prepared = accelerator.prepare_data_loader(loader)
        accelerator._dataloaders.remove(prepared)  # where those of every split would stay in memory
        return prepared
    share: DataLoader[Any] = DataLoader(
        _SharedItems(loader.dataset, process_rank(), num_processes()),
        batch_sampler=loader.batch_sampler,
        num_workers=loader.num_workers,
        generator=loader.generator,
        worker_init_fn=loader.worker_init_fn,
        collate_fn=cast(Any, _collated_share),
    )
    # The share is taken already, so that accelerate, which would cut or repeat items, has nothing to divide
    return prepare_data_loader(
        share, accelerator.device, num_processes=1, process_index=0, put_on_device=accelerator.device_placement
    )


class _SharedItems(Dataset[Any]):
    """The items of a batch that one process learns, and the labels of all."""

    def __init__(self, items: Any, rank: int, num_processes: int) -> None:
        self.items, self.rank, self.num_processes = items, rank, num_processes

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: Sequence[Any]) -> tuple[list[Any], Tensor]:
        own = indices[share_of(len(indices), self.rank, self.num_processes)]
        own = own or indices[:1]  # of a batch with fewer items than processes: a model cannot embed nothing
        positions = [index[0] if isinstance(index, tuple) else index for index in indices]
        has_batches = hasattr(self.items, "__getitems__")
        items = self.items.__getitems__(own) if has_batches else [self.items[index] for index in own]
        return items, self.items.labels[positions]


def _collated_share(share: tuple[list[Any], Tensor]) -> tuple[Any, Tensor]:
    items, labels = share
    return default_collate(items)[0], labels


@contextmanager
def own_batch(batch: tuple[Any, Tensor]) -> Iterator[tuple[Any, Tensor]]:
    """The inputs and labels of a process, from a batch of `shared_loader`; in the body, they are a share of the whole batch."""
    inputs, labels = batch
    if num_processes() == 1:
        yield inputs, labels
        return
    with shared_batch(len(labels)):
        yield inputs, labels[share_of(len(labels), process_rank(), num_processes())]


def own_random_numbers(step: int) -> AbstractContextManager[None]:
    """In the body, every process draws other random numbers, as for dropout; afterwards all go on alike.

    In one process the numbers are those of the global generators.
    """
    if num_processes() == 1:
        return nullcontext()
    return seeded(torch.initial_seed(), step, process_rank())


def whole_batch(embeddings: Tensor, labels: Tensor, num_own: int) -> tuple[Tensor, Tensor]:
    """The embeddings and labels of all processes: those of the batch in its order, then those that the method has added.

    Args:
        embeddings: [n, D] of this process, first those of its `num_own` items of the batch.
        labels: [n].
        num_own: the number of items that are not added.
    """
    if num_processes() == 1:
        return embeddings, labels
    sizes = gather_numbers(len(labels))
    embeddings, labels = (cat_over_processes(rows, sizes) for rows in (embeddings, labels))
    num_items = size_of_whole_batch(num_own)
    shares = [share_of(num_items, rank, len(sizes)) for rank in range(len(sizes))]
    is_added = torch.cat(
        [torch.arange(size) >= share.stop - share.start for size, share in zip(sizes, shares, strict=True)]
    )
    order = is_added.int().argsort(stable=True).to(labels.device)
    return embeddings[order], labels[order]


def share_of_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """Whole batches, every n-th in each of n processes; those of the others are not loaded."""
    if num_processes() == 1:
        return batches
    if not isinstance(batches, DataLoader):
        return list(islice(batches, process_rank(), None, num_processes()))
    return DataLoader(
        batches.dataset,
        batch_sampler=_EveryNthBatch(batches.batch_sampler, process_rank(), num_processes()),
        num_workers=batches.num_workers,
        generator=batches.generator,
        worker_init_fn=batches.worker_init_fn,
    )


class _EveryNthBatch(Sampler[list[Any]]):
    def __init__(self, batches: Any, rank: int, num_processes: int) -> None:
        self.batches, self.rank, self.num_processes = batches, rank, num_processes

    def __len__(self) -> int:
        return len(range(self.rank, len(self.batches), self.num_processes))

    def __iter__(self) -> Iterator[list[Any]]:
        return islice(iter(self.batches), self.rank, None, self.num_processes)


def take_loss_from_first(loss: object) -> None:
    """Gives the loss of every process the proxies and whatever else the first one's loss has."""
    if isinstance(loss, nn.Module):
        take_from_first([*loss.parameters(), *loss.buffers()])


@contextmanager
def synchronized_batch_norm(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Lets batch norms normalize by the items of all processes in the body of the `with` statement, which only GPUs can."""
    if num_processes() == 1 or device.type != "cuda":
        yield
        return
    before = [
        (parent, name, child)
        for parent in list(model.modules())
        for name, child in parent.named_children()
        if type(child) in _CONVERTIBLE
    ]
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    try:
        yield
    finally:
        for parent, name, child in before:
            child.training = getattr(parent, name).training
            setattr(parent, name, child)
