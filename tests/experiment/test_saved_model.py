"""A model in a file: it comes back in another process, to the bit, and nothing else passes for it."""

import os
import pickle
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from data.photographs import write_classes
from pytorch_metric_learning.losses import ContrastiveLoss
from small import pull_together, small_model, small_splits, train
from torch import nn

import mas_embed as me
from mas_embed import UserError, load_model, save_model, train_sequence
from mas_embed.losses import LOSSES
from mas_embed.models import without_reading_weights
from mas_embed.registry import made_by_name, remember_made
from mas_embed.runtime.atomic_files import write_tensors
from mas_embed.runtime.nested_state import flatten_state

METHODS = {
    "finetune": me.Finetune,
    "mas": lambda model: me.MAS(model, strength=2.5, output="projection", accumulation="max"),
    "local_mas": me.LocalMAS,
    "si": lambda model: me.SI(model, xi=0.1),
    "lwf": me.LwF,
    "replay": lambda model: me.Replay(model, buffer_size=5),
    "class_statistics": lambda model: me.ClassStatistics(model, layer="trunk"),
    "frozen": lambda model: me.Frozen(model, only="head"),
    "imm": me.IMM,
    "joint": me.Joint,
    "combine": lambda model: me.Combine(model, methods=[me.MAS(model, embed="unnormalized"), me.Replay(model)]),
}  # fmt: skip


def small_conv():
    with me.seeded(0):
        return me.small_conv(width=2, embedding_size=4)


@pytest.fixture(scope="module")
def splits():
    def few(part):
        return me.Part(part.inputs[:40], part.labels[:40])

    found = me.digits(num_splits=5)[:2]
    return [me.Split(split.name, few(split.train), few(split.query), split.query) for split in found]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def batches(split):
    return [(split.train.inputs[start : start + 20], split.train.labels[start : start + 20]) for start in (0, 20)]


