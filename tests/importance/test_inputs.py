import pytest
import torch
from importance_cases import assert_equal, make
from oracles import per_sample_importance
from torch import nn

from mas_embed import estimate_importance


@pytest.mark.parametrize(
    "batch_of",
    [lambda x: x, lambda x: (x, "labels"), lambda x: [x, torch.zeros(7)], lambda x: {"input": x, "labels": None}],
    ids=["tensor", "tuple", "list", "mapping"],
)
def test_every_kind_of_batch(batch_of):
    model, inputs = make("mlp")
    assert_equal(estimate_importance(model, [batch_of(inputs)]), dict(estimate_importance(model, [inputs])))


def test_a_model_with_several_keyword_inputs():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 3)

        def forward(self, input_ids, attention_mask):
            mask = attention_mask.unsqueeze(2)
            return self.head((self.embedding(input_ids) * mask).sum(1) / mask.sum(1))

    torch.manual_seed(0)
    model = Masked().double()
    batch = {
        "input_ids": torch.randint(10, (5, 6)),
        "attention_mask": torch.ones(5, 6, dtype=torch.long),
        "labels": torch.arange(5),
    }
    batch["attention_mask"][:, 4:] = 0
    samples = [{key: value[i : i + 1] for key, value in batch.items() if key != "labels"} for i in range(5)]
    expected = per_sample_importance(model, samples, lambda sample: [model(**sample)[0].square().sum()])
    assert_equal(estimate_importance(model, [batch]), expected)


def test_embed_by_method_name_and_by_callable():
    model, inputs = make("mlp")
    model.twice = lambda inputs: 2 * model(inputs)
    expected = {name: 4 * value for name, value in estimate_importance(model, [inputs]).items()}
    assert_equal(estimate_importance(model, [inputs], embed="twice"), expected)
    assert_equal(estimate_importance(model, [inputs], embed=lambda model, batch: 2 * model(batch)), expected)
