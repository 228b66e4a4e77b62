import math
from functools import partial

import pytest
from accelerate import tracking
from small import Recorder, Stopped, pull_together, small_model, small_splits, train
from tiny_experiment import TINY, load_from

from mas_embed import MAS, Callback, UserError, run_experiment
from mas_embed.training import Tracker

RUNS = []


class InMemory(tracking.GeneralTracker):
    """Keeps what is logged, and says when it was closed."""

    name, requires_logging_directory = "in_memory", False

    def __init__(self, run_name, **options):
        self.run_name, self.options, self.config, self.logged, self.is_closed = run_name, options, None, [], False
        RUNS.append(self)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None):
        assert not self.is_closed
        self.logged.append((step, values))

    def finish(self):
        self.is_closed = True


@pytest.fixture(autouse=True)
def in_memory(monkeypatch):
    RUNS.clear()
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "in_memory", InMemory)


class Steps(Callback):
    def __init__(self):
        self.events = []

    def on_step_end(self, event):
        self.events.append(event)


mas = partial(MAS, strength=3.0)


def test_what_is_logged(tmp_path):
    steps = Steps()
    callbacks = [Tracker(tmp_path, log_with="in_memory", every=2, options={"tags": ["a"]}), steps]
    _, result = train(mas, splits=small_splits(2), loss=lambda *batch: pull_together(*batch) + 1, callbacks=callbacks)
    (run,) = RUNS
    assert (run.run_name, run.options, run.is_closed) == ("mas-embed MAS seed 0", {"tags": ["a"]}, True)
    of_steps = [(step, values) for step, values in run.logged if "train/loss" in values]
    # 12 items in batches of 4, 2 epochs, 2 splits: every second of 12 steps
    assert [step for step, _ in of_steps] == [2, 4, 6, 8, 10, 12]
    for (_, values), event in zip(of_steps, steps.events[1::2], strict=True):
        loss, penalty = float(event.loss), float(event.penalty)
        assert values["train/loss"] == loss and values["train/penalty"] == penalty
        assert values["train/gradient_norm"] == float(event.gradient_norm) > 0
        assert values["train/learning_rate"] == event.learning_rate
        if loss + penalty > 0:
            assert values["train/penalty_share"] == pytest.approx(penalty / (loss + penalty))
    assert any(values.get("train/penalty_share", 0) > 0 for _, values in of_steps[3:])
    scores = {step: values for step, values in run.logged if "recall_at_1/split 1" in values}
    assert scores.keys() == {6, 12}
    assert scores[12]["recall_at_1/split 2"] == result.scores["recall_at_1"].scores[1, 1]
    step, last = run.logged[-1]
    assert (step, last["recall_at_1/forgetting"]) == (12, result.scores["recall_at_1"].forgetting)
    assert last["recall_at_1/final_average"] == result.scores["recall_at_1"].final_average


@pytest.mark.parametrize("clip_norm", [None, 1e-3])
def test_the_gradient_norm_is_that_before_clipping(tmp_path, clip_norm):
    """One step on all items at once, against one plain backward pass."""
    splits = small_splits(1)
    train(
        splits=splits,
        batch_size=12,
        epochs=1,
        clip_norm=clip_norm,
        callbacks=[Tracker(tmp_path, log_with="in_memory", every=1)],
    )
    model, data = small_model(), splits[0].train
    pull_together(model(data.inputs), data.labels).backward()
    squares = sum(float(value) ** 2 for parameter in model.parameters() for value in parameter.grad.flatten())
    assert RUNS[0].logged[0][1]["train/gradient_norm"] == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_nobody_pays_for_a_norm_that_nobody_wants():
    steps = Steps()
    train(callbacks=[steps])
    assert {event.gradient_norm for event in steps.events} == {None}


def test_where_gradients_are_added_up_only_the_optimizers_steps_have_a_norm():
    steps = Steps()
    steps.wants_gradient_norm = True
    train(splits=small_splits(1), epochs=1, batch_size=4, accumulate=3, callbacks=[steps])
    assert [event.gradient_norm is None for event in steps.events] == [True, True, False]


def test_a_resumed_training_goes_on_with_its_steps(tmp_path):
    options = {"checkpoint": tmp_path / "c.safetensors", "resume": True}
    stop = Recorder(lambda event: event.split_index == 1 and getattr(event, "epoch", -1) == 0)
    with pytest.raises(Stopped):
        train(mas, callbacks=[Tracker(tmp_path, log_with="in_memory", every=1), stop], **options)
    assert RUNS[0].is_closed
    train(mas, callbacks=[Tracker(tmp_path, log_with="in_memory", every=1)], **options)
    first, second = ([step for step, values in run.logged if "train/loss" in values] for run in RUNS)
    assert first == list(range(1, 10))
    assert second == list(range(7, 19))  # the second split again
    train(mas, callbacks=[Tracker(tmp_path, log_with="in_memory", every=1)])  # anew
    assert RUNS[2].logged[0][0] == 1


def test_tensorboard_by_one_line_of_a_config(tmp_path, blank_pictures):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    methods = ["finetune", {"name": "mas", "label": "strong", "strength": 10, "output": "projection"}]
    callbacks = [
        {"name": "tracker", "log_with": "tensorboard", "every": 1},
        {"name": "tracker", "log_with": "in_memory"},
    ]
    config = load_from(tmp_path, TINY | {"seeds": [3], "methods": methods, "callbacks": callbacks})
    results = run_experiment(config, tmp_path / "run")
    for record in results.runs:
        events = EventAccumulator(str(tmp_path / "run" / record.method / "seed3" / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("train/loss")] == list(range(1, record.num_steps + 1))
        (final,) = events.Scalars("mean_average_precision/final_average")
        assert final.value == pytest.approx(record.measures["mean_average_precision"]["final_average"])
        assert final.step == record.num_steps
    assert [run.run_name for run in RUNS] == ["tiny finetune seed 3", "tiny strong seed 3"]
    assert RUNS[1].config["method.strength"] == 10 and RUNS[1].config["seed"] == 3
    assert RUNS[1].config["training.epochs"] == 1 and "methods" not in RUNS[1].config
    assert run_experiment(config, tmp_path / "run", resume=True) == results
    again = run_experiment(config, tmp_path / "run", overwrite=True)
    events = EventAccumulator(str(tmp_path / "run" / "strong" / "seed3" / "tensorboard")).Reload()
    assert len(events.Scalars("train/loss")) == again.runs[1].num_steps  # those of the run before are hidden


def test_trackers_that_cannot_be_used(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown tracker in log_with 'tensorbord': did you mean 'tensorboard'"):
        Tracker(tmp_path, log_with="tensorbord")
    with pytest.raises(UserError, match="every must be at least 1"):
        Tracker(tmp_path, log_with="in_memory", every=0)

    def missing(name):
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr("mas_embed.training.tracker.import_module", missing)
    with pytest.raises(
        UserError, match=r"log_with=wandb needs wandb, .*; install it with pip install 'mas-embed\[wandb\]'"
    ):
        Tracker(tmp_path, log_with="wandb")
    with pytest.raises(UserError, match="install it with pip install aim$"):
        Tracker(tmp_path, log_with="aim")


def test_only_the_first_process_logs(tmp_path, monkeypatch):
    monkeypatch.setattr("mas_embed.training.tracker.process_rank", lambda: 1)
    train(callbacks=[Tracker(tmp_path, log_with="in_memory")])
    assert RUNS == [] and list(tmp_path.iterdir()) == []
