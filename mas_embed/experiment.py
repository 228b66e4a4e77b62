"""A whole run: every method and seed of a config, trained, judged and written to one directory."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from mas_embed import losses
from mas_embed.config import SAMPLERS, Component, Config, MethodComponent, RetrievalEvaluation, with_candidate
from mas_embed.data import DATASETS, FactSequence, FactTable, Split, Subset, join_splits, select_subset
from mas_embed.errors import RunError, UserError
from mas_embed.forgetting import ScoreMatrix
from mas_embed.forward import embed_batch
from mas_embed.methods import METHODS, Method
from mas_embed.models import MODELS
from mas_embed.options import component_lists, constructor_parameters
from mas_embed.report import write_report
from mas_embed.run_directory import open_run_directory, write_results
from mas_embed.seeding import seeded
from mas_embed.selection import best_of, candidates_of, try_candidate
from mas_embed.training import FactJudge, LabelJudge, SequenceResult, check_splits, train_sequence
from mas_embed.training.evaluation import MakeJudge
from mas_embed.training.loading import training_batches, unlabeled_batches
from mas_embed.training.step import Loss, OnEvent, make_optimizer

MEASURES = ("final_average", "forgetting", "backward_transfer", "learning")


@dataclass(frozen=True)
class Run:
    """One method with one seed of a run directory."""

    method: MethodComponent
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.method.title}/seed{self.seed}"


def run_experiment(
    config: Config,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_event: OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Trains every method with every seed, and writes the run directory with its report.

    Every method of a seed starts from the same weights. Everything is made once before anything is written, so that a
    mistake in the config leaves no trace. Results are written after every method and seed.

    Args:
        config: from `load_config`.
        out: the run directory; by default `runs/<name>`.
        resume: go on where a run of the same config stopped.
        overwrite: replace the results that the directory holds.
        on_event: is told what `train_sequence` tells, with "method" and "seed", and `{"event": "run", ...}` when one
            has ended.

    Returns:
        What `results.json` holds.

    Raises:
        UserError: the config cannot be trained, or the directory holds results and neither `resume` nor `overwrite` is
            set.
        RunError: training diverged.
    """
    out = Path(out) if out is not None else Path("runs") / config.name
    splits = make_splits(config)
    fresh = {
        "schema": 1,
        "name": config.name,
        "splits": [split.name for split in splits],
        "primary_metric": config.evaluation.primary_metric,
        "runs": [],
        "selections": {},
    }
    results = open_run_directory(out, config.to_yaml(), fresh, resume=resume, overwrite=overwrite)
    config = _with_selected_options(config, results, out, on_event)
    done = {(run["method"], run["seed"]) for run in results["runs"]}
    for run in runs_of(config):
        if (run.method.title, run.seed) in done:
            on_event({"event": "skip", "method": run.method.title, "seed": run.seed})
            continue
        record = _train(config, splits, run, out, resume, on_event)
        results["runs"].append(record)
        write_results(out, results)
        on_event({"event": "run", **record})
    write_report(out)
    return results


def _with_selected_options(config: Config, results: dict[str, Any], out: Path, on_event: OnEvent) -> Config:
    """The config with the options that were selected; every candidate is written to the results as it ends."""
    chosen = []
    for method in config.methods:
        if method.select is None:
            chosen.append(method)
            continue
        record = results["selections"].setdefault(method.title, {"candidates": []})
        candidates = candidates_of(method.select.grid)
        for candidate in candidates[len(record["candidates"]) :]:
            score = partial(_validation_score, config, method, on_event=on_event)
            record["candidates"].append(try_candidate(candidate, method.select.seeds, score))
            write_results(out, results)
            on_event({"event": "candidate", "method": method.title, **record["candidates"][-1]})
        best = best_of(record["candidates"], f"{method.title}: selection")
        record |= {"by": method.select.by, "on": method.select.on, "chosen": best}
        chosen.append(with_candidate(method, best))
    return config.model_copy(update={"methods": tuple(chosen)})


