"""The accuracies against loops and by hand, on a model that gives its inputs as class scores."""

import math

import pytest
import torch
from torch import nn

from mas_embed import Part, Split, UserError
from mas_embed.evaluation import BEFORE_FIRST, ScoreMatrix, check_evaluable
from mas_embed.recognition import RECOGNITION_METRICS, RecognitionEvaluator

CLASSES = [2, 3, 1]


def split_of(scores, labels, name):
    part = Part(torch.as_tensor(scores), torch.as_tensor(labels))
    return Split(name, part, part, part)


def random_splits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ranges, sizes = [(0, 2), (2, 5), (5, 6)], (11, 5, 3)
    return [
        split_of(
            torch.randn(size, 6, generator=generator), torch.randint(low, high, (size,), generator=generator), f"s{low}"
        )
        for (low, high), size in zip(ranges, sizes, strict=True)
    ]


def evaluate(splits, **options):
    return RecognitionEvaluator(CLASSES, **{"batch_size": 4, **options}).evaluate(nn.Identity(), splits, BEFORE_FIRST)


def correct_by_loops(split):
    """For every image whether its class wins in its own head, and among all classes."""
    own, every = [], []
    for scores, label in zip(split.query.inputs.tolist(), split.query.labels.tolist(), strict=True):
        head = next(group for group in ([0, 1], [2, 3, 4], [5]) if label in group)
        own.append(max(head, key=lambda c: scores[c]) == label)
        every.append(max(range(6), key=lambda c: scores[c]) == label)
    return own, every


def test_against_loops():
    splits = random_splits()
    evaluation = evaluate(splits)
    assert tuple(evaluation.scores) == tuple(evaluation.pooled) == RECOGNITION_METRICS
    found = [correct_by_loops(split) for split in splits]
    for position, metric in enumerate(RECOGNITION_METRICS):
        by_split = [one[position] for one in found]
        assert evaluation.scores[metric] == [sum(values) / len(values) for values in by_split]
        assert evaluation.pooled[metric] == sum(map(sum, by_split)) / 19
    assert evaluation.scores["accuracy"][2] == 1  # a head of one class
    assert evaluation.details is None


def test_by_hand():
    scores = [[1.0, 2, 9, 0, 0, 0], [3.0, 2, 0, 0, 0, 0], [0.0, 0, 0, 5, 0, 0]]
    evaluation = evaluate([split_of(scores[:2], [1, 0], "a"), split_of(scores[2:], [2], "b")], by_class=True)
    assert evaluation.scores == {"accuracy": [1.0, 0.0], "accuracy_all_heads": [0.5, 0.0]}
    assert evaluation.pooled == {"accuracy": 2 / 3, "accuracy_all_heads": 1 / 3}
    assert evaluation.details.class_accuracy == {"a": {"0": 1.0, "1": 1.0}, "b": {"2": 0.0}}


def test_details_by_the_names_of_classes_and_none_without():
    names = [["cat", "dog"], ["cat", "cow", "hen"], ["1"]]
    splits = random_splits()
    evaluator = RecognitionEvaluator(CLASSES, class_names=names, by_class=True)
    details = evaluator.evaluate(nn.Identity(), splits, BEFORE_FIRST).details_as_dict["class_accuracy"]
    own, _ = correct_by_loops(splits[0])
    cats = [is_correct for is_correct, label in zip(own, splits[0].query.labels.tolist(), strict=True) if label == 0]
    assert details["s0"]["cat"] == sum(cats) / len(cats)
    assert details["s5"] == {"1": 1.0}
    without = evaluator.without_details().evaluate(nn.Identity(), splits, BEFORE_FIRST)
    assert without.details is None
    assert without.scores == evaluate(splits).scores


def test_the_first_splits_of_a_sequence_are_evaluated_alike():
    splits = random_splits()
    assert evaluate(splits[:2]).scores["accuracy_all_heads"] == evaluate(splits).scores["accuracy_all_heads"][:2]


