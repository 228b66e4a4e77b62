import pytest
from hypothesis import given
from hypothesis import strategies as st

from mas_embed.config import candidates_of
from mas_embed.errors import RunError
from mas_embed.evaluation import Candidate
from mas_embed.experiment.search import best_candidate, try_candidate


@given(st.dictionaries(st.text(min_size=1), st.lists(st.integers(), min_size=1, max_size=4), min_size=1, max_size=3))
def test_candidates_are_all_combinations(grid):
    candidates = candidates_of(grid)
    expected = 1
    for values in grid.values():
        expected *= len(values)
    assert len(candidates) == expected
    assert all(candidate[name] in values for candidate in candidates for name, values in grid.items())


def test_a_candidate_has_the_mean_of_its_seeds():
    tried = try_candidate({"strength": 3}, (5, 7), lambda candidate, seed: candidate["strength"] * seed)
    assert (tried.values, tried.mean, tried.error) == ([15, 21], 18, None)


def test_a_failure_is_told_and_not_fatal():
    def score(candidate, seed):
        if seed == 7:
            raise RunError("training diverged")
        return 1.0

    tried = try_candidate({"strength": 3}, (5, 7, 9), score)
    assert (tried.values, tried.mean, tried.error) == ([1.0], None, "seed 7: training diverged")


def test_the_highest_mean_is_chosen_the_first_of_equals_and_never_a_failure():
    tried = [
        Candidate(
            options={"strength": value},
            seeds=[0],
            values=[],
            mean=mean,
            seconds=1.0,
            error=None if mean else "it diverged",
        )
        for value, mean in ((1, 0.2), (2, 0.7), (3, None), (4, 0.7))
    ]
    assert best_candidate(tried, "mas").options == {"strength": 2}
    with pytest.raises(RunError, match="mas: every candidate failed: it diverged"):
        best_candidate([tried[2]], "mas")
