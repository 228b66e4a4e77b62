"""The callback against a plain loop with the same batches, its order, checkpoints, and what it refuses."""

import copy
import os
import runpy
import socket
import sys
import warnings
from functools import partial

import pytest
import torch
from small import pull_together, small_model, small_splits
from torch import nn

import mas_embed as me
from mas_embed import METHODS, UserError

L = pytest.importorskip("lightning.pytorch")

from mas_embed.integrations import lightning  # noqa: E402
from mas_embed.integrations.lightning import MethodCallback, SplitsDataModule, training_loss  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers which may be a bottleneck"),
    pytest.mark.filterwarnings("ignore:.*in the `DataLoader` will be ignored|.*LeafSpec.* is deprecated"),
]

OPTIONS = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
NO_CHECKPOINT = OPTIONS | {"enable_checkpointing": False}


MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


class Net(L.LightningModule):
    """A module that was written without a method in mind; the embedding model is `self.net`."""

    def __init__(self, optimizer=MOMENTUM):
        super().__init__()
        self.net = small_model()
        self.make_optimizer = optimizer
        self.events = []

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return pull_together(self(inputs), labels)

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.events.append("clip")
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)


class ServingNet(Net):
    """A module whose `training_step` shows its batches to the method."""

    def training_step(self, batch, batch_idx):
        return training_loss(self, *batch, loss=pull_together)


def data(split_index, batch_size=4, splits=None):
    return SplitsDataModule(splits or small_splits(), split_index=split_index, batch_size=batch_size)


def fit(module, callback, split_index, *, epochs=2, ckpt_path=None, **options):
    trainer = L.Trainer(max_epochs=epochs, callbacks=[callback] if callback else [], **(NO_CHECKPOINT | options))
    trainer.fit(module, datamodule=data(split_index), ckpt_path=ckpt_path)
    return trainer


def plain_loop(module, method, split_index, *, epochs=2, accumulate=1, clip=None):
    """One split in the order of the hooks that the documentation of `Method` shows."""
    optimizer = module.configure_optimizers()
    datamodule = data(split_index)
    loader = datamodule.train_dataloader()
    method.begin_split()
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        for index, (inputs, labels) in enumerate(loader):
            inputs, labels = method.extend_batch(inputs, labels)
            embeddings = module.net(inputs)
            extra = method.batch_penalty(inputs, embeddings)
            embeddings, labels = method.extend_embeddings(embeddings, labels)
            loss = pull_together(embeddings, labels)
            ((loss if extra is None else loss + extra) / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(loader):
                method.add_penalty_grad()
                if clip is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                method.after_step(optimizer)
                optimizer.zero_grad()
    part = datamodule.split.train
    method.consolidate(list(zip(part.inputs.split(4), part.labels.split(4), strict=True)))


def make(name, model):
    options = {"ewc": {"loss": pull_together}, "replay": {"buffer_size": 6}}.get(name, {})
    if name == "combine":
        return me.Combine(model, methods=[me.SI(model), me.MAS(model), me.Replay(model, buffer_size=6)])
    return METHODS.get(name)(model, **options)


def scores(module):
    evaluation = me.RetrievalEvaluator(recall_at=(1,)).evaluate(module, small_splits(), 1)
    return evaluation.scores["mean_average_precision"]


def assert_same(first, second, tolerance=1e-5):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, dict):
            assert_same(value, second[name], tolerance)
        elif isinstance(value, str):  # a fingerprint of weights, which rounding changes
            assert tolerance or value == second[name]
        else:
            torch.testing.assert_close(
                torch.as_tensor(value), torch.as_tensor(second[name]), rtol=tolerance, atol=tolerance
            )


# Training


# Other tests register methods of their own
OURS = [name for name, method in METHODS.items() if method.__module__.startswith("mas_embed.methods.")]
ALL = [name for name in OURS if name not in ("joint", "frozen")]


