"""Experiments on facts and on recognition that stop within a split, and go on."""

from pathlib import Path

import pytest
from small import Stopped
from tiny_experiment import found_by

from mas_embed import Callback, load_config, run_experiment

CONFIGS = Path(__file__).parents[2] / "configs"
OVERRIDES = ["seeds=[0]", "training.epochs=1", "training.checkpoint_every={steps: 3}"]
METHODS = {
    "facts_digits": "[{name: si, strength: 0.003}, {name: local_mas, strength: 1}, {name: replay, buffer_size: 20}]",
    "recognition_digits": "[{name: mas, embed: features}, {name: multi_head_lwf}, {name: class_statistics, layer: trunk}]",
}


class StopAtStep(Callback):
    """Raises at a step of a split of a method."""

    def __init__(self, method, split_index, step):
        self.place, self.num_steps = (method, split_index), step

    def on_step_end(self, event):
        self.num_steps -= (event.method, event.split_index) == self.place
        if self.num_steps == 0:
            raise Stopped


@pytest.mark.usefixtures("blank_pictures")
@pytest.mark.parametrize("name", [pytest.param("facts_digits", marks=pytest.mark.slow), "recognition_digits"])
def test_within_a_split(tmp_path, name):
    config = load_config(CONFIGS / f"{name}.yaml", [*OVERRIDES, f"methods={METHODS[name]}"])
    run_experiment(config, tmp_path / "whole")
    for method in config.methods:
        with pytest.raises(Stopped):
            run_experiment(config, tmp_path / "run", resume=True, callbacks=[StopAtStep(method.title, 1, 5)])
    run_experiment(config, tmp_path / "run", resume=True)
    assert found_by(tmp_path / "run") == found_by(tmp_path / "whole")
