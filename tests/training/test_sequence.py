import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from pytorch_metric_learning.losses import ProxyNCALoss, TripletMarginLoss
from pytorch_metric_learning.miners import TripletMarginMiner
from small import Recorder, Stopped, small_model, small_splits, train
from torch import nn

from mas_embed import (
    MAS,
    SI,
    Callback,
    Combine,
    Finetune,
    Frozen,
    LwF,
    Part,
    Recipe,
    Replay,
    RetrievalEvaluator,
    SparseEvaluator,
    Split,
    UserError,
    evaluate_retrieval,
    join_splits,
    per_class_sampler,
    train_sequence,
)
from mas_embed.errors import RunError, component_at_fault
from mas_embed.methods import Method
from mas_embed.training import StepLog, make_optimizer


def assert_same_weights(one, other):
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_a_row_is_the_score_of_every_split_against_one_gallery_of_all():
    splits = small_splits()
    model, result = train(splits=splits)
    model.eval()
    gallery = torch.cat([split.gallery.inputs for split in splits])
    labels = torch.cat([split.gallery.labels for split in splits])
    for index, split in enumerate(splits):
        start = index * len(split.query)
        with torch.no_grad():
            expected = evaluate_retrieval(
                model(split.query.inputs), split.query.labels, model(gallery), labels,
                query_ids=torch.arange(start, start + len(split.query)), gallery_ids=torch.arange(len(labels)), recall_at=(1,),
            )  # fmt: skip
        for name, value in expected.as_dict().items():
            assert result.scores[name][2, index] == pytest.approx(value)
    assert result.pooled["mean_average_precision"] == pytest.approx(
        result.scores["mean_average_precision"].final_average
    )
    assert set(result.seconds) == {"training", "importance", "evaluation"}


def test_initial_scores_are_those_of_the_untrained_model():
    _, trained = train()
    _, untouched = train(optimizer=partial(torch.optim.SGD, lr=0.0))
    assert trained.initial == untouched.initial
    assert trained.initial["r_precision"] == untouched.scores["r_precision"].scores[2].tolist()


def test_the_same_seed_gives_the_same_scores_and_another_does_not():
    options = {"loss": TripletMarginLoss(), "miner": TripletMarginMiner(), "sampler": partial(per_class_sampler, m=2)}
    one, first = train(MAS, **options, seed=3)
    torch.manual_seed(99)
    two, second = train(MAS, **options, seed=3)
    assert_same_weights(one, two)
    assert all((first.scores[name].scores == second.scores[name].scores).all() for name in first.scores)
    three, _ = train(MAS, **options, seed=4)
    assert not torch.equal(one[0].weight, three[0].weight)


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    train(MAS)
    assert torch.equal(state, torch.get_rng_state())


def test_strength_zero_is_finetune_bit_for_bit():
    one, _ = train(Finetune)
    two, _ = train(partial(MAS, strength=0.0))
    assert_same_weights(one, two)


def test_a_strong_penalty_keeps_the_weights_nearer_to_the_anchor():
    splits = small_splits(2)
    anchor, _ = train(splits=splits[:1], evaluate_on=splits)

    def moved(make_method):
        model, _ = train(make_method, splits=splits)
        return float((model[2].weight - anchor[2].weight).detach().norm())

    assert moved(partial(MAS, strength=100.0)) < 0.5 * moved(Finetune)


def test_gradients_left_by_the_caller_do_not_enter():
    model = small_model()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    one, _ = train(model=model)
    two, _ = train()
    assert_same_weights(one, two)


def test_frozen_learns_the_first_split_only():
    model, result = train(Frozen)
    only_first, _ = train(Finetune, splits=small_splits()[:1], evaluate_on=small_splits())
    assert_same_weights(model, only_first)
    rows = result.scores["mean_average_precision"].scores
    assert (rows[0] == rows[1]).all()
    assert (rows[0] == rows[2]).all()


def test_joint_training_is_one_split_evaluated_on_all():
    splits = small_splits()
    _, result = train(splits=[join_splits(splits)], evaluate_on=splits)
    assert result.scores["mean_average_precision"].scores.shape == (1, 3)


def test_the_loop_is_the_papers_algorithm():
    calls = []

    class Recorder(Method):
        def add_penalty_grad(self):
            calls.append("step")

        def consolidate(self, batches):
            calls.append(("consolidate", sum(len(inputs) for inputs, _ in batches)))

    train(Recorder, splits=small_splits(2, per_class=5))
    # 10 items in batches of 4 make 3 steps an epoch, a short last batch included
    assert calls == (["step"] * 6 + [("consolidate", 10)]) * 2


