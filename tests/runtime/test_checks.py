import numpy as np
import pytest
import torch

from mas_embed import UserError
from mas_embed.runtime.checks import as_number, as_whole_number, check_at_least, check_choice, check_range


def test_accepted_values():
    check_choice("mode", "a", ("a", "b"))
    check_at_least("size", 1, 1)
    check_range("decay", 0, 0, 1)
    check_range("decay", 1, 0, 1)


def test_errors():
    for check, arguments, message in (
        (check_choice, ("c", ["a"]), "option must be 'a', got 'c'"),
        (check_choice, ("c", ["a", "b"]), "option must be 'a' or 'b', got 'c'"),
        (check_choice, (1, ["a", "b", "c"]), "option must be 'a', 'b' or 'c', got 1"),
        (check_at_least, (0, 1), "option must be at least 1, got 0"),
        (check_at_least, (float("nan"), 1), "option must be at least 1, got nan"),
        (check_range, (1.5, 0, 1), "option must be from 0 to 1, got 1.5"),
        (check_range, (float("nan"), 0, 0.4), "option must be from 0 to 0.4, got nan"),
    ):
        with pytest.raises(UserError, match=message):
            check("option", *arguments)


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3), torch.tensor(3), np.array(3)])
def test_whole_numbers_become_int(value):
    assert as_whole_number("size", value, 3, 3) == 3
    assert type(as_whole_number("size", value)) is int


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (True, (), "size must be a whole number, got True"),
        (np.True_, (0,), "size must be a whole number >= 0, got np.True_"),
        (torch.tensor(True), (0,), "size must be a whole number >= 0, got tensor"),
        (3.0, (1,), "size must be a whole number >= 1, got 3.0"),
        ("3", (), "size must be a whole number, got '3'"),
        (None, (), "got None"),
        ([3], (), "got "),
        (np.array([3, 4]), (), "got array"),
        (0, (1,), "size must be a whole number >= 1, got 0"),
        (5, (1, 4), "size must be a whole number >= 1 and <= 4, got 5"),
        ("x" * 3000, (), r"got 'xxx.* \.\.\. x"),
    ],
)
def test_no_whole_numbers(value, bounds, message):
    with pytest.raises(UserError, match=message) as caught:
        as_whole_number("size", value, *bounds)
    assert len(str(caught.value)) < 150


def test_numbers_become_float():
    for value in (2, 2.0, np.float32(2), np.int64(2)):
        assert as_number("strength", value) == 2.0
    for value in (float("nan"), -float("inf"), True, np.True_, "2", None, 2j, [2.0], 10**400):
        with pytest.raises(UserError, match="strength must be a finite number, got"):
            as_number("strength", value)