def _validation_score(
    config: Config, method: MethodComponent, candidate: Mapping[str, Any], seed: int, *, on_event: OnEvent
) -> float:
    """What a candidate's training on the validation part is judged by."""
    assert method.select is not None
    options = config.data.options | {"held_out": method.select.on}
    splits: list[Split] = _made("data", lambda: DATASETS[config.data.name](**options))
    about = {"method": f"{method.title} {candidate}", "seed": seed}
    chosen = with_candidate(method, candidate)
    # Subsets may lie in any split, so these are made of all, whichever are trained
    model, parts = make_model(config, splits, seed=seed), _training_parts(_only_judged(config), chosen, splits)
    result = train_sequence(
        model,
        splits[: method.select.num_splits],
        method=make_method(chosen, model, loss=parts["loss"], splits=splits),
        **parts,
        seed=seed,
        on_event=lambda event: on_event({**event, **about}),
    )
    return float(getattr(result.scores[config.evaluation.primary_metric], method.select.by))


def _only_judged(config: Config) -> Config:
    """The config without what is watched beside the scores: the old index, and subsets."""
    evaluation = config.evaluation
    off = {"watch_index": False} if isinstance(evaluation, RetrievalEvaluation) else {"follow": ()}
    return config.model_copy(update={"evaluation": evaluation.model_copy(update=off)})


def runs_of(config: Config) -> Iterator[Run]:
    """Every method and seed, in the order in which they are trained: seed by seed, so that a table fills evenly."""
    for seed in config.seeds:
        for method in config.methods:
            yield Run(method, seed)


def num_trainings(config: Config) -> int:
    """Of all methods and seeds, and of all candidates of options that are chosen."""
    selections = [method.select for method in config.methods if method.select is not None]
    searched = sum(len(candidates_of(select.grid)) * len(select.seeds) for select in selections)
    return searched + sum(1 for _ in runs_of(config))


def make_splits(config: Config) -> list[Split]:
    """The splits of a config, after everything else that it names was made once, on every split that is trained.

    Raises:
        UserError: names what cannot be made, or cannot be trained.
    """
    with seeded(0):  # trying out draws at random, and the caller's state is not to move
        return _make_splits(config)


def _make_splits(config: Config) -> list[Split]:
    splits: list[Split] = _made("data", lambda: DATASETS[config.data.name](**config.data.options))
    check_splits(splits)
    for method in config.methods:
        for split in training_splits(method, splits):
            _check_sampler(config, split)
        _try_out(config, method, splits)
    return splits


def _try_out(config: Config, component: MethodComponent, splits: Sequence[Split]) -> None:
    """One batch through everything that a run calls, in the first split and in a later one, on a model that is thrown away."""
    model, parts = make_model(config, splits, seed=0), _training_parts(config, component, splits)
    _made("evaluation", lambda: parts["judge"](model, splits, batch_size=1))
    method = make_method(component, model, loss=parts["loss"], splits=splits)
    initial = copy.deepcopy(model.state_dict())
    batch_size, unlabeled = config.training.batch_size, parts["importance_data"]
    batch = next(iter(training_batches(splits[0].train, batch_size=batch_size, sampler=parts["sampler"])))
    _try_step(f"methods.{component.title}", model, method, parts, batch)
    model.load_state_dict(initial)  # a step on one batch may have spoilt it
    seen = batch if unlabeled is None else next(iter(unlabeled_batches(unlabeled, batch_size=batch_size)))
    _made(f"methods.{component.title}", lambda: method.consolidate([seen]))
    _try_step(f"methods.{component.title}", model, method, parts, batch)