class HookRecorder(Method):
    """Writes down which hooks were called, and what it can see in them."""

    def __init__(self, model):
        super().__init__(model)
        self.calls = []

    def begin_split(self):
        self.calls.append("begin")

    def extend_batch(self, inputs, labels):
        self.calls.append("extend")
        return torch.cat([inputs, inputs]), torch.cat([labels, labels])

    def batch_penalty(self, inputs, embeddings):
        assert len(inputs) == len(embeddings)
        self.calls.append(("penalty", len(inputs)))
        return 0 * embeddings.sum()

    def add_penalty_grad(self):
        self.gradient = self.model[0].weight.grad.clone()
        self.before = self.model[0].weight.detach().clone()
        self.calls.append("gradient")

    def after_step(self, optimizer):
        assert torch.equal(self.gradient, self.model[0].weight.grad)
        assert not torch.equal(self.before, self.model[0].weight)
        assert optimizer.param_groups[0]["lr"] == 1e-3
        self.calls.append("stepped")

    def consolidate(self, batches):
        self.calls.append("consolidate")


STEP = ["extend", ("penalty", 8), "gradient", "stepped"]


def test_hooks_are_called_where_the_method_says():
    method = HookRecorder(small_model())
    train(lambda model: method, model=method.model, epochs=1, splits=small_splits(2, per_class=4))
    assert method.calls == (["begin"] + STEP * 2 + ["consolidate"]) * 2


def test_gradients_that_accumulate_take_the_penalty_once_per_step():
    accelerator = Accelerator(gradient_accumulation_steps=2)
    method = HookRecorder(small_model())
    train(
        lambda model: method, model=method.model, epochs=1, splits=small_splits(1, per_class=8), accelerator=accelerator
    )
    assert method.calls == ["begin", *(STEP[:2] + STEP) * 2, "consolidate"]


def test_accumulated_batches_are_one_large_batch():
    """With a loss that is a mean over samples; MAS in its second split, where it pulls."""

    def mean_length(embeddings, labels, mined=None):
        return (embeddings - labels[:, None]).square().sum(1).mean()

    weights = []
    for batch_size, num_batches in ((16, 1), (4, 4)):
        model, _ = train(
            partial(MAS, strength=10.0), loss=mean_length, batch_size=batch_size, splits=small_splits(2, per_class=8),
            accumulate=num_batches, epochs=3,
        )  # fmt: skip
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_a_method_is_given_labelled_batches_of_mixed_classes():
    batches = []

    class Keeper(Method):
        def consolidate(self, given):
            batches.extend(given)

    train(Keeper, splits=small_splits(1, per_class=20), batch_size=10)
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == [0] * 20 + [1] * 20
    assert all(len(labels.unique()) == 2 for _, labels in batches)


def test_callbacks_are_told_where_training_stands():
    recorder = Recorder()
    _, result = train(splits=small_splits(2), callbacks=[recorder], seed=5)
    told = [(type(event).__name__, event.split_index, getattr(event, "epoch", None)) for event in recorder.events]
    assert told == [
        ("EpochEnd", 0, 0), ("EpochEnd", 0, 1), ("SplitEnd", 0, None), ("EpochEnd", 1, 0), ("EpochEnd", 1, 1), ("SplitEnd", 1, None),
        ("RunEnd", 1, None),
    ]  # fmt: skip
    assert recorder.events[-2].evaluation.scores["r_precision"] == result.scores["r_precision"].scores[1].tolist()
    assert recorder.events[-1].record is result
    assert {(event.method, event.seed, event.num_splits) for event in recorder.events} == {("Finetune", 5, 2)}
    assert [event.split for event in recorder.events] == ["s0"] * 3 + ["s1"] * 4


def test_every_step_is_told_with_its_loss_penalty_and_learning_rate():
    steps = []

    class Steps(Callback):
        def on_step_end(self, event):
            steps.append(event)

    recorder = Recorder()
    halved = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    plain, _ = train(partial(MAS, strength=10.0), optimizer=optimizer, scheduler=halved)
    watched, _ = train(
        partial(MAS, strength=10.0), optimizer=optimizer, scheduler=halved, callbacks=[Steps(), recorder]
    )
    assert_same_weights(plain, watched)
    assert [(event.split_index, event.epoch, event.step) for event in steps[:6]] == [
        (0, epoch, 3 * epoch + step) for epoch in (0, 1) for step in (1, 2, 3)
    ]
    assert [event.learning_rate for event in steps[:6]] == [0.1] * 3 + [0.05] * 3
    assert all(event.penalty == 0 for event in steps[:6])  # nothing to protect yet
    assert all(event.penalty > 0 for event in steps[6:])
    epochs = [event for event in recorder.events if type(event).__name__ == "EpochEnd"]
    for epoch in epochs:
        own = [event for event in steps if (event.split_index, event.epoch) == (epoch.split_index, epoch.epoch)]
        assert epoch.loss == pytest.approx(sum(float(event.loss) for event in own) / len(own))
        assert epoch.num_batches == len(own)
        assert epoch.penalty == float(own[-1].penalty)
        assert epoch.learning_rate == own[0].learning_rate