def learned(make, splits):
    """A model and a method that have learned a split by a step of their own, with labels in both classes."""
    model = small_conv()
    method = make(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for split in splits:
        method.begin_split()
        model(split.train.inputs).square()[:, 0].mean().backward()
        method.add_penalty_grad()
        optimizer.step()
        method.after_step(optimizer)
        optimizer.zero_grad()
        method.consolidate(batches(split))
    return model, method


def flat(method):
    """The state of a method as text and tensors, which compare."""
    tensors, others = flatten_state(method.state_dict())
    return {name: tensor.tolist() for name, tensor in tensors.items()}, others


@pytest.mark.parametrize("name", METHODS)
def test_model_and_method_come_back(path, splits, name):
    model, method = learned(METHODS[name], splits)
    save_model(path, model, method, splits=splits)
    again, method_again, known = load_model(path)
    assert type(method_again) is type(method) and method_again.model is again and not again.training
    assert flat(method_again) == flat(method)
    inputs = splits[1].query.inputs
    assert torch.equal(again(inputs), model(inputs))
    with torch.no_grad():
        for one in (model, again):
            one.head.weight.add_(0.1)
    assert float(method_again.penalty().detach()) == float(method.penalty().detach())
    assert known.names == [split.name for split in splits]


IN_ANOTHER_PROCESS = """
import sys, torch, mas_embed as me
model, mas, learned = me.load_model(sys.argv[1])
images = learned.preprocessing(torch.linspace(0, 1, 64).reshape(1, 1, 8, 8))
embedding = model(images)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.01)
print(embedding.flatten().tolist(), float(mas.penalty().detach()), mas.strength, learned.label_names, type(model).__name__)
"""


def test_another_process_embeds_and_protects_to_the_bit(path):
    splits = me.SplitSequence(me.digits()[:2], label_names={"naught": [0]})
    splits = me.transform_splits(splits, normalize="data")
    model = small_conv()
    mas = me.MAS(model, strength=3, embed="unnormalized")
    train_sequence(model, splits, method=mas, loss=ContrastiveLoss(), recipe=me.Recipe(epochs=1, batch_size=128),
                   evaluator=me.RetrievalEvaluator(follow_index=False))  # fmt: skip
    save_model(path, model, mas, splits=splits)
    environment = {**os.environ, "PYTHONPATH": str(Path(me.__file__).parent.parent)}
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    mean, std = splits.normalization
    image = (torch.linspace(0, 1, 64).reshape(1, 1, 8, 8) - torch.tensor(mean)) / torch.tensor(std)
    embedding = model.eval()(image)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    expected = f"{embedding.flatten().tolist()} {float(mas.penalty().detach())} 3 {{'naught': [0]}} EmbeddingNet"
    assert printed.strip() == expected


def test_training_goes_on_and_protects(path):
    splits = small_splits()
    model, _ = train(lambda model: me.MAS(model, strength=1e3), splits=splits[:1])
    mas = me.MAS(model, strength=1e3)
    mas.consolidate([splits[0].train.inputs])
    save_model(path, model, mas)
    moved = {}
    for title, strength in (("weak", 0.0), ("strong", 1e3)):
        again = small_model(1)
        _, method, _ = load_model(path, again, method=lambda model: me.MAS(model, strength=strength))  # noqa: B023
        before = again[0].weight.detach().clone()
        train_sequence(again, splits[1:], method=method, loss=pull_together, recipe=me.Recipe(epochs=2, batch_size=4),
                       evaluator=me.RetrievalEvaluator(recall_at=(1,)))  # fmt: skip
        moved[title] = float((again[0].weight.detach() - before).norm())
    assert moved["strong"] < 0.5 * moved["weak"]


def test_a_method_with_a_loss_by_name_comes_back(path, splits):
    model = small_conv()
    loss = LOSSES["ContrastiveLoss"](pos_margin=0.25)
    remember_made(loss, "ContrastiveLoss", {"pos_margin": 0.25, "distance": {"name": "LpDistance"}})  # as a config does
    nested = me.Combine(model, methods=[me.EWC(model, loss=loss), me.IMM(model, mode="mode", loss=loss)])
    save_model(path, model, nested)
    again = load_model(path).method
    for one in again.methods:
        assert type(one.loss) is type(loss) and one.loss.pos_margin == 0.25
        assert type(one.loss.distance).__name__ == "LpDistance"


def test_a_loss_that_a_file_cannot_hold_must_be_given_with_the_method(path):
    model = small_conv()
    ewc = me.EWC(model, loss=pull_together, strength=7)
    save_model(path, model, ewc)
    with pytest.raises(
        UserError,
        match=r"the EWC of .* was made with loss, which a file cannot hold; pass load_model\(path, method=lambda",
    ):
        load_model(path)  # fmt: skip
    again = load_model(path, method=lambda model: me.EWC(model, loss=pull_together, strength=7))
    assert again.method.strength == 7
    own = small_conv()
    assert load_model(path, own, method=me.EWC(own, loss=pull_together)).model is own
    with pytest.raises(UserError, match="made with another model"):
        load_model(path, own, method=me.EWC(small_conv(), loss=pull_together))
    with pytest.raises(UserError, match="method must be a method, or a function"):
        load_model(path, method=lambda model: 3)


def test_a_model_that_was_not_made_by_name_must_be_given(path):
    model = small_model()
    save_model(path, model, me.MAS(model))
    with pytest.raises(
        UserError, match=r"holds a Sequential that was not made by name; pass the model.*load_model\(path, model\)"
    ):
        load_model(path)  # fmt: skip
    other = small_model(1)
    assert load_model(path, other).model is other
    assert all(map(torch.equal, other.parameters(), model.parameters()))


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 4), small_model().half(), nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 5))]
)
def test_another_model_is_refused_and_stays_as_it_was(path, model):
    trained = small_model()
    save_model(path, trained, me.MAS(trained))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        UserError, match=r"holds the weights of another model: \d tensors differ, such as .* \(the file"
    ):
        load_model(path, model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_stays_as_it_was_if_its_method_is_refused(path):
    trained = small_model()
    save_model(path, trained, me.MAS(trained))
    other = small_model(1)
    before = other[0].weight.clone()
    with pytest.raises(UserError, match=r"model.safetensors cannot be loaded: the state lacks"):
        load_model(path, other, method=me.Replay(other))
    assert torch.equal(other[0].weight, before)


def test_types_and_compiled_models_and_shared_weights_come_back(path):
    model = small_conv().to(torch.bfloat16)
    save_model(path, model, me.Finetune(model))
    again = load_model(path).model
    assert again.head.weight.dtype == torch.bfloat16 and torch.equal(again.head.weight, model.head.weight)
    compiled = torch.compile(float_model := small_conv())
    save_model(path, compiled, me.MAS(compiled))
    assert torch.equal(load_model(path).model.head.weight, float_model.head.weight)


def test_no_weights_are_read_to_be_replaced_at_once(path, monkeypatch):
    options = {"network": "cifar_resnet20", "weights": "none", "embedding_size": 4}
    model = me.MODELS["backbone"](**options)
    remember_made(model, "backbone", {**options, "weights": "default"})  # as if downloaded
    save_model(path, model, me.Finetune(model))
    again = load_model(path).model
    assert torch.equal(again.head.weight, model.head.weight)
    with without_reading_weights():
        me.MODELS["backbone"](network="cifar_resnet20", weights="nothing.safetensors")
    with pytest.raises(UserError, match="nothing.safetensors"):
        me.MODELS["backbone"](network="cifar_resnet20", weights="nothing.safetensors")


def test_every_flipped_byte_is_noticed_or_changes_nothing(path):
    model = small_conv()
    save_model(path, model, me.MAS(model))
    content = path.read_bytes()
    for position in range(0, len(content), 997):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with suppress(UserError):
            assert torch.equal(load_model(path).model.head.weight, model.head.weight)


@pytest.mark.parametrize(("content", "message"), [
    ({"kind": "importance"}, "is not a model of save_model but holds 'importance'"),
    ({"kind": "model", "version": 9}, "was written by a newer version of mas-embed"),
    ({"kind": "model", "version": 1}, "is damaged"),
    ({"kind": "model", "version": 1, "numbers": {}}, "is damaged: it does not describe a model"),
    ({"kind": "model", "version": 1, "numbers": {}, "model": {}, "method": {}, "learned": {"names": 3}},
     "is damaged: it does not say which splits were learned"),
    ({"kind": "model", "version": 1, "numbers": {}, "learned": {}, "method": {},
      "model": {"name": "mine", "module": "my_models", "options": {}}},
     "holds the model 'mine', which nobody has registered; import my_models, which registers it, first"),
])  # fmt: skip
def test_a_file_of_another_form_is_refused(path, content, message):
    write_tensors(path, {}, content)
    with pytest.raises(UserError, match=message):
        load_model(path)


def test_missing_torn_and_foreign_files_are_refused(path, tmp_path):
    with pytest.raises(UserError, match="cannot read the file"):
        load_model(path)
    model = small_conv()
    save_model(path, model, me.Finetune(model))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot read .* as a safetensors file"):
        load_model(path)
    torch.save(model, path)
    with pytest.raises(UserError, match="cannot read"):
        load_model(path)
    with pytest.raises(UserError, match="the folder .* does not exist"):
        save_model(tmp_path / "no" / "folder.safetensors", model, me.Finetune(model))
    with pytest.raises(UserError, match="made with another model"):
        save_model(path, model, me.Finetune(small_conv()))
    with pytest.raises(UserError, match="takes a method, such as"):
        save_model(path, model, "mas")


def test_a_state_that_is_neither_tensor_nor_json_is_refused(path):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"what": object()}

    model = Odd(2, 2)
    with pytest.raises(UserError, match="cannot hold 'model/_extra_state/what' of the state"):
        save_model(path, model, me.Finetune(model))
    assert not path.exists()


