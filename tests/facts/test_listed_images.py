from pathlib import Path

import numpy as np
import pytest

from mas_embed.facts.listed_images import ListedImages, hold_out


def listed(*rows):
    return ListedImages([Path(name) for name, _ in rows], [label for _, label in rows])


def names(part):
    return [path.name for path in part.paths]


def positions_held_out(labels, every, seed):
    """The positions that are held out if every row is a different file, fact by fact."""
    generator, held = np.random.default_rng(seed), []
    for label in sorted(set(labels)):
        order = generator.permutation([position for position, other in enumerate(labels) if other == label])
        held += order[: max(len(order) // every, 1 if len(order) > 1 else 0)].tolist()
    return sorted(held)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("every", [4, 5])
def test_where_files_have_one_fact_every_fact_holds_out_its_share(seed, every):
    labels = np.random.default_rng(seed).choice(6, 40, p=[0.5, 0.3, 0.1, 0.05, 0.025, 0.025]).tolist()
    rows = [(f"{position}.png", label) for position, label in enumerate(labels)]
    remaining, held = hold_out({"a": listed(*rows)}, every=every, seed=seed)["a"]
    expected = positions_held_out(labels, every, seed)
    assert names(held) == [f"{position}.png" for position in expected]
    assert names(remaining) == [name for position, (name, _) in enumerate(rows) if position not in expected]
    assert held.labels == [labels[position] for position in expected]


@pytest.mark.parametrize("seed", range(5))
def test_a_file_is_held_out_with_all_its_facts_in_all_splits_or_not_at_all(seed):
    generator = np.random.default_rng(seed)
    rows = [(f"{file}.png", int(fact)) for file in range(30) for fact in generator.choice(7, 3)]  # some twice
    splits = {"a": listed(*rows[:60]), "b": listed(*rows[30:])}
    divided = hold_out(splits, every=5, seed=seed)
    trained, held = (set().union(*(names(part) for part in side)) for side in zip(*divided.values(), strict=True))
    assert held and trained and not trained & held
    for name, (remaining, held_out) in divided.items():
        assert sorted([*names(remaining), *names(held_out)]) == sorted(names(splits[name]))
        assert len(held_out.paths) < len(splits[name].paths) / 2
        for label in set(splits[name].labels):
            if len({path for path, other in zip(*splits[name], strict=True) if other == label}) > 1:
                assert label in remaining.labels and label in held_out.labels


def test_a_row_that_is_listed_twice_is_one_file():
    rows = [(name, 0) for name in ("a.png", "b.png", "./a.png", "x/../b.png")]
    remaining, held = hold_out({"s": listed(*rows)}, every=4, seed=0)["s"]
    assert len(held.paths) == 2 and len(set(names(held))) == 1
    assert not set(names(remaining)) & set(names(held))


def test_all_facts_of_a_file_are_on_its_side():
    rows = [(f"{file}.png", fact) for file in range(8) for fact in (0, file + 1)]
    remaining, held = hold_out({"s": listed(*rows)}, every=4, seed=0)["s"]
    assert held.labels.count(0) == 2 and len(held.labels) == 4
    assert remaining.labels.count(0) == 6


def test_the_last_file_of_a_fact_remains():
    # All three facts hold one out: where the first two take b and a, the third would be left with c alone
    rows = [("a.png", 0), ("b.png", 0), ("a.png", 1), ("c.png", 1), ("b.png", 2), ("c.png", 2)]
    for seed in range(8):
        remaining, _ = hold_out({"s": listed(*rows)}, every=4, seed=seed)["s"]
        assert set(remaining.labels) == {0, 1, 2}
