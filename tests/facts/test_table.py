import itertools

import pytest
import torch

from mas_embed import UserError
from mas_embed.facts import FactTable, assign_facts, make_fact_table

VECTORS = {
    "three": torch.tensor([3.0, 4.0]),
    "seven": torch.tensor([0.0, 2.0]),
    "above": torch.tensor([5.0, 0.0]),
}
WORDS = [("three", "", ""), ("seven", "", ""), ("three", "above", "seven")]


def test_targets_by_hand():
    facts = make_fact_table(WORDS, VECTORS)
    # Subjects (.6, .8), (0, 1), (.6, .8), mean (.4, 2.6/3); the one predicate and the one object equal their means
    expected = [[0.2, 0.8 - 2.6 / 3], [-0.4, 1 - 2.6 / 3], [0.2, 0.8 - 2.6 / 3]]
    assert facts.vectors[:, 0].tolist() == [pytest.approx(row, abs=1e-7) for row in expected]
    assert facts.vectors[:, 1:].abs().max() == 0
    assert facts.targets.shape == (3, 6) and torch.equal(facts.targets[2], facts.vectors[2].flatten())
    assert facts.weights.tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 1]]
    assert facts.orders.tolist() == [1, 1, 3]
    assert facts.names == ["<three>", "<seven>", "<three, above, seven>"]


def test_the_mean_is_over_the_facts_that_fill_the_slot():
    words = [("three", "above", ""), ("three", "seven", ""), ("three", "", "")]
    facts = make_fact_table(words, VECTORS)
    # Predicates (1, 0) and (0, 1), mean (.5, .5); the third fact has none, so its vector is zero
    assert facts.vectors[:, 1].tolist() == [[0.5, -0.5], [-0.5, 0.5], [0.0, 0.0]]


def test_tables_that_cannot_be_made_are_refused():
    with pytest.raises(UserError, match="1 words have no vector: nine"):
        make_fact_table([("nine", "", "")], VECTORS)
    for words in (("three", "two", ""), ("three two", "", "")):
        with pytest.raises(UserError, match=r"word vectors must have one size, got 2 \('three'\), 1 \('two'\); take"):
            make_fact_table([words], VECTORS | {"two": torch.ones(1)})
    with pytest.raises(UserError, match="there are no facts"):
        make_fact_table([], VECTORS)
    with pytest.raises(UserError, match="fact 0 has the words .* exactly the slots with a weight above 0"):
        make_fact_table([("", "", "")], VECTORS)
    ids, vectors, weights = torch.tensor([5]), torch.ones(1, 3, 2), torch.ones(1, 3)
    with pytest.raises(UserError, match="fact 5 has the words"):
        FactTable(ids, [("a", "b", "")], vectors, weights)
    with pytest.raises(UserError, match="a table of 1 facts needs"):
        FactTable(ids, [("a", "b", "c")], vectors.flatten(1), weights)
    with pytest.raises(UserError, match="finite"):
        FactTable(ids, [("a", "b", "c")], vectors / 0, weights)
    with pytest.raises(UserError, match="finite and >= 0"):
        FactTable(ids, [("a", "b", "c")], vectors, -weights)


def table_of(vectors):
    """Facts of order 1 with the given vectors."""
    targets = torch.zeros(len(vectors), 3, len(vectors[0]))
    targets[:, 0] = torch.tensor(vectors)
    weights = torch.tensor([[1.0, 0.0, 0.0]] * len(vectors))
    return FactTable(torch.arange(len(vectors)), [(str(i), "", "") for i in range(len(vectors))], targets, weights)


@pytest.mark.parametrize("by", ["random", "semantic"])
@pytest.mark.parametrize(("num_facts", "num_splits"), [(10, 4), (12, 4), (7, 7), (5, 1), (11, 2)])
def test_every_fact_is_assigned_and_sizes_differ_by_one_at_most(by, num_facts, num_splits):
    facts = table_of(torch.randn(num_facts, 3, generator=torch.Generator().manual_seed(0)).tolist())
    split_of = assign_facts(facts, num_splits, by=by, seed=3)
    sizes = [int((split_of == split).sum()) for split in range(num_splits)]
    assert sum(sizes) == num_facts and max(sizes) - min(sizes) <= 1
    assert torch.equal(split_of, assign_facts(facts, num_splits, by=by, seed=3))


def test_other_seeds_give_other_splits():
    facts = table_of([[float(i)] for i in range(30)])
    assert not torch.equal(assign_facts(facts, 3, seed=0), assign_facts(facts, 3, seed=1))


def test_semantic_splits_are_the_clusters_where_these_are_balanced():
    centres = [[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]
    noise = 0.1 * torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    cluster = torch.arange(12) % 3
    facts = table_of((torch.tensor(centres)[cluster] + noise).tolist())
    split_of = assign_facts(facts, 3, by="semantic")
    for first, second in itertools.combinations(range(12), 2):
        assert (split_of[first] == split_of[second]) == (cluster[first] == cluster[second])


def test_the_farthest_facts_of_a_full_cluster_are_assigned_to_another():
    # Five at 0, .1, .2, .3, 1.0 and one at 9: three each, so the ones nearest to 9's cluster have to move there
    split_of = assign_facts(table_of([[0.0], [0.1], [0.2], [0.3], [1.0], [9.0]]), 2, by="semantic")
    assert split_of[:3].unique().numel() == 1 or split_of[1:4].unique().numel() == 1
    assert split_of[4] == split_of[5] and split_of[5] != split_of[1]


def test_assignments_that_are_impossible_are_refused():
    facts = table_of([[0.0], [0.0], [1.0]])
    with pytest.raises(UserError, match="num_splits must lie between 1 and 3, .* got 4"):
        assign_facts(facts, 4)
    with pytest.raises(UserError, match="num_splits must lie between 1 and 2, .* got 3"):
        assign_facts(facts, 3, by="semantic")
    with pytest.raises(UserError, match="the grouping of facts must be 'random' or 'semantic', got 'clusters'"):
        assign_facts(facts, 2, by="clusters")