def test_optimizer_state_and_proxies_start_fresh_with_every_split():
    loss = ProxyNCALoss(num_classes=6, embedding_size=4)
    before = copy.deepcopy(loss.state_dict())
    _, result = train(loss=loss)
    assert all(torch.equal(value, loss.state_dict()[name]) for name, value in before.items())
    made = []

    def optimizer(parameters):
        made.append(torch.optim.Adam(parameters))
        return made[-1]

    train(optimizer=optimizer)
    assert len(made) == 3
    assert result.scores


def test_the_optimizer_of_a_split_is_freed_when_the_split_ends():
    made, num_alive = [], []

    def optimizer(parameters):
        made.append(weakref.ref(optimizer := torch.optim.Adam(parameters)))
        return optimizer

    class Count(Callback):
        def on_split_end(self, event):
            gc.collect()
            num_alive.append(sum(reference() is not None for reference in made))

    train(optimizer=optimizer, callbacks=[Count()], accelerator=Accelerator())
    assert num_alive == [0, 0, 0]


def test_proxies_are_trained_with_the_model():
    counts = []

    def optimizer(parameters):
        parameters = list(parameters)
        counts.append(len(parameters))
        return torch.optim.Adam(parameters)

    train(loss=ProxyNCALoss(num_classes=6, embedding_size=4), optimizer=optimizer)
    assert counts == [5, 5, 5]


def test_a_split_smaller_than_a_batch_is_trained_on():
    one, _ = train(batch_size=1000)
    assert not torch.equal(one[0].weight, small_model()[0].weight)


@pytest.mark.parametrize(
    "stop_at", [("EpochEnd", 0), ("SplitEnd", 0), ("EpochEnd", 1), ("SplitEnd", 1), ("EpochEnd", 2)]
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, stop_at):
    options = {"loss": TripletMarginLoss(), "miner": TripletMarginMiner(), "sampler": partial(per_class_sampler, m=2)}
    straight, expected = train(MAS, **options)
    path = tmp_path / "checkpoint.safetensors"

    stopper = Recorder(lambda event: (type(event).__name__, event.split_index) == stop_at)
    with pytest.raises(Stopped):
        train(MAS, **options, checkpoint=path, callbacks=[stopper])
    resumed, result = train(
        MAS, **options, checkpoint=path, resume=True, model=small_model(seed=5 if path.exists() else 0)
    )
    assert_same_weights(straight, resumed)
    for name, matrix in expected.scores.items():
        assert (matrix.scores == result.scores[name].scores).all()
    assert expected.initial == result.initial


