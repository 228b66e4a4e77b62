from pathlib import Path

import pytest
import yaml

from mas_embed.config import changed_options, load_config

ROOT = Path(__file__).parents[2]


def changes_of(config, tmp_path):
    """The changes, after the check that reading them gives the same config again."""
    changes = changed_options(config.to_yaml())
    path = tmp_path / "changes.yaml"
    path.write_text(changes)
    assert load_config(path) == config
    return yaml.safe_load(changes)


@pytest.mark.parametrize(
    "name", ["digits", "compare_digits", "recognition_digits", "facts_digits", "sdc_cub", "text_domains"]
)
def test_the_changes_make_the_same_config(name, tmp_path):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    changes = changed_options(config.to_yaml())
    assert changes_of(config, tmp_path) and len(changes) < len(config.to_yaml())


def test_only_what_is_no_default_is_left(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "{name: short, data: {name: digits, held_out: test, num_splits: 3}, model: small_conv, loss: {name: TripletMarginLoss, swap: true},"
        "methods: [finetune, {name: mas, strength: 7, decay: 0.9}], training: {batch_size: 7, optimizer: {lr: 0.001}}}"
    )
    changes = changes_of(load_config(path), tmp_path)
    assert changes["data"] == {"name": "digits", "num_splits": 3}
    assert changes["loss"] == {"name": "TripletMarginLoss", "swap": True}
    assert changes["methods"] == [{"name": "finetune"}, {"name": "mas", "strength": 7}]
    assert changes["training"] == {"batch_size": 7, "optimizer": "Adam"}
    assert "seeds" not in changes and "subsets" not in changes


@pytest.mark.parametrize(
    "text", ["[", "[]", "{}", "", "{name: x, data: nothing_of_this_name, model: a, loss: b, methods: [c]}"]
)
def test_a_config_of_other_components_has_no_known_changes(text):
    assert changed_options(text) is None
