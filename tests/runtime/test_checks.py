import pytest

from mas_embed import UserError
from mas_embed.runtime.checks import check_at_least, check_choice, check_range


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