def test_a_checkpoint_is_never_overwritten_unasked(tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    train(checkpoint=path)
    with pytest.raises(UserError, match="pass resume=True"):
        train(checkpoint=path)


def test_a_checkpoint_of_another_sequence_is_not_resumed(tmp_path):
    path = str(tmp_path / "checkpoint.safetensors")
    train(MAS, checkpoint=path)
    for options, message in (
        ({"seed": 1}, "its seed is 0, not 1"),
        ({"splits": small_splits(2)}, "its splits is"),
        ({"make_method": Finetune}, "its method is MAS, not Finetune"),
        ({"make_method": partial(MAS, strength=2.0)}, r"its method is \{'strength': 1.0\}, not \{'strength': 2.0\}"),
        ({"loss": TripletMarginLoss(margin=0.3)}, "its loss is pull_together, not TripletMarginLoss"),
        ({"miner": TripletMarginMiner()}, "its miner is None, not {'name': 'TripletMarginMiner'"),
        ({"epochs": 3}, r"its recipe is \{'epochs': 2\}, not \{'epochs': 3\}"),
        ({"optimizer": partial(torch.optim.Adam, lr=0.5)}, "its recipe is {'optimizer': "),
        ({"importance_data": torch.zeros(4, 2)}, "its importance_data is None, not"),
    ):
        with pytest.raises(UserError, match=f"another sequence: {message}"):
            train(**({"make_method": MAS} | options), checkpoint=path, resume=True)
    with pytest.raises(UserError, match=r"of an evaluator with recall_at \[1\], but this one has \[2\]"):
        train(MAS, checkpoint=path, resume=True, evaluator=RetrievalEvaluator(recall_at=(2,)))
    with pytest.raises(UserError, match="does not exist"):
        train(checkpoint=tmp_path / "missing" / "checkpoint.safetensors")


@pytest.mark.parametrize("change", ["values", "labels", "fewer"])
def test_data_that_has_changed_is_not_resumed(tmp_path, change):
    path, splits = tmp_path / "checkpoint.safetensors", small_splits()
    train(checkpoint=path, splits=splits)
    held, old = splits[1].query, splits[1].train
    inputs, labels = old.inputs.clone(), old.labels.clone()
    if change == "values":
        inputs[0, 0] += 1
    elif change == "labels":
        labels[0] = labels[-1]
    else:
        inputs, labels = inputs[:-1], labels[:-1]
    changed = [splits[0], Split(splits[1].name, Part(inputs, labels), held, held), *splits[2:]]
    with pytest.raises(UserError, match=f"the data of split '{splits[1].name}' is not what the checkpoint"):
        train(checkpoint=path, splits=changed, resume=True)


@pytest.mark.parametrize("part", ["train", "query", "gallery"])
def test_an_empty_part_is_refused(part):
    splits = small_splits()
    empty = Part(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    broken = Split(
        "broken",
        **{name: empty if name == part else getattr(splits[0], name) for name in ("train", "query", "gallery")},
    )
    with pytest.raises(UserError, match=f"split 'broken' has an empty {part} part"):
        train(splits=[broken, *splits[1:]])


def test_no_splits_and_twice_the_same_name():
    with pytest.raises(UserError, match="at least one split"):
        train_sequence(small_model(), [], method=Finetune(small_model()), loss=sum)
    with pytest.raises(UserError, match="the method was made with another model"):
        train_sequence(small_model(), small_splits(), method=Finetune(small_model()), loss=sum)
    with pytest.raises(UserError, match="the names of splits must differ"):
        train(splits=[small_splits()[0]] * 2)


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(
        RunError, match="training diverged, the loss is nan in split 's0', epoch 1, step 1: .*strength$"
    ):
        train(loss=lambda embeddings, labels, mined: embeddings.sum() * float("nan"))


class Grouped(nn.Sequential):
    """Its last layer learns ten times as fast as the rest."""

    def parameter_groups(self, lr):
        *rest, last = self.children()
        return [
            {"params": [parameter for layer in rest for parameter in layer.parameters()], "lr": lr},
            {"params": list(last.parameters()), "lr": 10 * lr},
        ]


def rates_of(model, others=()):
    """Of every parameter, in order, by the optimizer that a training step takes."""
    optimizer = make_optimizer(model, list(others), partial(torch.optim.SGD, lr=0.5, momentum=0.9))
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)
    return {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


def test_a_model_says_how_fast_its_parts_learn():
    model, proxies = Grouped(*small_model()), nn.Parameter(torch.zeros(2))
    rates = rates_of(model, [proxies])
    assert [rates[id(parameter)] for parameter in model.parameters()] == [0.5, 0.5, 5.0, 5.0]
    assert rates[id(proxies)] == 0.5
    plain = small_model()
    assert set(rates_of(plain).values()) == {0.5}


def test_groups_are_what_a_sequence_is_trained_with():
    trained, _ = train(model=Grouped(*small_model()), optimizer=partial(torch.optim.SGD, lr=0.01), epochs=1)
    expected, _ = train(optimizer=partial(torch.optim.SGD, lr=0.01), epochs=1)
    start = small_model().state_dict()
    moved, expected_moved = (
        (model.state_dict()["2.weight"] - start["2.weight"]).norm() for model in (trained, expected)
    )
    assert moved > 3 * expected_moved


def test_a_scheduler_steps_after_every_epoch_and_starts_anew_in_every_split():
    halved = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.0)
    once, _ = train(optimizer=partial(torch.optim.SGD, lr=0.1), epochs=1)
    still, _ = train(optimizer=partial(torch.optim.SGD, lr=0.1), epochs=3, scheduler=halved)
    # Batches of further epochs are drawn from the same generator, but the next split's from its own
    assert_same_weights(once, still)


class Watcher(Method):
    """Keeps what it is consolidated on."""

    def __init__(self, model):
        super().__init__(model)
        self.seen = []

    def consolidate(self, batches):
        self.seen.append(list(batches))


def test_importance_data_is_seen_after_every_split_without_labels():
    model = small_model()
    watcher = Watcher(model)
    inputs = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    train(lambda _: watcher, model, importance_data=inputs)
    assert len(watcher.seen) == 3
    for batches in watcher.seen:
        assert [len(batch) for batch in batches] == [4, 3]
        assert torch.equal(torch.cat(batches), inputs)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"epochs": 3}, r"has no argument 'epochs' any more: pass recipe=Recipe\(epochs=...\)"),
        ({"recall_at": (1,)}, r"pass evaluator=RetrievalEvaluator\(recall_at=...\)"),
        ({"watch_index": False}, r"pass evaluator=RetrievalEvaluator\(follow_index=...\)"),
        ({"on_event": print}, r"pass callbacks=\["),
    ],
)
def test_an_argument_that_has_moved_names_its_new_place(argument, message):
    model = small_model()
    with pytest.raises(UserError, match=message):
        train_sequence(model, small_splits(), method=Finetune(model), loss=sum, **argument)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"epochs": -1}, "epochs must be a whole number >= 1, got -1"),
        ({"epochs": 1.5}, "epochs must be a whole number >= 1, got 1.5"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1"),
        ({"num_workers": -1}, "num_workers must be a whole number >= 0"),
        ({"accumulate": True}, "accumulate must be a whole number >= 1, got True"),
        ({"clip_norm": 0}, "clip_norm must be greater than 0"),
    ],
)
def test_a_recipe_refuses_numbers_outside_their_range(field, message):
    with pytest.raises(UserError, match=message):
        Recipe(**field)