def test_files_are_read_as_for_the_evaluation(path, tmp_path):
    write_classes(tmp_path / "images", {"a": 8, "b": 8})
    splits = me.transform_splits(
        me.image_folder(root=tmp_path / "images", splits=1, image_size=8, short_side=10), normalize="data"
    )
    model = me.small_conv(width=2, channels=3)
    save_model(path, model, me.Finetune(model), splits=splits)
    known = load_model(path).learned
    query = splits[0].query
    files = query.inputs.images.paths
    assert torch.equal(known.preprocessing.read(files)[1], query.inputs[1])
    assert known.label_names == {"a": [0], "b": [1]}
    more = me.SplitSequence(me.digits()[:1], label_names={"b": [1], "c": [2]})
    save_model(path, model, me.Finetune(model), splits=more, after=known)
    both = load_model(path).learned
    assert both.names == ["1", "0-1"] and both.preprocessing == known.preprocessing
    assert both.label_names == {"a": [0], "b": [1], "c": [2]}
    with pytest.raises(UserError, match=r"takes images of shape \[3, 8, 8\], got"):
        known.preprocessing(torch.zeros(1, 3, 9, 8))
    digits = me.LearnedSplits.of(me.digits()).preprocessing
    assert digits.image_size == (8, 8)
    with pytest.raises(UserError, match="not known how files are scaled"):
        digits.read(files)
    texts = me.Split("texts", *[me.Part(["a", "b"], torch.tensor([0, 1]))] * 3)
    assert me.LearnedSplits.of([texts]).preprocessing is None


def test_how_a_model_was_made_is_known_and_can_be_pickled():
    assert made_by_name(me.small_conv(width=3)).options["width"] == 3
    assert made_by_name(small_model()) is None and made_by_name([1]) is None
    assert pickle.loads(pickle.dumps(me.small_conv)) is me.small_conv
