"""How every split is ranked, and what training does to vectors that were stored before it."""

from functools import partial

import numpy as np
import pytest
import torch
from small import Recorder, Stopped, small_model, small_splits, train

from mas_embed import Finetune, Frozen, RetrievalEvaluator, Split, UserError, compare_indexes, evaluate_retrieval
from mas_embed.data import Part
from mas_embed.methods import Method


class ModelKeeper(Method):
    """Stores a copy of the model as it was after every split."""

    def __init__(self, model):
        super().__init__(model)
        self.models = []

    def consolidate(self, batches):
        self.models.append({name: value.clone() for name, value in self.model.state_dict().items()})


def train_and_keep(splits):
    """The models after every split, and the result."""
    model = small_model()
    keeper = ModelKeeper(model)
    _, result = train(lambda _: keeper, model, splits)
    return keeper.models, result


def embed_with(weights, inputs):
    model = small_model()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.eval()(inputs)


def test_items_keep_the_vector_of_the_split_in_which_they_were_learned():
    splits = small_splits()
    models, result = train_and_keep(splits)
    gallery_labels = torch.cat([split.gallery.labels for split in splits])
    gallery_ids = torch.cat([split.gallery.ids for split in splits])
    assert result.details[0]["stale_gallery"] is None  # no vector is older than the model
    for after in (1, 2):
        gallery = [
            embed_with(models[min(index, after)], split.gallery.inputs)
            for index, split in enumerate(splits[: after + 1])
        ]
        gallery += [embed_with(models[after], split.gallery.inputs) for split in splits[after + 1 :]]
        for index, split in enumerate(splits):
            expected = evaluate_retrieval(
                embed_with(models[after], split.query.inputs), split.query.labels, torch.cat(gallery), gallery_labels,
                query_ids=split.query.ids, gallery_ids=gallery_ids, recall_at=(1,),
            )  # fmt: skip
            found = result.details[after]["stale_gallery"]["mean_average_precision"][index]
            assert found == pytest.approx(expected.mean_average_precision)


def test_an_index_is_compared_across_each_split_on_the_splits_before_it():
    splits = small_splits()
    models, result = train_and_keep(splits)
    updates = [details["index_update"] for details in result.details]
    assert updates[0] is None
    assert [update["after"] for update in updates[1:]] == [split.name for split in splits[1:]]
    before = [split.query for split in splits[:2]]  # the small splits' queries are their gallery
    labels, ids = (torch.cat([getattr(part, name) for part in before]) for name in ("labels", "ids"))
    old, new = (torch.cat([embed_with(weights, part.inputs) for part in before]) for weights in models[1:3])
    fit_on = tuple(embed_with(weights, splits[2].train.inputs) for weights in models[1:3])
    expected = compare_indexes(old, new, old, new, labels, labels, query_ids=ids, gallery_ids=ids, fit_on=fit_on,
                               k=min(10, len(labels) - 1)).as_dict()  # fmt: skip
    found = updates[2]
    assert found["verdict"] == expected["verdict"]
    assert found["new_on_old"]["r_precision"] == pytest.approx(expected["new_on_old"]["r_precision"])
    for name, scores in expected["compensated"].items():
        assert found["compensated"][name]["mean_average_precision"] == pytest.approx(scores["mean_average_precision"])
    assert found["drift"]["mean"] == pytest.approx(expected["drift"]["mean"], abs=1e-6)


def test_a_model_that_does_not_change_keeps_its_index():
    for make_method, options in ((Frozen, {}), (Finetune, {"optimizer": partial(torch.optim.SGD, lr=0.0)})):
        _, result = train(make_method, **options)
        updates = [details["index_update"] for details in result.details[1:]]
        assert [update["verdict"] for update in updates] == ["keep", "keep"]
        assert all(update["churn"] == update["drift"]["mean"] == 0 for update in updates)
        for name, matrix in result.scores.items():
            for row, details in zip(matrix.scores[1:], result.details[1:], strict=True):
                assert details["stale_gallery"][name] == row.tolist()


def test_no_index_is_followed_unless_it_is_asked_for():
    _, result = train(evaluator=RetrievalEvaluator(follow_index=False, own_galleries=False))
    assert result.details == [{}] * 3


def test_where_other_splits_are_evaluated_no_update_of_their_index_is_seen():
    splits = small_splits()
    _, result = train(splits=splits[:1], evaluate_on=splits)
    (details,) = result.details
    assert details["stale_gallery"] is None and details["index_update"] is None
    assert len(details["own_gallery"]["mean_average_precision"]) == len(splits)  # all of them count as learned


