"""Splits that are appended to a sequence that was learned: only they are trained, with or without the data of the others."""

import math
import warnings

import pytest
import torch
from data.photographs import write_photograph
from small import pull_together, small_model, small_splits
from torch import nn

import mas_embed as me
from mas_embed import Recipe, RetrievalEvaluator, SparseEvaluator, Split, UserError, missing_split, train_sequence
from mas_embed.data import ImageFiles, empty_part

METHODS = {
    "finetune": me.Finetune,
    "mas": lambda model: me.MAS(model, strength=10),
    "local_mas": lambda model: me.LocalMAS(model, strength=10),
    "ewc": lambda model: me.EWC(model, loss=pull_together, strength=10),
    "si": lambda model: me.SI(model, strength=10),
    "lwf": me.LwF,
    "replay": me.Replay,
    "class_statistics": me.ClassStatistics,
    "frozen": me.Frozen,
    "imm": me.IMM,
}
SPLITS = small_splits(num_splits=5)


def train(path, splits, make=METHODS["mas"], **options):
    """The model, the method and the result of a sequence whose checkpoint is the path; goes on from it if it is there."""
    model = small_model()
    method = make(model)
    options = {"loss": pull_together, "evaluator": RetrievalEvaluator(recall_at=(1,)), **options}
    recipe = options.pop("recipe", Recipe(epochs=2, batch_size=4))
    result = train_sequence(model, splits, method=method, recipe=recipe, checkpoint=path, resume=True, **options)
    return model, method, result


def flat_state(state):
    """A nested state as text and lists, which compare."""
    if isinstance(state, torch.Tensor):
        return state.tolist()
    return {key: flat_state(value) for key, value in state.items()} if isinstance(state, dict) else state


def gone(split):
    return missing_split(split.name)


def rows(result, metric="mean_average_precision"):
    return result.scores[metric].scores.tolist()


@pytest.mark.parametrize("name", METHODS)
def test_three_and_two_splits_are_five_to_the_bit(tmp_path, name):
    """Weights, method and the scores after the new splits, where the old data is still there."""
    model, method, whole = train(tmp_path / "whole", SPLITS, METHODS[name])
    train(tmp_path / "parts", SPLITS[:3], METHODS[name])
    again, method_again, parts = train(tmp_path / "parts", SPLITS, METHODS[name])
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert flat_state(method_again.state_dict()) == flat_state(method.state_dict())
    assert rows(parts)[3:] == rows(whole)[3:]
    assert parts.pooled == whole.pooled and parts.num_steps == whole.num_steps and not parts.missing


def test_what_was_not_measured_of_new_splits_is_nan(tmp_path):
    _, _, three = train(tmp_path / "c", SPLITS[:3])
    _, _, five = train(tmp_path / "c", SPLITS)
    first, *_ = rows(five)
    assert first[:3] == rows(three)[0] and all(map(math.isnan, first[3:]))
    assert five.initial["recall_at_1"][:3] == three.initial["recall_at_1"]
    assert all(map(math.isnan, five.initial["recall_at_1"][3:]))
    assert not any(map(math.isnan, rows(five)[3] + rows(five)[4]))


@pytest.mark.parametrize("every", [1, 2])
def test_where_only_learned_splits_are_evaluated_nothing_differs(tmp_path, every):
    """Nor does the gallery that is never embedded again, or the index before and after a split."""

    def evaluator():
        return SparseEvaluator(RetrievalEvaluator(recall_at=(1,)), only_learned=True, every=every)

    _, _, whole = train(tmp_path / "whole", SPLITS, evaluator=evaluator())
    train(tmp_path / "parts", SPLITS[:4], evaluator=evaluator())
    _, _, parts = train(tmp_path / "parts", SPLITS, evaluator=evaluator())
    assert str(rows(parts)) == str(rows(whole))
    assert parts.details == whole.details


@pytest.mark.parametrize("name", METHODS)
def test_training_needs_no_data_of_the_old_splits(tmp_path, name):
    model, method, _ = train(tmp_path / "whole", SPLITS, METHODS[name])
    train(tmp_path / "parts", SPLITS[:3], METHODS[name])
    with pytest.warns(UserWarning, match="the data of s0, s1, s2 is missing: these splits are not evaluated"):
        again, method_again, result = train(tmp_path / "parts", [*map(gone, SPLITS[:3]), *SPLITS[3:]], METHODS[name])
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert flat_state(method_again.state_dict()) == flat_state(method.state_dict())
    last = rows(result)[-1]
    assert [math.isnan(value) for value in last] == [True, True, True, False, False]
    assert result.missing == ["s0", "s1", "s2"]
    assert "not evaluated in the end, because their data is missing: s0, s1, s2" in str(result)


def test_queries_that_are_there_are_evaluated_and_only_the_present_gallery_is_searched(tmp_path):
    train(tmp_path / "c", SPLITS[:3])
    held_out_only = Split("s1", empty_part(), SPLITS[1].query, SPLITS[1].gallery)
    with pytest.warns(UserWarning, match="the data of s0, s2 is missing"):
        model, _, result = train(tmp_path / "c", [gone(SPLITS[0]), held_out_only, gone(SPLITS[2]), *SPLITS[3:]])
    present = [SPLITS[1], *SPLITS[3:]]
    expected = RetrievalEvaluator(recall_at=(1,)).evaluate(model, present, -1).scores
    assert set(result.scores) == set(expected)  # no query is taken for one of an unseen class
    last = result.scores["mean_average_precision"].scores[-1]
    assert [last[1], last[3], last[4]] == expected["mean_average_precision"]
    stale = result.details[-1]["stale_gallery"]["mean_average_precision"]
    assert result.details[-1]["index_update"]["new_on_new"]
    assert [value is None for value in stale] == [True, False, True, False, False]


