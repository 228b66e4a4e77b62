import json

import pytest

from mas_embed.runtime.json_text import json_text


def test_nan_and_infinity_are_null_at_any_depth():
    values = {"a": [0.5, float("nan")], "b": {"c": (float("inf"), -float("inf"))}, "d": float("nan")}
    assert json.loads(json_text(values)) == {"a": [0.5, None], "b": {"c": [None, None]}, "d": None}


def test_other_values_and_the_argument_are_unchanged():
    values = {"a": [1, 1.5, "text", None, True], "b": {}, "c": []}
    assert json.loads(json_text(values)) == values
    numbers = [float("inf")]
    json_text(numbers, indent=2)
    assert numbers == [float("inf")]


def test_indentation_and_values_that_json_does_not_have():
    assert json_text({"a": [1]}, indent=1) == '{\n "a": [\n  1\n ]\n}'
    with pytest.raises(TypeError, match="not JSON serializable"):
        json_text({"a": object()})