def test_the_forgetting_of_the_authors_is_the_negative_backward_transfer():
    accuracy = ScoreMatrix([[0.8, 0.1, 0.1], [0.9, 0.7, 0.2], [0.5, 0.6, 0.9]])
    drops = [0.8 - 0.5, 0.7 - 0.6]  # from right after learning to the end
    assert -accuracy.backward_transfer == pytest.approx(sum(drops) / 2)
    assert accuracy.forgetting == pytest.approx((0.9 - 0.5 + 0.7 - 0.6) / 2)  # from the best so far


def test_what_cannot_be_evaluated_is_refused():
    splits = random_splits()
    assert check_evaluable(RecognitionEvaluator(CLASSES), splits) == RECOGNITION_METRICS
    with pytest.raises(UserError, match="the labels of split 's5' must be from 0 to 4, .* got 5 to 5"):
        RecognitionEvaluator([2, 3]).check(splits)
    with pytest.raises(UserError, match=r"7 classes, so class scores must have shape \[N, 7\], got \[11, 6\]"):
        RecognitionEvaluator([2, 3, 2]).evaluate(nn.Identity(), splits, BEFORE_FIRST)
    splits[1].query.inputs[0, 0] = torch.nan
    with pytest.raises(UserError, match="the class scores of split 's2' are not finite"):
        evaluate(splits)


@pytest.mark.parametrize("names", [[["a", "b"]], [["a", "a"], ["b", "c", "d"], ["e"]], [["a"], ["b", "c", "d"], ["e"]]])
def test_names_must_fit_the_classes(names):
    with pytest.raises(UserError, match="class_names must hold, for every split, as many different names"):
        RecognitionEvaluator(CLASSES, class_names=names)


def test_the_state_is_that_of_the_same_settings():
    evaluator = RecognitionEvaluator(CLASSES)
    evaluator.load_state_dict(evaluator.state_dict())
    with pytest.raises(UserError, match=r"an evaluator with classes_per_split \[2, 3, 1\], but this one has \[2, 3\]"):
        RecognitionEvaluator([2, 3]).load_state_dict(evaluator.state_dict())


def test_images_are_recorded_with_the_classes_of_the_highest_scores():
    splits = random_splits()
    evaluator = RecognitionEvaluator(CLASSES)
    evaluator.evaluate(nn.Identity(), splits, BEFORE_FIRST)
    evaluation = evaluator.evaluate(nn.Identity(), splits, 1)
    recorded = evaluator.observations()
    queries = recorded.queries
    assert (queries.kind, queries.neighbour_kind, recorded.map) == ("item", "label", None)
    assert len(queries.split) == 19 and queries.rows.tolist() == [1]
    for q, (split, index) in enumerate(zip(queries.split, queries.index, strict=True)):
        scores, label = splits[split].query.inputs[index].double(), int(splits[split].query.labels[index])
        assert queries.label[q] == label
        own = [[0, 1], [2, 3, 4], [5]][split]  # classes of the split of the image, as which it is known to be one
        assert queries.scores[0, q] == pytest.approx(1 / sum(float(scores[c]) >= float(scores[label]) for c in own))
        if split == 2:  # not learned yet
            assert (queries.now.label[q] == -1).all()
            continue
        best = sorted(own, key=lambda c, scores=scores: -float(scores[c]))
        missing = 5 - len(own)
        assert queries.now.label[q].tolist() == [*best, *[-1] * missing]
        total = sum(math.exp(float(scores[c])) for c in own)
        shares = [math.exp(float(scores[c])) / total for c in best] + [math.nan] * missing
        assert queries.now.similarity[q].tolist() == pytest.approx(shares, rel=1e-5, nan_ok=True)
        assert queries.now.split[q].tolist() == [*[split] * len(own), *[-1] * missing]
    # The same accuracy among the classes of each split, and of all
    details = evaluation.details
    assert details.all_galleries == {"accuracy": evaluation.scores["accuracy_all_heads"][:2]}
    assert details.own_gallery == {"accuracy_all_heads": evaluation.scores["accuracy"][:2]}
    other = RecognitionEvaluator(CLASSES)
    other.load_state_dict(evaluator.state_dict())
    assert other.observations().queries.now.label.tolist() == queries.now.label.tolist()
    none = RecognitionEvaluator(CLASSES, recorded_queries=0)
    assert none.evaluate(nn.Identity(), splits, 0).scores == evaluation.scores and none.observations() is None