def _try_step(where: str, model: nn.Module, method: Method, parts: dict[str, Any], batch: Any) -> None:
    _made(where, method.begin_split)
    inputs, labels = _made(where, lambda: method.extend_batch(*batch))
    embeddings = _made("model", lambda: embed_batch(model, inputs))
    extra = _made(where, lambda: method.batch_penalty(inputs, embeddings))
    embeddings, labels = _made(where, lambda: method.extend_embeddings(embeddings, labels))
    mined = _made("training.miner", lambda: parts["miner"](embeddings, labels)) if parts["miner"] else None
    loss = _made("loss", lambda: parts["loss"](embeddings, labels, mined))
    _made("loss", (loss if extra is None else loss + extra).backward)
    _made(where, method.add_penalty_grad)
    optimizer = _made("training.optimizer", lambda: make_optimizer(model, [], parts["optimizer"]))
    _made("training.optimizer", optimizer.step)
    _made(where, lambda: method.after_step(optimizer))
    if parts["scheduler"]:
        _made("training.scheduler", lambda: parts["scheduler"](optimizer))


def training_splits(method: MethodComponent, splits: Sequence[Split]) -> list[Split]:
    """What a method trains on: the sequence, or for "joint" one split that holds everything."""
    return [join_splits(splits)] if method.name == "joint" else list(splits)


def make_model(config: Config, splits: Sequence[Split], *, seed: int) -> nn.Module:
    """The model of a config, its initial weights drawn from the seed; one of word vectors has the size of the data's."""
    constructor, options = MODELS[config.model.name], config.model.options
    if isinstance(splits, FactSequence) and "vector_size" in constructor_parameters(constructor):
        options["vector_size"] = splits.facts.vectors.shape[2]
    with seeded(seed):
        return _made("model", lambda: constructor(**options))


def make_method(component: MethodComponent, model: nn.Module, *, loss: Loss, splits: Sequence[Split]) -> Method:
    """The method of a config for a model; one that looks at the training loss is given it, unless it names its own."""
    return _made(f"methods.{component.title}", lambda: _method(component, model, loss, splits))


def _method(component: Component, model: nn.Module, loss: Loss, splits: Sequence[Split]) -> Method:
    constructor, options = METHODS[component.name], component.options
    for name in component_lists(constructor, Method):
        options[name] = [_method(Component.model_validate(part), model, loss, splits) for part in options[name]]
    if "loss" in constructor_parameters(constructor):
        own = options.get("loss")
        options["loss"] = _loss(Component.model_validate(own), splits) if own else loss
    method: Method = constructor(model, **options)
    return method


def _train(config: Config, splits: list[Split], run: Run, out: Path, resume: bool, on_event: OnEvent) -> dict[str, Any]:
    folder = out / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    about = {"method": run.method.title, "seed": run.seed}
    model, parts = make_model(config, splits, seed=run.seed), _training_parts(config, run.method, splits)
    method = make_method(run.method, model, loss=parts["loss"], splits=splits)
    with (folder / "log.jsonl").open("a" if resume else "w", encoding="utf-8") as log:

        def record(event: Mapping[str, Any]) -> None:
            log.write(json.dumps(event) + "\n")
            log.flush()
            on_event({**event, **about})

        try:
            result = train_sequence(
                model,
                training_splits(run.method, splits),
                method=method,
                **parts,
                evaluate_on=splits if run.method.name == "joint" else None,
                seed=run.seed,
                checkpoint=folder / "checkpoint.safetensors",
                resume=resume,
                on_event=record,
            )
        except (RunError, UserError) as error:
            # The config was tried out before: what is refused now is what training has made of it
            raise RunError(f"{run.method.title} seed {run.seed}: {error}") from error
    about |= {"options": run.method.options, "importance_data": config.importance_of(run.method)}
    costs = {"keeps": method.keeps, "kept_bytes": method.num_bytes, "num_steps": result.num_steps}
    return about | _described(result) | costs


