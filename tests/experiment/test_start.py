"""The section `start`: a model that is good before the first split, and is protected from there."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small import Recorder, Stopped, small_model, small_splits, train
from tiny_experiment import TINY as SMALL
from tiny_experiment import load_from

from mas_embed import MAS, Frozen, LwF, UserError, image_folder, run_experiment, train_sequence, unlabeled_images
from mas_embed.experiment import build_splits, dry_run
from mas_embed.experiment.build import build_training
from mas_embed.experiment.start import consolidate_start
from mas_embed.training import SplitEnd

pytestmark = pytest.mark.usefixtures("blank_pictures")

TINY = SMALL | {"evaluation": {"follow_index": False}}
MAS_SECTION = {"name": "mas", "strength": 10, "output": "projection"}
SUBSET = {"old": {"split": "0-4", "part": "train"}}


@pytest.fixture
def weights(tmp_path):
    """The file of a whole model of `TINY`, with other weights than a seed draws."""
    config = load_from(tmp_path, TINY)
    model = build_training(config, config.methods[0], build_splits(config), seed=77).model
    path = tmp_path / "deployed.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture
def tiny(tmp_path, weights):
    def load(start=None, **changes):
        section = {"weights": str(weights), "consolidate_on": "old", **(start or {})}
        return load_from(
            tmp_path, TINY | {"subsets": SUBSET, "seeds": [0], "methods": [MAS_SECTION], "start": section} | changes
        )

    return load


def make_images(folder, count=6, size=12):
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = generator.integers(0, 255, (size, size + 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


# The config does what the lines in Python do


def test_a_run_is_what_the_lines_in_python_give(tiny, tmp_path, weights):
    (run,) = run_experiment(tiny(), tmp_path / "run").runs
    config = tiny({"weights": None, "consolidate_on": None})
    splits = build_splits(config)
    training = build_training(config, config.methods[0], splits, seed=0)
    model, mas = training.model, training.method
    model.load_state_dict(load_file(weights))
    mas.consolidate(splits[0].train.inputs.split(20))
    expected = train_sequence(**vars(training), seed=0)
    assert run.scores["mean_average_precision"] == expected.scores["mean_average_precision"].scores.tolist()
    assert run.initial == expected.initial
    assert mas.num_splits == 3  # the start and two splits


def test_every_seed_starts_from_the_weights_and_is_protected_in_the_first_split(tiny, tmp_path):
    methods = ["finetune", MAS_SECTION, "frozen", "lwf", "joint"]
    results = run_experiment(tiny(seeds=[0, 1], methods=methods), tmp_path / "run")
    assert all(run.initial == results.runs[0].initial for run in results.runs)
    for seed in (0, 1):
        first = {run.method: run.scores["mean_average_precision"][0] for run in results.runs if run.seed == seed}
        assert len({tuple(first[name]) for name in ("finetune", "mas", "frozen", "lwf")}) == 4
        frozen = next(run for run in results.runs if run.method == "frozen")
        assert frozen.scores["mean_average_precision"] == [frozen.initial["mean_average_precision"]] * 2


def test_resumed_is_uninterrupted(tiny, tmp_path):
    config = tiny(methods=[MAS_SECTION, "lwf", "imm"])
    whole = run_experiment(config, tmp_path / "whole")
    for stop_at in (("mas", 0), ("imm", 0)):
        out = tmp_path / f"{stop_at[0]}"
        stop = Recorder(
            lambda event, at=stop_at: isinstance(event, SplitEnd) and (event.method, event.split_index) == at
        )
        with pytest.raises(Stopped):
            run_experiment(config, out, callbacks=[stop])
        resumed = run_experiment(config, out, resume=True)
        assert [run.scores for run in resumed.runs] == [run.scores for run in whole.runs]


def test_a_changed_start_is_not_resumed(tiny, tmp_path, weights):
    run_experiment(tiny(methods=["finetune"]), tmp_path / "run")
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights)
    with pytest.raises(UserError, match="the content of start.weights has changed since the run"):
        run_experiment(tiny(methods=["finetune"]), tmp_path / "run", resume=True)


def test_a_file_of_torch_save_gives_the_same_model(tiny, tmp_path, weights):
    torch.save(load_file(weights), tmp_path / "deployed.pt")
    config = tiny({"weights": str(tmp_path / "deployed.pt")})
    splits = build_splits(config)
    models = [build_training(one, one.methods[0], splits, seed=0).model for one in (config, tiny())]
    assert all(map(torch.equal, *(model.state_dict().values() for model in models)))


def test_candidates_are_tried_from_the_start(tiny, tmp_path):
    section = {**MAS_SECTION, "select": {"strength": [1e-6, 1e6], "seeds": [9]}}
    scores = [
        [candidate.mean for candidate in run_experiment(config, tmp_path / name).selections["mas"].candidates]
        for name, config in {
            "with": tiny(methods=[section], training=TINY["training"] | {"epochs": 2}),
            "without": tiny({"consolidate_on": None}, methods=[section], training=TINY["training"] | {"epochs": 2}),
        }.items()
    ]
    assert scores[0] != scores[1]


def test_a_model_without_weights_of_its_own_file(tiny, tmp_path):
    """The initial weights of the section `model` are protected, too."""
    config = tiny({"weights": None})
    training = build_training(config, config.methods[0], build_splits(config), seed=0)
    consolidate_start(config, config.methods[0], training, build_splits(config), seed=0)
    assert training.method.anchor and training.method.num_splits == 1


def test_the_resolved_config_has_every_key(tiny, tmp_path):
    assert tiny().to_yaml().count("start:") == 1
    assert load_from(tmp_path, TINY).model_dump()["start"] == {"weights": None, "consolidate_on": None, "methods": None}


# Refusals


@pytest.mark.parametrize("method", ["ewc", "replay", "class_statistics", "si", {"name": "imm", "mode": "mode"}])
def test_a_method_that_needs_labels_is_refused_by_name(tiny, method):
    name = method if isinstance(method, str) else method["name"]
    config = tiny(methods=[MAS_SECTION, method])
    with pytest.raises(
        UserError, match=f"methods.{name} cannot consolidate before .* inputs without labels .* start.methods"
    ):
        dry_run(config, build_splits(config))
    config = tiny({"methods": ["mas"]}, methods=[MAS_SECTION, method])
    dry_run(config, build_splits(config))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"weigths": "x"}, "unknown key 'start.weigths': did you mean 'start.weights'"),
        ({"weights": ""}, "start.weights="),
        ({"methods": ["maas"]}, "unknown method in start.methods 'maas': did you mean 'mas'"),
        ({"consolidate_on": None, "methods": ["mas"]}, "start.methods lists what consolidates on start.consolidate_on"),
    ],
)
def test_a_wrong_section_is_refused_when_it_is_read(tiny, start, message):
    with pytest.raises(UserError, match=message):
        tiny(start)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"weights": "nowhere.pt"}, "start.weights: cannot read weights from nowhere.pt: No such file"),
        (
            {"consolidate_on": "nowhere"},
            r"start.consolidate_on: 'nowhere' is neither a subset .*\(subsets: old\) nor a folder",
        ),
    ],
)
def test_what_is_not_there_is_refused(tiny, start, message):
    config = tiny(start)
    with pytest.raises(UserError, match=message):
        dry_run(config, build_splits(config))


def test_weights_must_be_those_of_the_whole_model(tiny, tmp_path, weights):
    state = load_file(weights)
    broken = {
        "has the weights of another network: 1 tensors differ in name or shape, as head.bias": {
            name: value for name, value in state.items() if name != "head.bias"
        },
        "head.bias has values that are not finite": state | {"head.bias": state["head.bias"] * torch.nan},
    }
    for message, values in broken.items():
        save_file(values, tmp_path / "broken.safetensors")
        config = tiny({"weights": str(tmp_path / "broken.safetensors")})
        with pytest.raises(UserError, match=f"start.weights: .*{message}"):
            dry_run(config, build_splits(config))
    (tmp_path / "notes.pt").write_text("no tensors")
    config = tiny({"weights": str(tmp_path / "notes.pt")})
    with pytest.raises(UserError, match="is damaged; give a state dict, as model.state_dict"):
        dry_run(config, build_splits(config))


def test_colours_of_the_new_data_are_not_those_of_the_weights(tiny):
    with pytest.raises(UserError, match="normalize=data takes .* from the new data, but the model of start.weights"):
        tiny(transforms={"normalize": "data"})
    tiny({"weights": None}, transforms={"normalize": "data"})


# A folder of images


@pytest.fixture
def folders(tmp_path):
    """A data set of image files, and a folder of other images."""
    for label in ("a", "b", "c", "d"):
        make_images(tmp_path / "new" / label, 8)
    make_images(tmp_path / "served" / "monday")
    make_images(tmp_path / "served" / "tuesday", 1)
    return tmp_path


def photographs(folder, **changes):
    data = {
        "name": "image_folder",
        "root": str(folder / "new"),
        "splits": 2,
        "image_size": 8,
        "short_side": 10,
        "channels": 1,
    }
    return load_from(
        folder,
        TINY
        | {"data": data, "seeds": [0], "methods": [MAS_SECTION], "training": {"batch_size": 4, "epochs": 1}}
        | changes,
    )


def test_images_of_a_folder_are_prepared_as_the_clean_view_is(folders):
    config = photographs(folders, transforms={"augment": ["RandomResizedCrop"], "normalize": "data"})
    splits = build_splits(config)
    train_files = splits[0].train.inputs.images.paths
    images = unlabeled_images(folders / "new", like=splits[0].train)
    by_path = dict(zip(images.images.paths, images, strict=True))
    for path, expected in zip(train_files, splits[0].train.inputs, strict=True):
        assert torch.equal(by_path[path], expected)
    assert len(unlabeled_images(folders / "served", like=splits[1].train)) == 7


def test_a_run_consolidates_on_a_folder(folders):
    config = photographs(folders, start={"consolidate_on": str(folders / "served")})
    splits = build_splits(config)
    dry_run(config, splits)
    run_experiment(config, folders / "run")
    make_images(folders / "served" / "wednesday", 1)
    with pytest.raises(UserError, match="the content of start.consolidate_on has changed"):
        run_experiment(config, folders / "run", resume=True)


def test_folders_that_cannot_be_used(folders, tiny):
    train = image_folder(root=folders / "new", splits=1, image_size=8)[0].train
    (folders / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no image"):
        unlabeled_images(folders / "empty", like=train)
    with pytest.raises(UserError, match="cannot read the folder"):
        unlabeled_images(folders / "nowhere", like=train)
    config = tiny({"consolidate_on": str(folders / "served")})
    with pytest.raises(UserError, match="only as those of a data set of image files, but this data set holds a Tensor"):
        dry_run(config, build_splits(config))
    (folders / "served" / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match=r"1 entries of .* are no image files and are left out: .txt \(1\)"):
        assert len(unlabeled_images(folders / "served", like=train)) == 7
    (folders / "served" / "notes.txt").unlink()
    (folders / "served" / "broken.png").write_text("no image")
    with pytest.raises(UserError, match="cannot read the image .*broken.png"):
        unlabeled_images(folders / "served", like=train)
    with pytest.warns(UserWarning, match="1 of 8 images are left out"):
        assert len(unlabeled_images(folders / "served", like=train, unreadable="skip")) == 7


# In Python: the methods have consolidated before `train_sequence` begins


def consolidated(make):
    def made(model):
        method = make(model)
        method.consolidate([small_splits()[0].train.inputs])
        return method

    return made


def test_an_importance_that_is_taken_before_holds_in_the_first_split():
    anchors = {name: value.clone() for name, value in small_model().state_dict().items()}

    def distance(make):
        model, _ = train(make, splits=small_splits(1))
        return sum(float((value - anchors[name]).square().sum()) for name, value in model.state_dict().items())

    assert distance(consolidated(lambda model: MAS(model, strength=1e3))) < 0.5 * distance(MAS)
    assert distance(consolidated(Frozen)) == 0


@pytest.mark.parametrize("make", [MAS, LwF, Frozen])
def test_a_sequence_that_begins_consolidated_resumes_bit_for_bit(make, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    uninterrupted, _ = train(consolidated(make))
    stop = Recorder(lambda event: isinstance(event, SplitEnd) and event.split_index == 0)
    with pytest.raises(Stopped):
        train(consolidated(make), checkpoint=path, callbacks=[stop])
    resumed, _ = train(consolidated(make), checkpoint=path, resume=True)
    assert all(map(torch.equal, uninterrupted.state_dict().values(), resumed.state_dict().values()))
