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

from mas_embed import losses
from mas_embed.config import SAMPLERS, Component, Config, MethodComponent, with_candidate
from mas_embed.data import DATASETS, Split, join_splits
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
from mas_embed.training import SequenceResult, check_splits, train_sequence
from mas_embed.training.loading import training_batches
from mas_embed.training.step import Loss, OnEvent

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
    data = DATASETS[config.data.name](**config.data.options | {"held_out": method.select.on})
    splits = data[: method.select.num_splits]
    about = {"method": f"{method.title} {candidate}", "seed": seed}
    model, parts = make_model(config, seed=seed), _training_parts(config)
    result = train_sequence(
        model,
        splits,
        method=make_method(with_candidate(method, candidate), model, loss=parts["loss"]),
        **parts | {"watch_index": False},
        seed=seed,
        on_event=lambda event: on_event({**event, **about}),
    )
    return float(getattr(result.scores[config.evaluation.primary_metric], method.select.by))


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
        _try_out(config, method, splits[0])
    return splits


def _try_out(config: Config, component: MethodComponent, split: Split) -> None:
    """One batch through everything that a run calls, in the first split and in a later one, on a model that is thrown away."""
    model, parts = make_model(config, seed=0), _training_parts(config)
    method = make_method(component, model, loss=parts["loss"])
    initial = copy.deepcopy(model.state_dict())
    batch = next(iter(training_batches(split.train, batch_size=config.training.batch_size, sampler=parts["sampler"])))
    _try_step(f"methods.{component.title}", model, method, parts, batch)
    model.load_state_dict(initial)  # a step on one batch may have spoilt it
    _made(f"methods.{component.title}", lambda: method.consolidate([batch]))
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
    optimizer = _made("training.optimizer", lambda: parts["optimizer"](list(model.parameters())))
    _made("training.optimizer", optimizer.step)
    _made(where, lambda: method.after_step(optimizer))


def training_splits(method: MethodComponent, splits: Sequence[Split]) -> list[Split]:
    """What a method trains on: the sequence, or for "joint" one split that holds everything."""
    return [join_splits(splits)] if method.name == "joint" else list(splits)


def make_model(config: Config, *, seed: int) -> nn.Module:
    """The model of a config, its initial weights drawn from the seed."""
    with seeded(seed):
        return _made("model", lambda: MODELS[config.model.name](**config.model.options))


def make_method(component: MethodComponent, model: nn.Module, *, loss: Loss) -> Method:
    """The method of a config for a model; one that looks at the training loss is given it, unless it names its own."""
    return _made(f"methods.{component.title}", lambda: _method(component, model, loss))


def _method(component: Component, model: nn.Module, loss: Loss) -> Method:
    constructor, options = METHODS[component.name], component.options
    for name in component_lists(constructor, Method):
        options[name] = [_method(Component.model_validate(part), model, loss) for part in options[name]]
    if "loss" in constructor_parameters(constructor):
        own = options.get("loss")
        options["loss"] = _loss(Component.model_validate(own)) if own else loss
    method: Method = constructor(model, **options)
    return method


def _train(config: Config, splits: list[Split], run: Run, out: Path, resume: bool, on_event: OnEvent) -> dict[str, Any]:
    folder = out / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    about = {"method": run.method.title, "seed": run.seed}
    model, parts = make_model(config, seed=run.seed), _training_parts(config)
    method = make_method(run.method, model, loss=parts["loss"])
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
    costs = {"keeps": method.keeps, "kept_bytes": method.num_bytes, "num_steps": result.num_steps}
    return about | {"options": run.method.options} | _described(result) | costs


def _training_parts(config: Config) -> dict[str, Any]:
    """The arguments of `train_sequence` that the config gives."""
    training, evaluation = config.training, config.evaluation
    miner, sampler = training.miner, training.sampler
    return {
        "loss": _made("loss", lambda: _loss(config.loss)),
        "miner": _made("training.miner", lambda: losses.build("miners", miner.name, miner.options)) if miner else None,
        "sampler": partial(SAMPLERS[sampler.name], **sampler.options) if sampler else None,
        "optimizer": _optimizer(training.optimizer),
        "epochs": training.epochs,
        "batch_size": training.batch_size,
        "distance": evaluation.distance,
        "recall_at": evaluation.recall_at,
        "watch_index": evaluation.watch_index,
    }


def _loss(component: Component) -> Loss:
    loss: Loss = losses.build("losses", component.name, component.options)
    return loss


def _optimizer(component: Component) -> Any:
    return partial(getattr(torch.optim, component.name), **component.options)


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
        "seconds": {name: round(value, 3) for name, value in result.seconds.items()},
    }


def _measures(matrices: Mapping[str, ScoreMatrix]) -> dict[str, dict[str, float | None]]:
    return {
        name: {measure: _number(getattr(matrix, measure)) for measure in MEASURES} for name, matrix in matrices.items()
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
