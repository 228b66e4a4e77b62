"""What training does to an index that was made before it."""

from functools import partial

import numpy as np
import pytest
import torch
from small import pull_together, small_model, small_splits

from mas_embed import Finetune, Frozen, compare_indexes, evaluate_retrieval, train_sequence
from mas_embed.methods import Method


class Keeper(Method):
    """Keeps a copy of the model as it was after every split."""

    def __init__(self, model):
        super().__init__(model)
        self.models = []

    def consolidate(self, batches):
        self.models.append({name: value.clone() for name, value in self.model.state_dict().items()})


def train(make_method, splits, **options):
    model = small_model()
    method = make_method(model)
    defaults = {"loss": pull_together, "epochs": 2, "batch_size": 4, "recall_at": (1,)}
    return model, method, train_sequence(model, splits, method=method, **(defaults | options))


def as_embeddings(weights, inputs):
    model = small_model()
    model.load_state_dict(weights)
    with torch.no_grad():
        return model.eval()(inputs)


def test_items_keep_the_vector_of_the_split_in_which_they_were_learned():
    splits = small_splits()
    _, keeper, result = train(Keeper, splits)
    gallery_labels = torch.cat([split.gallery.labels for split in splits])
    gallery_ids = torch.cat([split.gallery.ids for split in splits])
    for after in range(len(splits)):
        gallery = [
            as_embeddings(keeper.models[min(place, after)], split.gallery.inputs) for place, split in enumerate(splits)
        ]
        gallery[after + 1 :] = [
            as_embeddings(keeper.models[after], split.gallery.inputs) for split in splits[after + 1 :]
        ]
        for place, split in enumerate(splits):
            expected = evaluate_retrieval(
                as_embeddings(keeper.models[after], split.query.inputs), split.query.labels, torch.cat(gallery), gallery_labels,
                query_ids=split.query.ids, gallery_ids=gallery_ids, recall_at=(1,),
            )  # fmt: skip
            found = result.scores_on_kept["mean_average_precision"][after, place]
            assert found == pytest.approx(expected.mean_average_precision)


def test_an_index_is_compared_across_each_split_on_the_splits_before_it():
    splits = small_splits()
    _, keeper, result = train(Keeper, splits)
    assert [step["after"] for step in result.indexes] == [split.name for split in splits[1:]]
    before = [split.query for split in splits[:2]]  # the small splits' queries are their gallery
    labels, ids = (torch.cat([getattr(part, name) for part in before]) for name in ("labels", "ids"))
    old, new = (torch.cat([as_embeddings(weights, part.inputs) for part in before]) for weights in keeper.models[1:3])
    fit_on = tuple(as_embeddings(weights, splits[2].train.inputs) for weights in keeper.models[1:3])
    expected = compare_indexes(old, new, old, new, labels, labels, query_ids=ids, gallery_ids=ids, fit_on=fit_on,
                               k=min(10, len(labels) - 1)).as_dict()  # fmt: skip
    found = result.indexes[1]
    assert found["verdict"] == expected["verdict"]
    assert found["new_on_old"]["r_precision"] == pytest.approx(expected["new_on_old"]["r_precision"])
    for name, scores in expected["compensated"].items():
        assert found["compensated"][name]["mean_average_precision"] == pytest.approx(scores["mean_average_precision"])
    assert found["drift"]["mean"] == pytest.approx(expected["drift"]["mean"], abs=1e-6)


def test_a_model_that_does_not_change_keeps_its_index():
    for make_method, options in ((Frozen, {}), (Finetune, {"optimizer": partial(torch.optim.SGD, lr=0.0)})):
        *_, result = train(make_method, small_splits(), **options)
        assert [step["verdict"] for step in result.indexes] == ["keep", "keep"]
        assert all(step["churn"] == step["drift"]["mean"] == 0 for step in result.indexes)
        for name, matrix in result.scores.items():
            np.testing.assert_array_equal(matrix.scores, result.scores_on_kept[name].scores)


def test_no_index_is_watched_where_other_splits_are_judged_or_nobody_asks():
    splits = small_splits()
    for options in ({"watch_index": False}, {"evaluate_on": splits}):
        *_, result = train(Finetune, splits, **options)
        assert (result.scores_on_kept, result.indexes) == ({}, [])


def test_resume_goes_on_with_the_kept_gallery(tmp_path):
    *_, expected = train(Finetune, small_splits())

    def stop(event):
        if event["event"] == "split" and event["split_index"] == 1:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "c.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(Finetune, small_splits(), checkpoint=checkpoint, on_event=stop)
    *_, resumed = train(Finetune, small_splits(), checkpoint=checkpoint, resume=True)
    assert resumed.indexes == expected.indexes
    for name, matrix in expected.scores_on_kept.items():
        np.testing.assert_array_equal(matrix.scores, resumed.scores_on_kept[name].scores)
