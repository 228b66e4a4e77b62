import pytest
import torch
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.losses import TripletMarginLoss

from mas_embed import UserError
from mas_embed.losses import build, catalogue


def test_classes_are_found_by_their_own_names():
    assert catalogue("losses")["TripletMarginLoss"] is TripletMarginLoss
    assert "TripletMarginMiner" in catalogue("miners")
    assert not any(name.startswith("Base") for name in catalogue("losses"))


def test_a_nested_component_is_built_first():
    loss = build("losses", "TripletMarginLoss", {"margin": 0.3, "distance": {"name": "CosineSimilarity"}})
    assert loss.margin == 0.3
    assert isinstance(loss.distance, CosineSimilarity)


@pytest.mark.parametrize("margin", [0.05, 0.3])
def test_built_is_what_the_library_makes(margin):
    torch.manual_seed(0)
    embeddings, labels = torch.randn(8, 3), torch.arange(8) % 2
    built = build("losses", "TripletMarginLoss", {"margin": margin})
    assert torch.equal(built(embeddings, labels), TripletMarginLoss(margin=margin)(embeddings, labels))


def test_a_nested_component_by_name_alone_and_one_that_is_not_there():
    assert isinstance(build("losses", "TripletMarginLoss", {"distance": "CosineSimilarity"}).distance, CosineSimilarity)
    with pytest.raises(UserError, match="unknown distances 'Cosine': did you mean 'CosineSimilarity'"):
        build("losses", "TripletMarginLoss", {"distance": "Cosine"})
    with pytest.raises(UserError, match="distance needs a name"):
        build("losses", "TripletMarginLoss", {"distance": {}})