class CountingModel(torch.nn.Module):
    """Counts the items that it embeds in eval mode."""

    def __init__(self):
        super().__init__()
        self.inner = small_model()
        self.num_embedded = 0

    def forward(self, inputs):
        if not self.training:
            type(self).total += len(inputs)
        return self.inner(inputs)


def test_every_held_out_item_is_embedded_once_by_the_same_weights():
    splits, num_held_out = small_splits(), sum(len(split.gallery) for split in small_splits())
    num_train = len(splits[0].train)
    for make_method, num_evaluations, num_trained_on in ((Finetune, 4, 2 * 2), (Frozen, 2, 2)):
        CountingModel.total = 0
        train(make_method, CountingModel(), splits)
        # Training inputs before and after each update but the first, to fit compensations on; once if no weight has changed
        assert CountingModel.total == num_evaluations * num_held_out + num_trained_on * num_train


def test_an_evaluator_can_be_used_for_another_sequence():
    evaluator = RetrievalEvaluator(recall_at=(1,))
    _, first = train(evaluator=evaluator)
    _, other = train(evaluator=evaluator, splits=small_splits(2))
    _, again = train(evaluator=evaluator)
    assert again.details == first.details
    assert len(other.details) == 2


@pytest.mark.parametrize("split_index", [0, 1])
def test_resume_goes_on_with_the_stale_gallery(tmp_path, split_index):
    _, expected = train()
    checkpoint = tmp_path / "c.safetensors"
    stopper = Recorder(lambda event: type(event).__name__ == "SplitEnd" and event.split_index == split_index)
    with pytest.raises(Stopped):
        train(checkpoint=checkpoint, callbacks=[stopper])
    _, resumed = train(checkpoint=checkpoint, resume=True)
    assert resumed.details == expected.details
    for name, matrix in expected.scores.items():
        np.testing.assert_array_equal(matrix.scores, resumed.scores[name].scores)


def test_a_query_class_that_no_gallery_has_is_refused():
    splits = small_splits()
    gallery = splits[1].gallery
    chosen = gallery.labels != 3
    lacking = Split(
        "s1",
        splits[1].train,
        splits[1].query,
        Part(gallery.inputs[chosen], gallery.labels[chosen], gallery.ids[chosen]),
    )
    with pytest.raises(UserError, match="split 's1' has queries of class 3, but no gallery"):
        train(splits=[splits[0], lacking, splits[2]])


def test_a_class_whose_only_gallery_image_is_the_query_is_refused():
    splits = small_splits()
    lonely = Part(splits[0].query.inputs[:1], torch.tensor([77]), torch.tensor([5]))
    with pytest.raises(UserError, match="class 77"):
        RetrievalEvaluator().check([Split("lonely", splits[0].train, lonely, lonely), *splits[1:]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "manhattan"}, "distance must be one of cosine, euclidean, inner_product, got 'manhattan'"),
        ({"recall_at": ()}, "recall_at must hold whole numbers >= 1"),
        ({"batch_size": 0}, "batch_size must be a whole number >= 1"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(UserError, match=message):
        RetrievalEvaluator(**options)


def test_classes_that_are_never_trained_on_are_told_apart():
    splits = small_splits()
    assert not any("seen" in name for name in RetrievalEvaluator().check(splits))
    first = splits[0]
    is_trained = first.train.labels == 0
    train_part = Part(first.train.inputs[is_trained], first.train.labels[is_trained])
    splits[0] = Split(first.name, train_part, first.query, first.gallery)  # class 1 is never trained on
    evaluator, model = RetrievalEvaluator(recall_at=(1,)), small_model()
    evaluation = evaluator.evaluate(model, splits, -1)
    assert set(evaluator.check(splits)) == set(evaluation.scores) == set(evaluation.pooled)
    whole, seen, unseen = (evaluation.scores[f"mean_average_precision{kind}"] for kind in ("", "_seen", "_unseen"))
    assert whole[0] == pytest.approx((seen[0] + unseen[0]) / 2)  # as many queries of either class
    assert whole[1:] == seen[1:] and np.isnan(unseen[1:]).all()
    assert evaluation.pooled["recall_at_1_unseen"] == evaluation.scores["recall_at_1_unseen"][0]
    plain = RetrievalEvaluator(recall_at=(1,)).evaluate(model, small_splits(), -1)
    assert all(evaluation.scores[name] == values for name, values in plain.scores.items())


def test_worker_processes_change_nothing():
    splits = small_splits()
    lists = [
        Split(
            split.name,
            split.train,
            *(Part(list(part.inputs), part.labels, part.ids) for part in (split.query, split.gallery)),
        )
        for split in splits
    ]
    alone, together = (RetrievalEvaluator(num_workers=number).evaluate(small_model(), lists, -1) for number in (0, 2))
    assert alone.scores == together.scores