@pytest.mark.parametrize(
    ("name", "inner"), [*((name, False) for name in ALL), ("combine", True), ("lwf", True), ("mas", True)]
)
def test_every_method_trains_as_in_a_plain_loop(name, inner):
    module, expected = ServingNet(), ServingNet()
    method = make(name, module.net if inner else module)
    oracle = make(name, expected.net if inner else expected)
    callback = MethodCallback(method)
    for split_index in range(2):
        fit(module, callback, split_index)
        plain_loop(expected, oracle, split_index)
    assert_same(dict(module.state_dict()), dict(expected.state_dict()))
    assert_same(method.state_dict(), oracle.state_dict())
    torch.testing.assert_close(torch.tensor(scores(module)), torch.tensor(scores(expected)), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [*ALL, "combine"])
def test_every_method_trains_on_a_gpu_as_on_the_cpu(name):
    module, expected = ServingNet(), ServingNet()
    method, oracle = make(name, module), make(name, expected)
    callback = MethodCallback(method)
    for split_index in range(2):
        fit(module, callback, split_index, accelerator="gpu", devices=1)
        plain_loop(expected, oracle, split_index)
    for parameter, other in zip(module.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.cpu(), other, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("name", ALL)
def test_a_method_that_needs_the_batches_is_refused_without_them(name):
    module = Net()
    method = make(name, module)
    before = copy.deepcopy(module.state_dict())
    if not method.batch_hooks:
        fit(module, MethodCallback(method), 0, epochs=1)
        return
    with pytest.raises(UserError, match=r"needs .*; return mas_embed\.integrations\.lightning\.training_loss\(self"):
        fit(module, MethodCallback(method), 0)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_frozen_trains_once_and_joint_trains():
    module = Net()
    callback = MethodCallback(me.Frozen(module))
    fit(module, callback, 0)
    with pytest.raises(UserError, match="call fit only while method.is_learning"):
        fit(module, callback, 1)
    fit(module, MethodCallback(me.Joint(module)), 0, epochs=1)


def test_forgetting_is_lower_than_without():
    def first_split_scores(strength):
        module = Net(partial(torch.optim.Adam, lr=0.02))
        callback = MethodCallback(me.MAS(module.net, strength=strength))
        learned = [fit(module, callback, index, epochs=8) and scores(module)[0] for index in range(2)]
        return learned[0] - learned[1], callback.method.penalty()

    forgotten, _ = first_split_scores(0.0)
    protected, penalty = first_split_scores(30.0)
    assert penalty >= 0
    assert protected < forgotten - 0.02


def test_a_loss_without_a_callback_is_the_plain_loss():
    module, expected = ServingNet(), Net()
    fit(module, None, 0)
    fit(expected, None, 0)
    assert_same(dict(module.state_dict()), dict(expected.state_dict()), 0)


class Recorded(me.MAS):
    """Notes when its hooks are called."""

    def add_penalty_grad(self):
        self.events.append("penalty")
        super().add_penalty_grad()

    def after_step(self, optimizer):
        self.events.append("after")
        super().after_step(optimizer)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_penalty_comes_before_clipping_once_per_step(accumulate):
    module, expected = Net(), Net()
    method, oracle = Recorded(module, strength=30.0), me.MAS(expected, strength=30.0)
    method.events = module.events
    callback = MethodCallback(method)
    for split_index in range(2):
        module.events.clear()
        epochs = (1, 24 if accumulate == 1 else 3)[split_index]
        options = {"gradient_clip_val": 0.1, "accumulate_grad_batches": accumulate}
        trainer = fit(module, callback, split_index, epochs=epochs, **options)
        plain_loop(expected, oracle, split_index, epochs=epochs, clip=0.1, accumulate=accumulate)
        assert module.events == ["penalty", "clip", "after"] * trainer.global_step
    assert trainer.global_step == (72 if accumulate == 1 else 6)
    assert_same(dict(module.state_dict()), dict(expected.state_dict()))


def test_steps_without_a_loss_or_with_infinite_gradients_are_not_taken():
    """A gradient scaler skips the second step; the third batch has no loss. Gradients are unscaled before the penalty."""

    class Skipping(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                return None
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

    class Scaled(L.plugins.MixedPrecision):
        def forward_context(self):
            return torch.autocast("cpu", enabled=False)

    module = Skipping()
    method = Recorded(module)
    method.events = module.events
    gradients = []
    method.add_penalty_grad = lambda: gradients.append(module.net[0].weight.grad.clone())
    plugin = Scaled("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*`training_step` returned `None`")
        fit(module, MethodCallback(method), 0, epochs=1, plugins=[plugin])
    assert module.events.count("after") == 1
    assert len(gradients) == 2
    reference = Net()
    inputs, labels = next(iter(data(0).train_dataloader()))
    pull_together(reference(inputs), labels).backward()
    torch.testing.assert_close(gradients[0], reference.net[0].weight.grad)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")  # by dynamo
def test_frozen_parameters_and_compiled_modules():
    module, expected = Net(), Net()
    for net in (module, expected):
        net.net[0].requires_grad_(False)
    method, oracle = me.MAS(module), me.MAS(expected)
    callback = MethodCallback(method)
    compiled = torch.compile(module, backend="eager")
    for split_index in range(2):
        fit(compiled, callback, split_index)
        plain_loop(expected, oracle, split_index)
    assert set(method.importance) == {"net.2.weight", "net.2.bias"}
    assert_same(dict(module.state_dict()), dict(expected.state_dict()))
    assert_same(method.state_dict(), oracle.state_dict())
    with pytest.raises(UserError, match="compile a module inside the LightningModule"):
        fit(compiled, MethodCallback(me.LwF(module)), 0)


def test_a_trainer_of_pytorch_lightning():
    pl = pytest.importorskip("pytorch_lightning")

    class Other(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.make_optimizer = small_model(), MOMENTUM

        forward, training_step, configure_optimizers = Net.forward, ServingNet.training_step, Net.configure_optimizers

    module, expected = Other(), Net()
    callback, oracle = MethodCallback(me.MAS(module)), me.MAS(expected)
    for split_index in range(2):
        trainer = pl.Trainer(max_epochs=2, callbacks=[callback], **NO_CHECKPOINT)
        trainer.fit(module, data(split_index).train_dataloader())
        plain_loop(expected, oracle, split_index)
    assert_same(dict(module.state_dict()), dict(expected.state_dict()))


# Consolidation


def test_the_training_data_is_read_in_order_without_side_effects():
    class Drawing(torch.utils.data.Dataset):
        def __init__(self, part):
            self.part, self.read = part, []

        def __len__(self):
            return len(self.part)

        def __getitem__(self, index):
            self.read.append(index)
            torch.rand(())  # a random augmentation
            return self.part[index]

    class Reading(me.Method):
        def consolidate(self, batches):
            dataset.read.clear()
            self.batches = list(batches)

    class Watching(MethodCallback):
        def on_train_end(self, *hook):
            before = torch.get_rng_state()
            super().on_train_end(*hook)
            self.is_unchanged = torch.equal(before, torch.get_rng_state())

    dataset = Drawing(small_splits()[0].train)
    module = Net()
    callback = Watching(Reading(module))
    loader = torch.utils.data.DataLoader(dataset, batch_size=5, shuffle=True, drop_last=True)
    L.Trainer(max_epochs=1, callbacks=[callback], **NO_CHECKPOINT).fit(module, loader)
    assert dataset.read == list(range(12))
    assert [len(labels) for _, labels in callback.method.batches] == [5, 5, 2]
    assert callback.is_unchanged


def test_given_batches_are_converted_and_may_be_unlabeled():
    module = Net()
    callback = MethodCallback(me.MAS(module))
    inputs = small_splits()[1].train.inputs
    callback.batches = [inputs.float()]
    fit(module, callback, 0, precision="64-true")
    expected = me.estimate_importance(module, [inputs.double()])
    assert callback.method.importance["net.0.weight"].dtype == torch.float64
    assert_same(callback.method.importance, dict(expected), 1e-10)


@pytest.mark.parametrize("kind", ["sampler", "batch_sampler", "iterable", "several"])
def test_data_that_cannot_be_read_in_order_is_refused(kind):
    part = small_splits()[0].train
    indices = torch.utils.data.SubsetRandomSampler(range(6))

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(part)

    loader, reason = {
        "sampler": lambda: (torch.utils.data.DataLoader(part, sampler=indices), "SubsetRandomSampler"),
        "batch_sampler": lambda: (
            torch.utils.data.DataLoader(part, batch_sampler=[[0, 6], [1, 7]]),
            "a batch sampler of its own",
        ),
        "iterable": lambda: (torch.utils.data.DataLoader(Stream()), "is an IterableDataset"),
        "several": lambda: ([torch.utils.data.DataLoader(part)], "is a list"),
    }[kind]()
    module = ListNet() if kind == "several" else Net()
    trainer = L.Trainer(max_epochs=1, callbacks=[MethodCallback(me.MAS(module))], **NO_CHECKPOINT)
    with pytest.raises(UserError, match=f"{reason}.*pass MethodCallback"):
        trainer.fit(module, loader)


class ListNet(Net):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch[0], batch_idx)


# Checkpoints


def saving(folder):
    return L.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize(
    ("name", "epoch"), [("mas", 0), ("si", 0), ("imm", 0), ("combine", 0), ("imm", 1), ("combine", 1)]
)
def test_a_resumed_fit_equals_an_uninterrupted_one(name, epoch, tmp_path):
    """Also from the last epoch's checkpoint, which is saved before the split is consolidated."""

    def first_split():
        module = ServingNet()
        callback = MethodCallback(make(name, module))
        fit(module, callback, 0)
        return module, callback

    module, callback = first_split()
    trainer = L.Trainer(max_epochs=2, callbacks=[callback, saving(tmp_path)], **OPTIONS)
    trainer.fit(module, datamodule=data(1))

    resumed, resumed_callback = first_split()
    trainer = L.Trainer(max_epochs=2, callbacks=[resumed_callback, saving(tmp_path / "resumed")], **OPTIONS)
    trainer.fit(resumed, datamodule=data(1), ckpt_path=tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
    assert_same(dict(resumed.state_dict()), dict(module.state_dict()), 0)
    assert_same(resumed_callback.state_dict(), callback.state_dict(), 0)
    assert not resumed_callback.state_dict()["is_in_split"]


def test_the_checkpoint_saved_after_fit_starts_the_next_split(tmp_path):
    module = Net()
    callback = MethodCallback(me.MAS(module))
    fit(module, callback, 0).save_checkpoint(tmp_path / "split0.ckpt")
    fit(module, callback, 1)

    saved = torch.load(tmp_path / "split0.ckpt", weights_only=True)
    other = Net()
    other_callback = MethodCallback(me.MAS(other))
    other.load_state_dict(saved["state_dict"])
    other_callback.load_state_dict(saved["callbacks"]["MethodCallback"])
    fit(other, other_callback, 1)
    assert_same(dict(other.state_dict()), dict(module.state_dict()), 0)


def test_a_state_from_before_consolidation_does_not_start_a_split(tmp_path):
    module = Net()
    callback = MethodCallback(me.MAS(module))
    trainer = L.Trainer(
        max_epochs=1, callbacks=[callback, L.callbacks.ModelCheckpoint(tmp_path, filename="last")], **OPTIONS
    )
    trainer.fit(module, datamodule=data(0))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    callback.load_state_dict(saved["callbacks"]["MethodCallback"])
    with pytest.raises(UserError, match="saved before its split was consolidated"):
        fit(module, callback, 1)
    with pytest.raises(UserError, match="the checkpoint is of split 0, but the data module trains on split 1"):
        fit(module, MethodCallback(me.MAS(module)), 1, ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(UserError, match="it is not a state of MethodCallback"):
        callback.load_state_dict({"state": {}})


def test_an_exception_leaves_no_hook_and_does_not_consolidate():
    class Failing(Net):
        def on_train_epoch_end(self):
            raise RuntimeError("no")

    module = Failing()
    callback = MethodCallback(me.MAS(module))
    with pytest.raises(RuntimeError, match="no"):
        fit(module, callback, 0)
    assert callback.method.num_splits == 0
    assert not callback._hook_handles
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


# Logging


@pytest.mark.parametrize("when", ["epoch", "step", "never"])
def test_the_penalty_is_logged(when):
    module = Net()
    callback = MethodCallback(me.MAS(module, strength=3.0), log_penalty=when)
    fit(module, callback, 0)
    penalties = []
    add, end = callback.method.add_penalty_grad, callback.on_train_epoch_end
    callback.method.add_penalty_grad = lambda: (penalties.append(float(callback.method.penalty().detach())), add())[-1]
    callback.on_train_epoch_end = lambda *hook: (epochs.append(float(callback.method.penalty().detach())), end(*hook))[
        -1
    ]
    epochs = []
    logged = fit(module, callback, 1).callback_metrics
    assert max(epochs) > 0
    if when == "never":
        assert "penalty" not in logged
    else:
        assert float(logged["penalty"]) == pytest.approx((epochs if when == "epoch" else penalties)[-1])


# Refusals


class ManualNet(Net):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("module", "options", "sentence"),
    [
        (ManualNet, {}, "needs automatic optimization"),
        (partial(Net, partial(torch.optim.LBFGS, lr=0.1)), {}, "LBFGS needs the penalty in the loss"),
        pytest.param(Net, {"strategy": "ddp_spawn"}, "starts its processes by spawn or fork", marks=pytest.mark.slow),
    ],
    ids=["manual", "lbfgs", "spawn"],
)
def test_what_cannot_be_served_is_refused(module, options, sentence):
    module = module()
    with pytest.raises(Exception, match=sentence):
        fit(module, MethodCallback(me.MAS(module)), 0, **options)


def test_a_second_fit_of_the_same_trainer_is_refused():
    module = Net()
    callback = MethodCallback(me.MAS(module.net))
    trainer = fit(module, callback, 0)
    with pytest.raises(UserError, match="fit has not trained, .*; make a new Trainer for every split"):
        trainer.fit(module, datamodule=data(1))
    assert callback.method.num_splits == 1


def test_a_checkpoint_of_a_split_that_has_ended_is_fitted_without_effect(tmp_path):
    module = Net()
    callback = MethodCallback(me.MAS(module.net))
    fit(module, callback, 0).save_checkpoint(tmp_path / "last.ckpt")
    fit(module, callback, 0, ckpt_path=tmp_path / "last.ckpt")
    assert callback.method.num_splits == 1


@pytest.mark.parametrize("is_first", [True, False])
def test_averaging_of_weights_comes_before_the_method(is_first):
    module = Net()
    callback = MethodCallback(me.MAS(module.net))
    averaging = L.callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    trainer = L.Trainer(
        max_epochs=2, callbacks=[averaging, callback] if is_first else [callback, averaging], **NO_CHECKPOINT
    )
    if not is_first:
        with pytest.raises(
            UserError, match="StochasticWeightAveraging changes the weights when training ends; put it before"
        ):
            trainer.fit(module, datamodule=data(0))
        return
    trainer.fit(module, datamodule=data(0))
    for name, parameter in module.net.named_parameters():
        assert torch.equal(callback.method.anchor[name], parameter)


def test_a_fused_optimizer_under_a_gradient_scaler_is_refused():
    module = Net(partial(torch.optim.Adam, lr=0.1, fused=True))
    plugin = L.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(UserError, match="a fused Adam unscales gradients after the penalty is added"):
        fit(module, MethodCallback(me.MAS(module)), 0, plugins=[plugin])


def test_a_method_of_another_model_is_refused():
    with pytest.raises(UserError, match="Sequential that is not part of the Net that is trained"):
        fit(Net(), MethodCallback(me.MAS(small_model())), 0)


def test_arguments_are_checked():
    with pytest.raises(UserError, match=r"takes a method, such as MAS\(module\), got a Linear"):
        MethodCallback(nn.Linear(1, 1))
    with pytest.raises(UserError, match="log_penalty must be one of epoch, step, never, got 'always'"):
        MethodCallback(me.Finetune(nn.Linear(1, 1)), log_penalty="always")
    with pytest.raises(UserError, match="split_index must be from 0 to 2, got 3"):
        data(3)
    with pytest.raises(UserError, match="splits must be a sequence of Split"):
        SplitsDataModule([1])


# The data module


def test_the_data_module_goes_over_every_item_in_a_new_order():
    datamodule = data(1)
    loader = datamodule.train_dataloader()

    def labels_of_epoch(epoch):
        loader.sampler.set_epoch(epoch)
        return torch.cat([inputs for inputs, _ in loader])

    first, second = labels_of_epoch(0), labels_of_epoch(1)
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, datamodule.split.train.inputs.sort(0).values)
    assert torch.equal(first, labels_of_epoch(0))
    queries, gallery = datamodule.predict_dataloader()
    assert torch.equal(torch.cat([labels for _, labels in queries]), datamodule.split.query.labels)
    assert torch.equal(torch.cat([inputs for inputs, _ in gallery]), datamodule.split.gallery.inputs)


def test_a_sampler_of_the_data_module_changes_training_only():
    module = Net()
    callback = MethodCallback(me.MAS(module))
    datamodule = SplitsDataModule(small_splits(), batch_size=4, sampler=partial(me.per_class_sampler, m=2))
    trainer = L.Trainer(max_epochs=1, callbacks=[callback], **NO_CHECKPOINT)
    trainer.fit(module, datamodule=datamodule)
    expected = me.estimate_importance(module, [datamodule.split.train.inputs])
    assert_same(callback.method.importance, dict(expected))


# Several processes


def train_in_a_process(rank, folder, port):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "run",
    }  # fmt: skip
    module = Net()
    callback = MethodCallback(me.MAS(module, strength=3.0))
    for split_index in range(2):
        fit(module, callback, split_index, devices=2, strategy="ddp")
    torch.save({"weights": module.state_dict(), "method": callback.method.state_dict()}, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_hold_the_same_state_and_the_importance_of_all_items(tmp_path):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(train_in_a_process, (str(tmp_path), port), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert_same(dict(first["weights"]), dict(second["weights"]), 0)
    assert_same(first["method"], second["method"], 0)
    module = Net()
    module.load_state_dict(first["weights"])
    last = me.estimate_importance(module, [small_splits()[1].train.inputs])
    total = first["method"]["importance"]
    assert all(bool((total[name] >= value - 1e-6).all()) for name, value in last.items())


def test_the_extra_is_named_when_lightning_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(UserError, match=r"pip install 'mas-embed\[lightning\]'"):
        runpy.run_path(lightning.__file__)


def test_the_data_module_trains_on_the_training_view():
    part = small_splits()[0].train
    shifted = me.Part(part.inputs, part.labels, part.ids, augmented=Shifted(part.inputs))
    data = SplitsDataModule([me.Split("a", shifted, part, part)], batch_size=5)

    def epoch(number):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return torch.cat([inputs for inputs, _ in loader])

    assert float(epoch(0).min()) > 50
    assert torch.equal(epoch(1), epoch(1)) and not torch.equal(epoch(0), epoch(1))
    assert float(torch.cat([inputs for inputs, _ in data.ordered_dataloader()]).max()) < 50


class Shifted:
    def __init__(self, inputs):
        self.inputs = inputs

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        return self.inputs[index] + 100 + torch.rand(())
