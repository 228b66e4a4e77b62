import numpy as np
import pytest

from mas_embed.retrieval.inputs import share_in_common


def test_share_in_common_by_hand():
    """The first query has two of three items in common, the second has none."""
    assert share_in_common(np.array([[1, 2, 3], [4, 5, 6]]), np.array([[3, 9, 1], [1, 2, 3]])) == 2 / 6


def test_equal_rows_in_any_order_have_everything_in_common():
    rows = np.array([[1, 2, 3], [4, 5, 6]])
    assert share_in_common(rows, rows[:, ::-1]) == 1


@pytest.mark.parametrize("pairs_at_once", [None, 1, 70])  # 70 pairs are two queries at once, and one in the last block
def test_share_in_common_equals_the_loop_over_queries(pairs_at_once, monkeypatch):
    if pairs_at_once is not None:
        monkeypatch.setattr("mas_embed.retrieval.inputs.PAIRS_AT_ONCE", pairs_at_once)
    generator = np.random.default_rng(0)
    neighbours, others = (np.stack([generator.permutation(15)[:5] for _ in range(31)]) for _ in range(2))
    num_common = sum(len(np.intersect1d(one, other)) for one, other in zip(neighbours, others, strict=True))
    assert 0 < num_common < 31 * 5
    assert share_in_common(neighbours, others) == num_common / (31 * 5)
