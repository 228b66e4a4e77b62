import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import TripletMarginLoss

from mas_embed import UserError
from mas_embed.losses import LOSSES, MINERS, with_nested_components
from mas_embed.losses.metric_learning import exported_classes


def nested(**options):
    return with_nested_components(TripletMarginLoss, options)


def test_classes_of_the_library_are_found_by_name():
    assert exported_classes("losses")["TripletMarginLoss"] is LOSSES["TripletMarginLoss"] is TripletMarginLoss
    assert "TripletMarginMiner" in MINERS
    assert not any(name.startswith("Base") or name.endswith("Mixin") for name in exported_classes("losses"))


def test_a_nested_component_is_built_with_or_without_options():
    assert nested(margin=0.3) == {"margin": 0.3}
    for value in ("CosineSimilarity", {"name": "CosineSimilarity"}):
        assert isinstance(nested(distance=value)["distance"], CosineSimilarity)
    assert nested(distance={"name": "LpDistance", "p": 1})["distance"].p == 1
    distance = CosineSimilarity()
    assert nested(distance=distance)["distance"] is distance


def test_components_are_nested_to_any_depth():
    regularizer = {"name": "LpRegularizer", "distance": {"name": "LpDistance", "p": 1}}
    built = nested(embedding_regularizer=regularizer)["embedding_regularizer"]
    assert built.distance.p == 1


@pytest.mark.parametrize("margin", [0.05, 0.3])
def test_a_loss_by_name_is_that_of_the_library(margin):
    torch.manual_seed(0)
    embeddings, labels = torch.randn(8, 3), torch.arange(8) % 2
    loss = LOSSES["TripletMarginLoss"](**nested(margin=margin))
    assert torch.equal(loss(embeddings, labels), TripletMarginLoss(margin=margin)(embeddings, labels))


def test_options_of_other_constructors_are_unchanged():
    def loss(*, distance):
        return distance

    assert with_nested_components(loss, {"distance": "CosineSimilarity"}) == {"distance": "CosineSimilarity"}


def test_errors():
    with pytest.raises(UserError, match="unknown distance 'Cosine': did you mean 'CosineSimilarity'"):
        nested(distance="Cosine")
    with pytest.raises(UserError, match="distance needs a name"):
        nested(distance={})
    for name in (3, [1], None):
        with pytest.raises(UserError, match="unknown distance "):
            nested(distance={"name": name})
