"""The configs of published protocols: they load, and run from end to end on small copies of the data sets' layouts."""

import math
from pathlib import Path

import pytest
import torch
from data.photographs import write_birds, write_flowers

from mas_embed import load_config, read_results, run_experiment
from mas_embed.evaluation.stored_means import NCM_METRICS
from mas_embed.experiment.build import build_model, build_splits
from mas_embed.report import index_table, pooled_table, summary_table

pytestmark = pytest.mark.usefixtures("blank_pictures")

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "seeds=[0]",
    "data.image_size=16",
    "data.short_side=18",
    "model.weights=none",
    "training.epochs=1",
    "training.batch_size=8",
    "training.sampler.m=2",
]


def published(name, root, *changes):
    return load_config(CONFIGS / f"sdc_{name}.yaml", [*SMALL, f"data.root={root}", *changes])


@pytest.mark.parametrize(("name", "epochs", "lr"), [("cub", 50, 1e-5), ("flowers", 20, 1e-4)])
def test_the_configs_are_those_of_the_paper(name, epochs, lr):
    config = load_config(CONFIGS / f"sdc_{name}.yaml")
    assert config.data.options["splits"] == 6 and config.data.options["held_out_classes"] == "seen"
    model = config.model.options
    assert (model["network"], model["weights"], model["embedding_size"]) == ("resnet18", "default", 512)
    assert model["is_normalized"] is True
    training = config.training
    assert (training.epochs, training.batch_size, training.optimizer.options["lr"]) == (epochs, 32, lr)
    assert {method.title for method in config.methods} == {"finetune", "frozen", "lwf", "ewc", "mas", "joint"}
    assert config.evaluation.options["class_means"] is True
    assert load_config(CONFIGS / f"sdc_{name}.yaml", ["data.splits=10"]).data.options["splits"] == 10


def test_the_two_configs_differ_only_where_the_paper_does():
    cub, flowers = (load_config(CONFIGS / f"sdc_{name}.yaml").model_dump() for name in ("cub", "flowers"))
    assert {key for key in cub if cub[key] != flowers[key]} == {"name", "data", "training"}
    differing = {key for key in cub["training"] if cub["training"][key] != flowers["training"][key]}
    assert differing == {"epochs", "optimizer"}


def test_two_hundred_classes_in_six_splits_and_in_ten(tmp_path):
    root = write_birds(tmp_path, num_classes=200, num_train=1, num_test=2)
    for num_splits, expected in ((6, [34, 34, 33, 33, 33, 33]), (10, [20] * 10)):
        splits = build_splits(
            published("cub", root, f"data.splits={num_splits}", "data.image_size=8", "data.short_side=8")
        )
        assert [len(split.train.labels.unique()) for split in splits] == expected
        assert [len(split.query.labels.unique()) for split in splits] == expected
        names = {label: name for name, (label,) in splits.label_names.items()}
        listed = [names[label] for split in splits for label in sorted(split.train.labels.tolist())]
        assert sorted(listed) != listed and len(set(listed)) == 200  # in random order


def test_the_network_of_the_protocol_embeds_in_512_dimensions_of_unit_length(tmp_path):
    config = published("cub", write_birds(tmp_path, num_classes=6))
    splits = build_splits(config)
    model = build_model(config, splits, seed=0).eval()
    with torch.no_grad():
        embeddings = model(torch.stack([splits[0].train[index][0] for index in range(2)]))
    assert embeddings.shape == (2, 512)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def check_accuracies(results):
    """Accuracies of every method: NaN before a split is learned, the last split the same in all three, in [0, 1]."""
    for run in results.runs:
        assert set(NCM_METRICS) <= run.scores.keys() & run.pooled.keys() & run.measures.keys()
        for name in NCM_METRICS:
            matrix = run.matrix(name).scores
            assert 0 <= run.pooled[name] <= 1
            for i, row in enumerate(matrix):
                learned = len(row) if len(matrix) == 1 else i + 1
                assert all(0 <= value <= 1 for value in row[:learned]) and all(map(math.isnan, row[learned:]))


def test_birds_run_from_end_to_end(tmp_path):
    root = write_birds(tmp_path, num_classes=6, num_train=5, num_test=2)
    changes = [
        "data.splits=3",
        "methods.mas.select={strength: [1], seeds: [1], num_splits: 2}",
        "methods.ewc.loss=MultiSimilarityLoss",
    ]
    # Images of one colour leave the triplet loss at zero, and with it the Fisher information
    config = published("cub", root, "model.network=cifar_resnet20", *changes)
    run_experiment(config, tmp_path / "run")
    results = read_results(tmp_path / "run")
    assert results.splits == ["1", "2", "3"]
    assert results.methods == ["finetune", "frozen", "lwf", "ewc", "mas", "joint"]
    check_accuracies(results)
    assert summary_table(results).title.startswith("sdc_cub: ncm accuracy over 3 splits")
    assert {"ncm accuracy", "ncm accuracy compensated", "ncm accuracy recomputed", "mAP"} <= {
        *pooled_table(results).header
    }


def test_flowers_run_from_end_to_end_and_their_index_is_shown(tmp_path):
    root = write_flowers(tmp_path, num_classes=6, num_each=2, step=2)
    changes = ["data.splits=3", "methods=[finetune, joint]", "evaluation.follow_index=true"]
    results = run_experiment(published("flowers", root, "model.network=cifar_resnet20", *changes), tmp_path / "run")
    check_accuracies(results)
    assert (tmp_path / "run" / "report.html").stat().st_size > 0
    assert index_table(results).title == "What updates did to the index, mAP"  # which class means do not rank
