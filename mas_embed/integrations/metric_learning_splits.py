"""The trainers of pytorch-metric-learning on one split after another: scores of all splits, and the step to the next split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pytorch_metric_learning.losses import CrossBatchMemory
from torch import Tensor, nn
from torch.utils.data import BatchSampler

from mas_embed import Method, ScoreMatrix, UserError, evaluate_retrieval

Hook = Callable[[Any], Any]  # (trainer) -> anything; an `end_of_epoch_hook` that returns False stops the training
ReferenceSplits = Sequence[tuple[str, Sequence[str]]]
ONE_FORM = "wrap one loss with WithPenalty(loss, method), or pass gradient_clippers(method), and not both"


def score_hook(
    scores: ScoreMatrix,
    split_index: int,
    datasets: Mapping[str, Any],
    tester: Any,
    *,
    metric: str = "mean_average_precision",
    by: Literal["tester", "evaluate_retrieval"] = "tester",
    splits_to_eval: ReferenceSplits | None = None,
    collate_fn: Any = None,
    then: Hook | None = None,
) -> Hook:
    """A hook that writes the score of every data set into row `split_index` of a score matrix.

    Use it as `end_of_epoch_hook`; the scores of the last epoch remain. Or call it with the trainer after `consolidate`, which
    is necessary for methods that then change the model, such as IMM. The modes of the models and the random state of torch
    are unchanged afterwards.

    Args:
        scores: [S, S], whose row is overwritten; start with `ScoreMatrix(np.full((S, S), np.nan))`.
        split_index: the split that is being learned, 0 first.
        datasets: S data sets by name, in the order of the splits; more, if `splits_to_eval` names S of them.
        tester: a `GlobalEmbeddingSpaceTester`, which computes the embeddings.
        metric: a metric of the tester's accuracy calculator, or one of the `means` of `evaluate_retrieval`.
        by: "tester" runs `tester.test`, which also informs its `end_of_testing_hook`. "evaluate_retrieval" ranks the gallery by
            Euclidean distance, as the tester does by default.
        splits_to_eval: the S pairs (query split, reference splits), as for `tester.test`; by default, every data set is its
            own gallery. A query does not retrieve itself.
        collate_fn: for the tester's data loaders.
        then: a hook that is called afterwards, whose result is returned.

    Raises:
        UserError: the number of splits or the index do not suit the matrix; the tester has no such metric.
    """
    pairs = [(query, list(names)) for query, names in splits_to_eval or [(name, [name]) for name in datasets]]
    if len(pairs) != scores.scores.shape[1] or not 0 <= split_index < len(scores.scores):
        shape = list(scores.scores.shape)
        raise UserError(f"scores of shape {shape} cannot hold row {split_index} with the scores of {len(pairs)} splits")
    if by not in ("tester", "evaluate_retrieval"):
        raise UserError(f"by must be 'tester' or 'evaluate_retrieval', got {by!r}")
    if by == "tester" and metric not in tester.accuracy_calculator.get_curr_metrics():
        known = ", ".join(tester.accuracy_calculator.get_curr_metrics())
        raise UserError(f"the tester's accuracy calculator has no metric {metric!r}; it has {known}")

    def hook(trainer: Any) -> Any:
        with _unchanged(trainer.models.values()):
            trunk, embedder = trainer.models["trunk"], trainer.models["embedder"]
            if by == "tester":
                to_eval = [(query, list(names)) for query, names in pairs]  # the tester reorders the lists
                tester.test(datasets, trainer.epoch, trunk, embedder, to_eval, collate_fn)
                row = [_tester_score(tester, query, metric) for query, _ in pairs]
            else:
                names = dict.fromkeys(name for query, references in pairs for name in (query, *references))
                embedded = {
                    name: tester.get_all_embeddings(datasets[name], trunk, embedder, collate_fn) for name in names
                }
                row = [_retrieval_score(embedded, *pair, metric) for pair in pairs]
        scores.scores[split_index] = row
        return None if then is None else then(trainer)

    return hook


def next_split(
    trainer: Any,
    dataset: Any,
    *,
    dataset_labels: Any = None,
    sampler: Any = None,
    iterations_per_epoch: int | None = None,
    models: Mapping[str, nn.Module] | None = None,
    loss_funcs: Mapping[str, nn.Module] | None = None,
    optimizers: Mapping[str, torch.optim.Optimizer] | None = None,
    lr_schedulers: Mapping[str, Any] | None = None,
) -> int:
    """Prepares a trainer for the next split, and returns the epoch to start with: `trainer.train(start, start + 4)`.

    The next `train` reads the new data set through a fresh iterator. The number of iterations of an epoch is not that of the
    last split. Optimizers that are not replaced forget their momentum, and every `CrossBatchMemory` its queue. Learning rates
    and schedulers continue unless they are replaced. Proxies and classifiers are the same as before, unless grown ones are
    passed, see `copy_classes`. The epochs go on counting, so that records and saved models do not overwrite those of the last
    split.

    Args:
        trainer: which has been trained on the last split.
        dataset: the training data of the next split.
        dataset_labels: of the trainer's option `set_min_label_to_zero`: the labels of all splits, so that a class keeps its
            number.
        sampler: of the new data set; required if the trainer has a sampler, which draws indices of the old one.
        iterations_per_epoch: None for one pass over the data set (or over the sampler, whose default may be much longer).
        models: that replace those of the trainer, such as a classifier with more classes.
        loss_funcs: that replace those of the trainer, such as a loss with more proxies.
        optimizers: that replace those of the trainer, or join them; required for the parameters of what is replaced.
        lr_schedulers: that replace those of the trainer; required for optimizers that are replaced.

    Raises:
        UserError: the sampler or the labels of the next split are missing; the data set is smaller than a batch, of which the
            trainer would train on nothing; an optimizer or scheduler belongs to something that has been replaced; or the
            trainer adds the penalty of a method twice, or that of a method of another model than it trains.
    """
    _check_next_data(trainer, dataset, dataset_labels, sampler)
    for kind, new in (("models", models), ("loss_funcs", loss_funcs)):
        unknown = sorted((new or {}).keys() - getattr(trainer, kind).keys())
        if unknown:
            raise UserError(f"the trainer has no {kind} named {', '.join(unknown)} to replace")
    parts = {**trainer.models, **(models or {})}, {**trainer.loss_funcs, **(loss_funcs or {})}
    new_optimizers = {**trainer.optimizers, **(optimizers or {})}
    new_schedulers = {**trainer.lr_schedulers, **(lr_schedulers or {})}
    _check_optimizers([*parts[0].values(), *parts[1].values()], new_optimizers, new_schedulers)
    adding = [*parts[1].values(), *(trainer.gradient_clippers or {}).values()]
    for method in (getattr(part, "method", None) for part in adding):
        if isinstance(method, Method):
            check_method_of_trainer(method, parts[0].values(), adding)
    trainer.models.update(models or {})
    trainer.loss_funcs.update(loss_funcs or {})
    trainer.optimizers, trainer.lr_schedulers = new_optimizers, new_schedulers
    for name in trainer.optimizers.keys() - (optimizers or {}).keys():
        trainer.optimizers[name].state.clear()
    for loss in trainer.loss_funcs.values():
        for memory in (module for module in loss.modules() if isinstance(module, CrossBatchMemory)):
            memory.reset_queue()
    trainer.dataset, trainer.sampler, trainer.iterations_per_epoch = dataset, sampler, iterations_per_epoch
    if dataset_labels is not None:
        trainer.dataset_labels = dataset_labels
        trainer.initialize_label_mapper()
    return int(getattr(trainer, "epoch", 0)) + 1


def check_method_of_trainer(method: Method, models: Iterable[nn.Module], parts: Iterable[Any]) -> None:
    """Raises `UserError` if the penalty of a method is added more than once in a step, or pulls another model.

    Args:
        method: the method.
        models: that the trainer trains.
        parts: the losses and clippers of the trainer; those that add a penalty have its method as `method`.
    """
    num_added = sum(getattr(part, "method", None) is method for part in parts)
    if num_added > 1:
        raise UserError(f"the trainer adds the penalty of {method.name} {num_added} times in a step; {ONE_FORM}")
    trained = {id(parameter) for model in models for parameter in model.parameters()}
    if not all(id(parameter) in trained for parameter in method.model.parameters()):
        raise UserError(f"{method.name} protects another model than the trainer trains; make it with joined(models)")


@torch.no_grad()
def copy_classes(old: nn.Module, new: nn.Module) -> nn.Module:
    """Copies the classes of a loss or classifier into one with more classes, which is returned; the further ones stay as drawn.

    Every parameter of `old` is written to the leading rows or columns of the parameter of `new` with its name. Buffers are
    not copied.

    Raises:
        UserError: a parameter is missing, or differs in more than one dimension or by being smaller.
    """
    targets = dict(new.named_parameters())
    for name, source in old.named_parameters():
        target = targets.get(name)
        shapes = [] if target is None else list(zip(source.shape, target.shape, strict=False))
        is_grown = sum(a != b for a, b in shapes) <= 1 and all(a <= b for a, b in shapes)
        if target is None or source.ndim != target.ndim or not is_grown:
            given = "lacks it" if target is None else f"has it with shape {list(target.shape)}"
            raise UserError(
                f"parameter '{name}' has shape {list(source.shape)}, but the new module {given}; "
                "only the number of classes may differ, and only grow"
            )
        target[tuple(slice(size) for size in source.shape)] = source.to(target)
    return new


@contextmanager
def _unchanged(models: Iterable[nn.Module]) -> Iterator[None]:
    """Restores the modes of the models and the random state of torch, from which every data loader draws a seed."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _tester_score(tester: Any, query: str, metric: str) -> float:
    """The metric of one query split from the last test; averaged over the levels of a label hierarchy, if it has several."""
    accuracies = tester.all_accuracies[query]
    average = tester.accuracies_keyname(metric, average=True)
    level = tester.accuracies_keyname(metric, label_hierarchy_level=tester.label_hierarchy_level)
    return float(accuracies[average] if average in accuracies else accuracies[level])


