"""Accuracy by the nearest class mean: means as they were stored, moved by drift compensation, and computed again."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from small import Recorder, Stopped, small_model, small_splits, train

from mas_embed import Finetune, Frozen, Part, RetrievalEvaluator, SparseEvaluator, Split, UserError, join_splits
from mas_embed.methods import Method

NAMES = ("ncm_accuracy", "ncm_accuracy_compensated", "ncm_accuracy_recomputed")
SIGMA = 0.3


def make_evaluator(**options):
    return RetrievalEvaluator(**{"recall_at": (1,), "follow_index": False, "class_means": True, **options})


def large_steps(splits=None, *, method=Finetune, **options):
    """A training whose embeddings drift so far that the three accuracies differ."""
    optimizer = partial(torch.optim.Adam, lr=0.1)
    return train(method, splits=splits, optimizer=optimizer, **{"evaluator": make_evaluator(), **options})[1]


class ModelKeeper(Method):
    """Stores a copy of the model as it was after every split."""

    def __init__(self, model):
        super().__init__(model)
        self.models = []

    def consolidate(self, batches):
        self.models.append(copy.deepcopy(self.model))


# The oracle, in plain numbers


def vectors(model, part, is_scaled):
    with torch.no_grad():
        rows = model.eval()(part.inputs).double().tolist()
    return [[value / math.hypot(*row) for value in row] if is_scaled else row for row in rows]


def means_by_class(pairs):
    """The mean of the vectors of every class, of pairs (vector, class)."""
    by_class = {}
    for vector, label in pairs:
        by_class.setdefault(label, []).append(vector)
    return {
        label: [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)] for label, rows in by_class.items()
    }


def moved(mean, old, new):
    weights = [math.exp(-(math.dist(row, mean) ** 2) / (2 * SIGMA**2)) for row in old]
    return [
        value + sum(w * (b[d] - a[d]) for w, a, b in zip(weights, old, new, strict=True)) / sum(weights)
        for d, value in enumerate(mean)
    ]


def expected_scores(models, splits, is_scaled=True):
    """By metric the matrix of accuracies, NaN for splits that are not learned, and the pooled score after every split."""
    stored, compensated = {}, {}
    matrices = {name: np.full((len(splits), len(splits)), math.nan) for name in NAMES}
    pooled = {name: [] for name in NAMES}
    for i, split in enumerate(splits):
        items = [(one, vectors(models[i], one.train, is_scaled)) for one in splits[: i + 1]]
        if i > 0:
            old, new = vectors(models[i - 1], split.train, is_scaled), items[i][1]
            compensated = {label: moved(mean, old, new) for label, mean in compensated.items()}
        fresh = means_by_class(zip(items[i][1], split.train.labels.tolist(), strict=True))
        stored, compensated = stored | fresh, compensated | fresh
        recomputed = means_by_class(
            (vector, label)
            for one, rows in items
            for vector, label in zip(rows, one.train.labels.tolist(), strict=True)
        )
        for name, means in zip(NAMES, (stored, compensated, recomputed), strict=True):
            correct = []
            for j, seen in enumerate(splits[: i + 1]):
                queries = zip(vectors(models[i], seen.query, is_scaled), seen.query.labels.tolist(), strict=True)
                found = [min(means, key=lambda c, v=v: math.dist(means[c], v)) == label for v, label in queries]
                matrices[name][i, j] = sum(found) / len(found)
                correct += found
            pooled[name].append(sum(correct) / len(correct))
    return matrices, pooled


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_accuracies_equal_those_of_the_loops(distance):
    splits = small_splits(4)
    model = small_model()
    keeper = ModelKeeper(model)
    result = large_steps(splits, method=lambda _: keeper, model=model, evaluator=make_evaluator(distance=distance))
    matrices, pooled = expected_scores(keeper.models, splits, is_scaled=distance == "cosine")
    for name in NAMES:
        np.testing.assert_array_equal(result.scores[name].scores, matrices[name])
        assert result.pooled[name] == pooled[name][-1]
        assert np.isnan(result.initial[name]).all()
    final = [result.scores[name].final_average for name in NAMES]
    assert len(set(final)) == 3  # so that none stands for another


def test_retrieval_scores_and_details_stay_as_they_are():
    plain, more = (
        large_steps(evaluator=make_evaluator(follow_index=True, class_means=class_means))
        for class_means in (False, True)
    )
    assert set(more.scores) - set(plain.scores) == set(NAMES)
    for name, matrix in plain.scores.items():
        np.testing.assert_array_equal(more.scores[name].scores, matrix.scores)
    assert more.details == plain.details


def test_a_model_that_does_not_change_has_one_accuracy():
    result = large_steps(method=Frozen)
    for name in NAMES[1:]:
        np.testing.assert_array_equal(result.scores[name].scores, result.scores[NAMES[0]].scores)


def test_training_items_are_embedded_once_by_the_same_weights():
    num_embedded = []

    class Counting(RetrievalEvaluator):
        def _embed(self, model, part):
            num_embedded.append(len(part))
            return super()._embed(model, part)

    splits = [
        Split(
            f"s{index}", Part(split.train.inputs.repeat(2, 1), split.train.labels.repeat(2)), split.query, split.gallery
        )
        for index, split in enumerate(small_splits(3))
    ]
    held_out, trained_on = len(splits[0].query), len(splits[0].train)
    for method, num_passes in ((Finetune, 1 + (1 + 2) + (1 + 3)), (Frozen, 3)):
        for follow_index in (True, False):
            num_embedded.clear()
            large_steps(splits, method=method, evaluator=Counting(class_means=True, follow_index=follow_index))
            assert num_embedded.count(trained_on) == num_passes
            assert num_embedded.count(held_out) == (2 if method is Frozen else 4) * 3


@pytest.mark.parametrize("split_index", [0, 1])
def test_resume_goes_on_with_the_stored_means(tmp_path, split_index):
    expected, checkpoint = large_steps(), tmp_path / "c.safetensors"
    stopper = Recorder(lambda event: type(event).__name__ == "SplitEnd" and event.split_index == split_index)
    with pytest.raises(Stopped):
        large_steps(checkpoint=checkpoint, callbacks=[stopper])
    resumed = large_steps(checkpoint=checkpoint, resume=True)
    for name in NAMES:
        np.testing.assert_array_equal(resumed.scores[name].scores, expected.scores[name].scores)


def test_the_state_holds_what_was_embedded_before_a_split():
    splits, models = small_splits(2), [small_model(0), small_model(1)]
    first, second = make_evaluator(), make_evaluator()
    first.evaluate(models[0], splits, -1)
    first.evaluate(models[0], splits, 0)
    first.begin_split(models[0], splits, 1)
    second.load_state_dict(first.state_dict())
    expected = first.evaluate(models[1], splits, 1)
    assert second.evaluate(models[1], splits, 1).scores == expected.scores
    assert not math.isnan(expected.pooled["ncm_accuracy_compensated"])


def test_an_evaluator_can_be_used_for_another_sequence():
    evaluator = make_evaluator()
    first, _, again = (large_steps(splits, evaluator=evaluator) for splits in (None, small_splits(2), None))
    for name in NAMES:
        np.testing.assert_array_equal(again.scores[name].scores, first.scores[name].scores)


def test_joint_training_has_the_means_of_all_splits():
    splits = small_splits()
    joint = large_steps([join_splits(splits)], evaluate_on=splits)
    for name in NAMES:
        assert joint.scores[name].scores.shape == (1, 3)
        np.testing.assert_array_equal(joint.scores[name].scores, joint.scores["ncm_accuracy_recomputed"].scores)


def test_drift_that_was_not_measured_is_not_compensated():
    """Where other splits are evaluated than trained, nobody embeds the training items before a split."""
    splits = small_splits()
    result = large_steps(splits, evaluate_on=splits)
    compensated = result.scores["ncm_accuracy_compensated"].scores
    assert np.isnan(compensated[1:]).all() and math.isnan(result.pooled["ncm_accuracy_compensated"])
    assert not np.isnan(compensated[0]).any() and not np.isnan(result.scores["ncm_accuracy"].scores).any()


def test_learned_splits_alone_are_enough():
    full = large_steps()
    sparse = large_steps(evaluator=SparseEvaluator(make_evaluator(), only_learned=True))
    for name in NAMES:
        np.testing.assert_array_equal(sparse.scores[name].scores, full.scores[name].scores)


def test_means_are_stored_at_the_first_evaluation_after_their_split():
    sparse = large_steps(small_splits(4), evaluator=SparseEvaluator(make_evaluator(), every=2))
    stored, recomputed = (sparse.scores[name].scores for name in (NAMES[0], NAMES[2]))
    np.testing.assert_array_equal(stored[1], recomputed[1])  # of both splits by the weights after the second
    assert np.isnan(stored[[0, 2]]).all() and not np.isnan(stored[3]).any()


def test_a_class_of_several_splits_has_the_mean_of_all_its_items():
    """A model that does not change gives the means of the joined split, although the splits differ in size."""
    splits = small_splits()
    first, second = splits[0], splits[1]
    extra = Part(first.train.inputs[:5] + 1, first.train.labels[:5])
    both = Part(torch.cat([second.train.inputs, extra.inputs]), torch.cat([second.train.labels, extra.labels]))
    splits[1] = Split(second.name, both, second.query, second.gallery)
    result = large_steps(splits, method=Frozen)
    for name in NAMES[:2]:
        np.testing.assert_array_equal(result.scores[name].scores, result.scores[NAMES[2]].scores)


def test_means_are_of_items_that_are_not_augmented():
    def augmented(split):
        part = Part(split.train.inputs, split.train.labels, split.train.ids, augmented=-split.train.inputs)
        return Split(split.name, part, split.query, split.gallery)

    splits, unmoved = small_splits(), partial(torch.optim.SGD, lr=0.0)
    plain = train(splits=splits, optimizer=unmoved, evaluator=make_evaluator())[1].scores["ncm_accuracy"]
    changed = train(splits=list(map(augmented, splits)), optimizer=unmoved, evaluator=make_evaluator())[1]
    assert plain.final_average > 0.5
    np.testing.assert_array_equal(changed.scores["ncm_accuracy"].scores, plain.scores)


def test_an_evaluator_without_details_has_the_same_scores():
    evaluator = make_evaluator(follow_index=True)
    assert set(evaluator.check(small_splits())) == set(evaluator.without_details().check(small_splits())) >= set(NAMES)
    whole, scores_only = (large_steps(evaluator=one) for one in (evaluator, evaluator.without_details()))
    for name in NAMES:
        np.testing.assert_array_equal(whole.scores[name].scores, scores_only.scores[name].scores)


def test_a_query_without_a_class_mean_is_refused():
    splits = small_splits()
    early = Split(
        "early", splits[0].train, splits[1].query, splits[1].gallery
    )  # its class is learned in the next split
    with pytest.raises(
        UserError, match="split 'early' has queries of class 2, but neither it nor an earlier split trains"
    ):
        large_steps([early, splits[1]])
    assert make_evaluator(class_means=False).check([early, splits[1]])


def test_options_and_states_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="take distance cosine or euclidean"):
        make_evaluator(distance="inner_product")
    with pytest.raises(UserError, match="evaluator with class_means False, but this one has True"):
        make_evaluator().load_state_dict(make_evaluator(class_means=False).state_dict())