def test_data_may_vanish_and_come_back(tmp_path):
    train(tmp_path / "c", SPLITS[:2])
    with pytest.warns(UserWarning, match="the data of s0 is missing"):
        train(tmp_path / "c", [gone(SPLITS[0]), *SPLITS[1:4]])
    changed = [small_splits(num_splits=5, seed=1)[0], *SPLITS[1:]]
    with pytest.raises(UserError, match="the data of split 's0' is not what the checkpoint .* was trained with"):
        train(tmp_path / "c", changed)
    _, _, result = train(tmp_path / "c", SPLITS)
    assert not any(map(math.isnan, rows(result)[-1])) and result.missing == []


def test_files_that_are_gone_are_data_that_is_gone(tmp_path):
    def split(name, labels):
        def part(kind, copies):
            numbers = [label for label in labels for _ in range(copies)]
            paths = [tmp_path / name / kind / f"{index}.png" for index in range(len(numbers))]
            for path, label in zip(paths, numbers, strict=True):
                if not path.exists():
                    write_photograph(path, 40 * label)
            return me.Part(ImageFiles(paths, size=8), torch.tensor(numbers))

        held_out = part("held_out", 2)
        return Split(name, part("train", 4), held_out, held_out)

    splits = [split("a", [0, 1]), split("b", [2, 3]), split("c", [4, 5])]

    def run(number):
        model = me.small_conv(width=2, channels=3)
        return train_sequence(model, splits[:number], method=me.MAS(model, embed="unnormalized"), loss=pull_together,
                              recipe=Recipe(epochs=1), checkpoint=tmp_path / "checkpoint", resume=True)  # fmt: skip

    run(2)
    for path in (tmp_path / "a").rglob("*.png"):
        path.unlink()
    for path in (tmp_path / "b" / "train").rglob("*.png"):
        path.unlink()
    with pytest.warns(UserWarning, match="the data of a is missing"):
        result = run(3)
    assert [math.isnan(value) for value in rows(result)[-1]] == [True, False, False]


@pytest.mark.parametrize(("splits", "message"), [
    ([*SPLITS[:2], *SPLITS[3:]], r"its splits is \['s0', 's1', 's2'\], not \['s0', 's1', 's3', 's4'\]"),
    ([*SPLITS[3:], *SPLITS[:3]], "is of another sequence: its splits is"),
    (SPLITS[:2], "is of another sequence: its splits is"),
    ([*SPLITS[:3], gone(SPLITS[3])], "the data of split 's3' is missing, which .* has not learned yet; bring it back"),
    ([*SPLITS[:3], Split("s3", SPLITS[3].train, empty_part(), empty_part())], "the data of split 's3' is missing"),
])  # fmt: skip
def test_other_splits_are_refused(tmp_path, splits, message):
    train(tmp_path / "c", SPLITS[:3])
    with pytest.raises(UserError, match=message):
        train(tmp_path / "c", splits)


def test_a_new_sequence_needs_all_of_its_data(tmp_path):
    with pytest.raises(UserError, match="split 's0' has an empty train part"):
        train(tmp_path / "c", [gone(SPLITS[0]), *SPLITS[1:]])


def test_splits_that_a_stopped_training_had_not_reached_are_trained_too(tmp_path):
    class Stop(me.Callback):
        def on_split_end(self, event):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "c", SPLITS[:2], callbacks=[Stop()])
    model, *_ = train(tmp_path / "c", SPLITS[:3])
    expected, *_ = train(tmp_path / "whole", SPLITS[:3])
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


class Proxies(nn.Module):
    """One vector for every class; pulls embeddings to that of their class."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.vectors = nn.Parameter(torch.ones(num_classes, 4))

    def forward(self, embeddings, labels, mined=None):
        return (embeddings - self.vectors[labels]).square().mean()


def test_a_loss_may_have_more_classes_for_more_splits_and_nothing_else_new(tmp_path):
    train(tmp_path / "c", SPLITS[:3], loss=Proxies(6))
    with pytest.raises(UserError, match="its loss is .*'num_classes': 6.* not .*'num_classes': 10"):
        train(tmp_path / "c", SPLITS[:3], loss=Proxies(10))
    with pytest.raises(UserError, match="its recipe is"):
        train(tmp_path / "c", SPLITS, loss=Proxies(10), recipe=Recipe(epochs=3, batch_size=4))
    _, _, result = train(tmp_path / "c", SPLITS, loss=Proxies(10))
    assert len(rows(result)) == 5


def test_what_the_next_splits_are_consolidated_on_may_be_other_data(tmp_path):
    first, second = SPLITS[0].train.inputs, SPLITS[3].train.inputs
    train(tmp_path / "c", SPLITS[:3], importance_data=first)
    with pytest.raises(UserError, match="its importance_data is"):
        train(tmp_path / "c", SPLITS[:3], importance_data=second)
    train(tmp_path / "c", SPLITS, importance_data=second)


def test_means_of_classes_need_the_old_data(tmp_path):
    def evaluator():
        return RetrievalEvaluator(recall_at=(1,), class_means=True)

    train(tmp_path / "c", SPLITS[:2], evaluator=evaluator())
    with (
        pytest.warns(UserWarning, match="is missing"),
        pytest.raises(UserError, match="class_means needs the training items of all splits learned so far"),
    ):
        train(tmp_path / "c", [gone(SPLITS[0]), *SPLITS[1:3]], evaluator=evaluator())


def test_a_finished_sequence_says_nothing_of_data_that_it_does_not_need(tmp_path):
    train(tmp_path / "c", SPLITS[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tmp_path / "c", SPLITS[:2])