def _retrieval_score(
    embedded: Mapping[str, tuple[Tensor, Tensor]], query: str, references: Sequence[str], metric: str
) -> float:
    """The metric of one query split by `evaluate_retrieval`; embeddings are [N, D] and labels [N, 1] by split."""
    if any(labels.shape[1] != 1 for _, labels in embedded.values()):
        raise UserError(
            "evaluate_retrieval needs one label for each item, but the labels form a hierarchy; use by='tester'"
        )
    sizes = {name: len(labels) for name, (_, labels) in embedded.items()}
    starts = dict(zip(sizes, torch.tensor([0, *sizes.values()]).cumsum(0).tolist(), strict=False))
    ids = {name: torch.arange(starts[name], starts[name] + size) for name, size in sizes.items()}
    result = evaluate_retrieval(
        embedded[query][0],
        embedded[query][1][:, 0],
        torch.cat([embedded[name][0] for name in references]),
        torch.cat([embedded[name][1][:, 0] for name in references]),
        query_ids=ids[query],
        gallery_ids=torch.cat([ids[name] for name in references]),
        distance="euclidean",
    )
    if metric not in result.means:
        raise UserError(f"evaluate_retrieval has no metric {metric!r}; it has {', '.join(result.means)}")
    return result.means[metric]


def _check_next_data(trainer: Any, dataset: Any, dataset_labels: Any, sampler: Any) -> None:
    if trainer.sampler is not None and sampler is None:
        raise UserError("the trainer's sampler draws indices of the last data set; pass sampler= for the next one")
    if trainer.set_min_label_to_zero and dataset_labels is None:
        raise UserError(
            "the trainer numbers the labels of the last data set; pass dataset_labels= with those of all splits"
        )
    if isinstance(sampler, BatchSampler):
        return
    num_items = len(dataset if sampler is None else sampler)
    if num_items < trainer.batch_size:
        raise UserError(
            f"an epoch of the next split has {num_items} items, fewer than a batch of {trainer.batch_size}, and the trainer "
            "drops incomplete batches; lower trainer.batch_size"
        )


def _check_optimizers(
    modules: Iterable[nn.Module], optimizers: Mapping[str, torch.optim.Optimizer], schedulers: Mapping[str, Any]
) -> None:
    """Raises `UserError` for an optimizer or a scheduler of something that is not trained any more."""
    trained = {id(parameter) for module in modules for parameter in module.parameters()}
    for name, optimizer in optimizers.items():
        if any(id(parameter) not in trained for group in optimizer.param_groups for parameter in group["params"]):
            raise UserError(
                f"{name} holds parameters that have been replaced; pass optimizers={{'{name}': ...}} with the new ones"
            )
    for name, scheduler in schedulers.items():
        if not any(scheduler.optimizer is optimizer for optimizer in optimizers.values()):
            raise UserError(
                f"{name} schedules an optimizer that has been replaced; pass lr_schedulers={{'{name}': ...}}"
            )
