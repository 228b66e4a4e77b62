"""What an evaluator records for the report, against plain loops over the models of every split."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from small import Recorder as Stopper
from small import Stopped, small_model, small_splits, train

from mas_embed import Callback, Finetune, Part, RetrievalEvaluator, SparseEvaluator, Split, evaluate_retrieval
from mas_embed.evaluation import observations_of
from mas_embed.evaluation import recorder as recorder_module


class Observer(Callback):
    """Keeps the weights and what the evaluator has recorded after every split."""

    def __init__(self, model, evaluator):
        self.model, self.evaluator = model, evaluator
        self.weights, self.observations = [], []

    def on_split_end(self, event):
        self.weights.append({name: value.clone() for name, value in self.model.state_dict().items()})
        self.observations.append(observations_of(self.evaluator))


def train_and_observe(make_method=Finetune, splits=None, evaluator=None, seed=0, **options):
    model = small_model(seed)
    evaluator = evaluator or RetrievalEvaluator(recall_at=(1,))
    observer = Observer(model, evaluator)
    train(make_method, model, splits, evaluator=evaluator, callbacks=[observer], **options)
    return observer


def embed_with(weights, inputs):
    model = small_model()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.eval()(inputs).double()


def neighbours_by_loops(weights, splits, split, index, k=5):
    """Split, position, class and cosine of the k nearest gallery items of a query, by a full sort."""
    query, query_id = embed_with(weights, splits[split].query.inputs)[index], int(splits[split].query.ids[index])
    found = []
    for number, one in enumerate(splits):
        for position, row in enumerate(embed_with(weights, one.gallery.inputs)):
            if int(one.gallery.ids[position]) != query_id:
                cosine = float(query @ row / query.norm() / row.norm())
                found.append((-cosine, number, position, int(one.gallery.labels[position])))
    return [(number, position, label, -negative) for negative, number, position, label in sorted(found)[:k]]


def as_rows(neighbours, q):
    return list(
        zip(
            neighbours.split[q].tolist(),
            neighbours.index[q].tolist(),
            neighbours.label[q].tolist(),
            neighbours.similarity[q].tolist(),
            strict=True,
        )
    )


def test_neighbours_are_those_of_the_model_when_it_had_learned_a_split_and_of_the_last_one():
    splits = small_splits()
    observer = train_and_observe(splits=splits)
    for after, observed in enumerate(observer.observations):
        queries = observed.queries
        assert len(queries.split) == sum(len(split.query) for split in splits)  # all of them, as there are so few
        for q in range(0, len(queries.split), 5):
            split, index = int(queries.split[q]), int(queries.index[q])
            assert queries.label[q] == splits[split].query.labels[index]
            if split > after:
                assert (queries.learned.label[q] == -1).all() and (queries.now.split[q] == -1).all()
                assert math.isnan(queries.score_learned[q]) and math.isnan(queries.fall[q])
                continue
            for neighbours, model in ((queries.learned, split), (queries.now, after)):
                expected = neighbours_by_loops(observer.weights[model], splits, split, index)
                for found, wanted in zip(as_rows(neighbours, q), expected, strict=True):
                    assert found[3] == pytest.approx(wanted[3], abs=1e-5)  # near ties may be in another order
                    if abs(wanted[3] - expected[-1][3]) > 1e-5 and len({round(e[3], 5) for e in expected}) == 5:
                        assert found[:3] == wanted[:3]
        assert (queries.learned_is_right == (queries.learned.label == queries.label[:, None])).all()


def average_precision(weights, splits):
    rows = torch.cat([embed_with(weights, split.query.inputs) for split in splits])
    labels, ids = (torch.cat([getattr(split.query, name) for split in splits]) for name in ("labels", "ids"))
    scores = evaluate_retrieval(rows, labels, rows, labels, query_ids=ids, gallery_ids=ids)
    return scores.per_query["average_precision"], labels.numpy()


def test_scores_of_queries_and_classes_after_every_split():
    splits = small_splits()
    observer = train_and_observe(splits=splits)
    observed, per_split = observer.observations[-1], len(splits[0].query)
    rows = [average_precision(weights, splits)[0] for weights in observer.weights]
    np.testing.assert_allclose(observed.queries.scores, np.stack(rows), atol=1e-6)
    assert observed.queries.rows.tolist() == [0, 1, 2]
    for q, split in enumerate(observed.queries.split):
        assert observed.queries.fall[q] == pytest.approx(rows[split][q] - rows[2][q], abs=1e-6)
    classes, labels = observed.classes, torch.cat([split.query.labels for split in splits]).numpy()
    assert classes.label.tolist() == list(range(6)) and classes.split.tolist() == [0, 0, 1, 1, 2, 2]
    for c in range(6):
        of_class = [q for q in range(len(labels)) if labels[q] == c]
        assert classes.num_queries[c] == len(of_class) == per_split // 2
        assert classes.learned[c] == pytest.approx(np.mean([rows[c // 2][q] for q in of_class]), abs=1e-6)
        assert classes.now[c] == pytest.approx(np.mean([rows[2][q] for q in of_class]), abs=1e-6)


def test_new_confusions_are_counted():
    splits = small_splits()
    observer = train_and_observe(splits=splits, epochs=30)
    queries = observer.observations[-1].queries
    learned, now = Counter(), Counter()
    for q, label in enumerate(queries.label.tolist()):
        for counts, neighbours in ((learned, queries.learned), (now, queries.now)):
            nearest = int(neighbours.label[q, 0])
            if nearest != label:
                counts[label, nearest] += 1
    expected = {pair: (learned[pair], number) for pair, number in now.items() if number > learned[pair]}
    found = queries.confusions()
    assert {(one.label, one.nearest): (one.learned, one.now) for one in found} == expected
    gains = [one.now - one.learned for one in found]
    assert gains == sorted(gains, reverse=True)
    assert all(one.split == one.label // 2 and one.nearest_split == one.nearest // 2 for one in found)
    assert all(one.num_queries == 6 for one in found)
    assert queries.confusions(most=1) == found[:1]


def test_the_map_holds_items_and_class_means_of_both_times():
    splits = small_splits()
    observer = train_and_observe(splits=splits)
    recorded = observer.observations[-1].map

    def rows_of(weights, split, chosen):
        rows = embed_with(weights, splits[split].gallery.inputs[chosen])
        return rows / rows.norm(dim=1, keepdim=True)  # cosines are compared

    learned = [rows_of(observer.weights[s], s, [i])[0] for s, i in zip(recorded.split, recorded.index, strict=True)]
    now = [rows_of(observer.weights[2], s, [i])[0] for s, i in zip(recorded.split, recorded.index, strict=True)]
    embedded = torch.stack([*learned, *now])
    coordinates = torch.from_numpy(np.concatenate([recorded.learned, recorded.now])).double()
    # Four components of four dimensions: distances are those of the embeddings, and the columns are those of a PCA
    torch.testing.assert_close(
        torch.cdist(coordinates, coordinates), torch.cdist(embedded, embedded), atol=1e-5, rtol=0
    )
    covariance = coordinates.T @ coordinates / len(coordinates)
    variances = covariance.diagonal()
    torch.testing.assert_close(covariance, torch.diag(variances), atol=1e-6, rtol=0)
    assert (variances[:-1] >= variances[1:] - 1e-9).all()
    np.testing.assert_allclose(recorded.explained, variances / variances.sum(), atol=1e-5)
    assert recorded.mean_label.tolist() == list(range(6))
    for c in range(6):
        chosen = splits[c // 2].gallery.labels == c
        mean = rows_of(observer.weights[c // 2], c // 2, chosen).mean(0)
        found = torch.from_numpy(recorded.mean_learned[c]).double()
        torch.testing.assert_close((found - coordinates).norm(dim=1), (mean - embedded).norm(dim=1), atol=1e-5, rtol=0)


def test_the_map_has_no_rows_of_splits_that_are_not_learned():
    first = train_and_observe().observations[0].map
    assert (np.isnan(first.now).all(1) == (first.split > 0)).all()
    assert (np.isnan(first.mean_learned).all(1) == (first.mean_split > 0)).all()


def test_the_sample_depends_on_the_splits_alone_and_is_bounded(monkeypatch):
    splits = small_splits(per_class=20)
    some = RetrievalEvaluator(recorded_queries=7)
    other = RetrievalEvaluator(recorded_queries=7, distance="euclidean")
    a = train_and_observe(splits=splits, evaluator=some).observations[-1].queries
    b = train_and_observe(Finetune, splits, other, seed=3).observations[-1].queries
    assert a.index.tolist() == b.index.tolist() and a.split.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert any(a.index[:7] != a.index[7:14])  # not the same positions in every split
    monkeypatch.setattr(recorder_module, "MOST_QUERIES", 10)
    few = train_and_observe(splits=splits).observations[-1].queries
    assert len(few.split) == 9
    assert (a.similarity_name, b.similarity_name) == ("cosine", "negative squared distance")


def test_nothing_is_recorded_unless_it_is_asked_for(tmp_path):
    evaluator = RetrievalEvaluator(recorded_queries=0)
    checkpoint = tmp_path / "c.safetensors"  # of a state in which every array is empty
    assert train_and_observe(evaluator=evaluator, checkpoint=checkpoint).observations == [None] * 3
    assert RetrievalEvaluator().without_details().recorded_queries == 0
    assert RetrievalEvaluator().observations() is None


def same(one, other):
    """Whether two records are equal, bit for bit."""
    for name, value in vars(one).items():
        counterpart = getattr(other, name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, counterpart, err_msg=name)
        elif hasattr(value, "__dict__"):
            same(value, counterpart)
        else:
            assert value == counterpart
    return True


@pytest.mark.parametrize("split_index", [0, 1])
def test_what_is_recorded_is_the_same_after_a_resume(tmp_path, split_index):
    expected = train_and_observe().observations[-1]
    stopper = Stopper(lambda event: type(event).__name__ == "SplitEnd" and event.split_index == split_index)
    with pytest.raises(Stopped):
        train(checkpoint=tmp_path / "c.safetensors", callbacks=[stopper])
    evaluator = RetrievalEvaluator(recall_at=(1,))
    train(checkpoint=tmp_path / "c.safetensors", resume=True, evaluator=evaluator)
    assert same(evaluator.observations(), expected)


def test_a_state_without_a_record_is_accepted():
    evaluator = RetrievalEvaluator()
    state = {name: value for name, value in evaluator.state_dict().items() if name != "recorder"}
    evaluator.load_state_dict(state)
    assert evaluator.observations() is None


def test_another_sequence_is_recorded_anew():
    evaluator = RetrievalEvaluator(recall_at=(1,))
    first = train_and_observe(evaluator=evaluator).observations[-1]
    train_and_observe(evaluator=evaluator, splits=small_splits(2))
    assert same(train_and_observe(evaluator=evaluator).observations[-1], first)


def test_fewer_evaluations_of_fewer_splits():
    splits = small_splits()
    evaluator = SparseEvaluator(RetrievalEvaluator(recall_at=(1,)), every=2, only_learned=True)
    observer = train_and_observe(splits=splits, evaluator=evaluator)
    assert observer.observations[0] is None  # not evaluated after the first split
    middle, last = observer.observations[1].queries, observer.observations[2].queries
    assert middle.rows.tolist() == [1] and last.rows.tolist() == [1, 2]
    assert (np.isnan(middle.scores[0]) == (middle.split == 2)).all()
    assert middle.now.split.max() == 1  # the last split is in no gallery yet
    q = int(np.flatnonzero(last.split == 0)[0])
    expected = neighbours_by_loops(observer.weights[1], splits[:2], 0, int(last.index[q]))
    np.testing.assert_allclose(last.learned.similarity[q], [one[3] for one in expected], atol=1e-5)


def test_joint_training_learns_all_splits_at_once():
    splits = small_splits()
    observer = train_and_observe(splits=splits[:1], evaluate_on=splits)
    (observed,) = observer.observations
    assert observed.queries.rows.tolist() == [2]
    assert observed.queries.is_learned.all() and (observed.queries.fall == 0).all()


def test_queries_that_are_not_in_the_gallery_and_small_galleries():
    splits = []
    for split in small_splits(2, per_class=2):
        gallery = Part(split.train.inputs, split.train.labels)  # with ids of their own
        splits.append(Split(split.name, split.train, split.query, gallery))
    splits = splits[:1]
    observed = train_and_observe(splits=splits).observations[-1]
    assert (observed.queries.now.index[:, :4] >= 0).all() and (observed.queries.now.index[:, 4] == -1).all()
    assert np.isnan(observed.queries.now.similarity[:, 4]).all()


def test_splits_that_are_appended_are_sampled_too():
    splits = small_splits(3)
    model, evaluator = small_model(), RetrievalEvaluator(recall_at=(1,))
    for after in (-1, 0, 1):
        evaluator.evaluate(model, splits[:2], after)
    before = evaluator.observations()
    resumed = RetrievalEvaluator(recall_at=(1,))
    resumed.load_state_dict(evaluator.state_dict())
    resumed.evaluate(model, splits, 2)
    found = resumed.observations()
    num_before = len(before.queries.split)
    assert set(found.queries.split[num_before:].tolist()) == {2}
    assert np.isnan(found.queries.scores[:2, num_before:]).all() and not np.isnan(found.queries.scores[2]).any()
    np.testing.assert_array_equal(found.queries.score_learned[:num_before], before.queries.score_learned)
    np.testing.assert_array_equal(found.queries.learned.index[:num_before], before.queries.learned.index)
    assert found.classes.label.tolist() == list(range(6)) and not np.isnan(found.classes.now).any()
    assert set(found.map.split.tolist()) == {0, 1, 2} and not np.isnan(found.map.now).any()


def test_other_splits_than_those_that_were_sampled_are_not_recorded():
    evaluator, model = RetrievalEvaluator(recall_at=(1,)), small_model()
    evaluator.evaluate(model, small_splits(2), 0)
    evaluator.evaluate(model, small_splits(2)[::-1], 1)
    assert evaluator.observations() is None
    resumed = RetrievalEvaluator(recall_at=(1,))
    resumed.load_state_dict(evaluator.state_dict())
    resumed.evaluate(model, small_splits(2), 1)
    assert resumed.observations() is None