def _training_parts(config: Config, method: MethodComponent, splits: Sequence[Split]) -> dict[str, Any]:
    """The arguments of `train_sequence` that the config gives."""
    training = config.training
    miner, sampler, scheduler = training.miner, training.sampler, training.scheduler
    return {
        "loss": _made("loss", lambda: _loss(config.loss, splits)),
        "miner": _made("training.miner", lambda: losses.build("miners", miner.name, miner.options)) if miner else None,
        "sampler": partial(SAMPLERS[sampler.name], **sampler.options) if sampler else None,
        "optimizer": partial(getattr(torch.optim, training.optimizer.name), **training.optimizer.options),
        "scheduler": partial(getattr(lr_scheduler, scheduler.name), **scheduler.options) if scheduler else None,
        "epochs": training.epochs,
        "batch_size": training.batch_size,
        "judge": _made("evaluation", lambda: _judge(config, method, splits)),
        "importance_data": _importance_data(config, method, splits),
    }


def _judge(config: Config, method: MethodComponent, splits: Sequence[Split]) -> MakeJudge:
    evaluation = config.evaluation
    if isinstance(evaluation, RetrievalEvaluation):
        watches_index = evaluation.watch_index and method.name != "joint"
        return partial(
            LabelJudge, distance=evaluation.distance, recall_at=evaluation.recall_at, watches_index=watches_index
        )
    followed = {name: _subset(config, name, splits) for name in evaluation.follow}
    return partial(FactJudge, facts=_facts_of(splits), distance=evaluation.distance, followed=followed)


def _importance_data(config: Config, method: MethodComponent, splits: Sequence[Split]) -> Any:
    name = config.importance_of(method)
    return None if name == "train" else _subset(config, name, splits).part.inputs


def _subset(config: Config, name: str, splits: Sequence[Split]) -> Subset:
    section = config.subsets[name]
    return _made(
        f"subsets.{name}",
        lambda: select_subset(splits, split=section.split, part=section.part, labels=section.labels),
    )


def _loss(component: Component, splits: Sequence[Split]) -> Loss:
    loss: Loss
    if component.name == "facts":
        facts = _facts_of(splits)
        loss = losses.FactLoss(facts.vectors, facts.weights, **component.options)
    else:
        loss = losses.build("losses", component.name, component.options)
    return loss


def _facts_of(splits: Sequence[Split]) -> FactTable:
    if not isinstance(splits, FactSequence):
        raise UserError("it needs data with facts, such as fact_digits, facts or fact_list; this data has none")
    return splits.facts


def _check_sampler(config: Config, split: Split) -> None:
    sampler = config.training.sampler
    if sampler is not None:
        _made(
            f"training.sampler on split '{split.name}'",
            lambda: SAMPLERS[sampler.name](split.train.labels, **sampler.options),
        )


def _made(where: str, make: Any) -> Any:
    """What `make` returns; an error of a library's constructor is told as the user's."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except Exception as error:  # whatever a library raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where} does not work with these options: {reason}") from error


def _described(result: SequenceResult) -> dict[str, Any]:
    """A result as JSON has it: undefined measures are null."""
    measures = _measures(result.scores)
    for name, matrix in result.scores.items():
        measures[name]["forward_transfer"] = _number(matrix.forward_transfer(result.initial[name]))
    return {
        "scores": {name: matrix.scores.tolist() for name, matrix in result.scores.items()},
        "initial": result.initial,
        "all": result.all,
        "measures": measures,
        "kept_gallery": {
            "scores": {name: matrix.scores.tolist() for name, matrix in result.scores_on_kept.items()},
            "measures": _measures(result.scores_on_kept),
        },
        "indexes": result.indexes,
        "followed": result.followed,
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
    }


def _measures(matrices: Mapping[str, ScoreMatrix]) -> dict[str, dict[str, float | None]]:
    return {
        name: {measure: _number(getattr(matrix, measure)) for measure in MEASURES} for name, matrix in matrices.items()
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
