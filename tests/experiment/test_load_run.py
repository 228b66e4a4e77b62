"""The trained model of a run, by its directory, method and seed."""

import shutil

import pytest
import torch
from tiny_experiment import TINY, few_digits, load_from

from mas_embed import Callback, UserError, load_run, run_experiment
from mas_embed.experiment import runner
from mas_embed.training import SplitEnd

pytestmark = pytest.mark.usefixtures("blank_pictures")

QUICK = {
    **TINY,
    "seeds": [0, 3],
    "methods": ["finetune", {"name": "mas", "label": "strong", "strength": 10, "output": "projection"}, "ewc"],
    "evaluation": {"follow_index": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and what its trainings ended with."""
    folder, trained = tmp_path_factory.mktemp("run"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mas_embed.report.page.png_of", lambda figure: b"a picture")
        build = runner.build_training

        def remember(config, method, splits, *, seed):
            training = build(config, method, splits, seed=seed)
            trained[method.title, seed] = training
            return training

        patch.setattr(runner, "build_training", remember)
        run_experiment(load_from(folder, QUICK), folder / "run")
    return folder / "run", trained


@pytest.mark.parametrize("method", ["finetune", "strong", "ewc"])
def test_model_and_method_of_a_run(run, method):
    folder, trained = run
    loaded = load_run(folder, method=method, seed=3)
    expected = trained[method, 3]
    inputs = few_digits(num_splits=2)[0].query.inputs
    assert torch.equal(loaded.model(inputs), expected.model.eval()(inputs))
    assert loaded.method.name == method
    assert loaded.method.state_dict()["origin"] == expected.method.state_dict()["origin"]
    assert getattr(loaded.method, "num_splits", 2) == 2
    assert loaded.learned.names == ["0-4", "5-9"] and loaded.learned.num_classes == 10
    assert loaded.learned.preprocessing.image_size == (8, 8)


@pytest.mark.parametrize(("changes", "message"), [
    ({"method": "stronk"}, "unknown method 'stronk': did you mean 'strong'"),
    ({"seed": 1}, r"has no seed 1 \(seeds: 0, 3\)"),
    ({"seed": "0"}, "seed must be a whole number, got '0'"),
    ({"directory": "nowhere"}, "there is no run in nowhere; name the directory"),
    ({"imports": ["no_such_module"]}, "cannot import 'no_such_module', given by imports: ModuleNotFoundError"),
])  # fmt: skip
def test_what_a_run_does_not_have(run, changes, message):
    arguments = {"directory": run[0], "method": "strong", "seed": 0, **changes}
    with pytest.raises(UserError, match=message):
        load_run(arguments.pop("directory"), **arguments)


class Stop(Callback):
    def on_split_end(self, event: SplitEnd) -> None:
        raise KeyboardInterrupt


def test_a_training_that_was_stopped_says_how_far_it_came(tmp_path):
    config = load_from(tmp_path, QUICK)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config, tmp_path / "run", callbacks=[Stop()])
    with pytest.raises(
        UserError, match=r"finetune seed 0 of the run in .* has learned 1 of 2 splits; finish it by: .*--resume"
    ):
        load_run(tmp_path / "run", method="finetune", seed=0)  # fmt: skip
    with pytest.raises(UserError, match="strong seed 3 of the run in .* has learned no split yet"):
        load_run(tmp_path / "run", method="strong", seed=3)


def test_a_model_file_that_is_gone_or_damaged(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    model = folder / "strong" / "seed0" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot read .*model.safetensors as a safetensors file"):
        load_run(folder, method="strong")
    model.unlink()
    with pytest.raises(UserError, match="model.safetensors is missing; train strong seed 0 again"):
        load_run(folder, method="strong")