def test_gradients_are_clipped_with_the_penalty_in_them():
    moved = {}
    for clip_norm in (None, 1e-3):
        optimizer = partial(torch.optim.SGD, lr=1.0)
        start = small_model().state_dict()
        model, _ = train(optimizer=optimizer, clip_norm=clip_norm, epochs=1, splits=small_splits(1))
        moved[clip_norm] = sum((value - start[name]).norm() ** 2 for name, value in model.state_dict().items()) ** 0.5
    assert moved[1e-3] <= 3 * 1e-3 * 1.01  # three steps of one norm
    assert moved[None] > moved[1e-3]


def test_the_recipe_and_an_accelerator_do_not_both_accumulate():
    with pytest.raises(
        UserError, match="the recipe accumulates the gradients of 2 batches, but an accelerator is given"
    ):
        train(accumulate=2, accelerator=Accelerator())


def test_processes_that_the_accelerator_does_not_know_of_are_refused(monkeypatch):
    accelerator = Accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match="2 processes were launched, the torch.distributed group has 1, and the accelerator"
    ):
        train(accelerator=accelerator)


def test_workers_load_the_same_batches():
    one, _ = train(epochs=1, splits=small_splits(1))
    two, _ = train(epochs=1, splits=small_splits(1), num_workers=1)
    assert_same_weights(one, two)


def test_an_exception_names_the_component_that_raised_it():
    def broken(embeddings, labels, mined):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        train(loss=broken)
    assert component_at_fault(caught.value) == "loss"


def test_a_result_is_printed_as_a_summary():
    _, result = train(splits=small_splits(2))
    lines = str(result).splitlines()
    assert lines[0].startswith("2 splits, 12 batches, training ")
    assert any(line.startswith("mean_average_precision ") for line in lines)
    matrix = result.scores["mean_average_precision"].scores
    assert lines[-1].split() == ["s1", *(f"{value:.3f}" for value in matrix[1])]
    assert "array" not in repr(result)


def test_a_step_log_of_every_0th_batch_is_refused(tmp_path):
    with pytest.raises(UserError, match="every must be at least 1, got 0"):
        StepLog(tmp_path, every=0)


def test_nothing_is_left_in_memory_from_split_to_split():
    """Neither tensors nor objects of other kinds, but for the scores, a list and two dicts of which every split adds."""
    counts = []

    class Count(Callback):
        def on_split_end(self, event):
            if event.split_index % 10 == 9:
                gc.collect()
                objects = gc.get_objects()
                counts.append((sum(issubclass(type(one), torch.Tensor) for one in objects), len(objects)))

    model = small_model()
    combined = Combine(model, methods=[SI(model), MAS(model), LwF(model), Replay(model, buffer_size=5)])
    evaluator = SparseEvaluator(RetrievalEvaluator(follow_index=False), every=1000)
    splits = small_splits(40, per_class=4)
    options = {"epochs": 1, "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1)}
    train(lambda _: combined, model, splits, evaluator=evaluator, callbacks=[Count()], **options)
    (tensors, objects), *_, (last_tensors, last_objects) = counts[1:]
    assert last_tensors == tensors
    assert last_objects - objects <= 20 * 20  # those of the scores of 20 splits
