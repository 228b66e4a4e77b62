"""An experiment on the digits that takes a second, and how a test loads it."""

import yaml

from mas_embed import load_config

TINY = {
    "name": "tiny",
    "seeds": [0, 1],
    "data": {"name": "digits", "num_splits": 2},
    "model": {"name": "small_conv", "embedding_size": 4, "width": 2},
    "loss": {"name": "TripletMarginLoss"},
    "methods": ["finetune", "frozen", {"name": "mas", "strength": 10, "output": "projection"}, "joint"],
    "training": {"epochs": 1, "batch_size": 40, "sampler": {"name": "MPerClassSampler", "m": 4}},
}


def load_from(folder, values):
    """A config by way of a file in the folder."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    return load_config(folder / "tiny.yaml")
