"""The trainers of pytorch-metric-learning with a method, against plain loops with the same batches."""

import copy
import logging
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_metric_learning import losses, miners, samplers, testers, trainers
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper
from pytorch_metric_learning.utils.logging_presets import HookContainer
from small import small_splits
from torch import nn

import mas_embed as me
from mas_embed.integrations.metric_learning import (
    ExtendedBatches,
    IterationHook,
    WithPenalty,
    copy_classes,
    gradient_clippers,
    joined,
    next_split,
    score_hook,
)

# The trainers format their loss with "%.5f", of which recent versions of torch warn once
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning")

BATCH_SIZE, EPOCHS = 4, 3
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("PML").setLevel(logging.ERROR)


def make_models(seed=0):
    with me.seeded(seed):
        trunk = nn.Sequential(nn.Linear(2, 8), nn.Tanh())
        return {"trunk": trunk, "embedder": nn.Linear(8, 4)}


def make_dataset(part):
    return torch.utils.data.TensorDataset(part.inputs, part.labels)


def make_batches(part):
    return list(zip(part.inputs.split(BATCH_SIZE), part.labels.split(BATCH_SIZE), strict=True))


def make_trainer(models, loss_funcs, dataset, *, trainer=trainers.MetricLossOnly, optimizer=None, **options):
    make_optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    optimizers = {f"{name}_optimizer": make_optimizer(model.parameters()) for name, model in models.items()}
    optimizers |= options.pop("optimizers", {})
    return trainer(
        models=models,
        optimizers=optimizers,
        batch_size=BATCH_SIZE,
        loss_funcs=loss_funcs,
        dataset=dataset,
        data_device=CPU,
        dataloader_num_workers=0,
        **options,
    )


def parameters_of(models):
    return [parameter.detach().clone() for model in models.values() for parameter in model.parameters()]


def assert_equal(actual, expected, **tolerance):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **(tolerance or {"rtol": 0, "atol": 0}))


def make_loss():
    return losses.ContrastiveLoss(neg_margin=2.0)


def train_two_splits(form, *, make_method=None, loss=None, seed=0, **options):
    """Two splits in a trainer; `form` is "loss", "gradient" or None. Returns models, method, trainer and the logged penalties."""
    splits, models, logged = small_splits(2), make_models(), []
    method = (make_method or (lambda model: me.MAS(model, strength=1.0)))(joined(models))
    loss = loss or make_loss()
    hook = IterationHook(method, lambda trainer: logged.append(float(trainer.losses["penalty"])))
    if form == "loss":
        loss = WithPenalty(loss, method, after_step=hook)
    elif form == "gradient":
        options["gradient_clippers"] = gradient_clippers(method, after_step=hook)
    hooks = {"end_of_iteration_hook": hook} if form else {}
    trainer = make_trainer(models, {"metric_loss": loss}, make_dataset(splits[0].train), **hooks, **options)
    with me.seeded(seed):
        method.begin_split()
        trainer.train(num_epochs=EPOCHS)
        method.consolidate(make_batches(splits[0].train))
        start = next_split(trainer, make_dataset(splits[1].train))
        method.begin_split()
        trainer.train(start, start + EPOCHS - 1)
    return models, method, trainer, logged


def plain_loop(*, strength, seed=0, optimizer=torch.optim.SGD, decoupled=False):
    """The same two splits by hand, with the penalty written out; batches in the order of the trainer's data loader."""
    splits, models = small_splits(2), make_models()
    model = nn.Sequential(models["trunk"], models["embedder"])
    loss, anchor, importance = make_loss(), [], []
    with me.seeded(seed):
        for index, split in enumerate(splits):
            steps = optimizer(model.parameters(), lr=0.1)
            dataset = make_dataset(split.train)
            loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
            batches = iter(loader)
            for _ in range(EPOCHS * len(loader)):
                try:
                    inputs, labels = next(batches)
                except StopIteration:
                    batches = iter(loader)
                    inputs, labels = next(batches)
                value = loss(model(inputs), labels)
                for parameter, old, weight in zip(model.parameters(), anchor, importance, strict=bool(anchor)):
                    if anchor:
                        value = value + strength * (weight * (parameter - old) ** 2).sum()
                steps.zero_grad()
                value.backward()
                steps.step()
            if index == 0:
                estimated = me.estimate_importance(model, make_batches(split.train))
                importance = list(estimated.values())
                anchor = [parameter.detach().clone() for parameter in model.parameters()]
    return models


def score(models, split):
    with torch.no_grad():
        embeddings = models["embedder"](models["trunk"](split.query.inputs))
    return me.evaluate_retrieval(embeddings, split.query.labels, distance="euclidean").mean_average_precision


def loss_on(models, split):
    with torch.no_grad():
        return float(make_loss()(models["embedder"](models["trunk"](split.train.inputs)), split.train.labels))


# The two forms


@pytest.mark.parametrize("form", ["loss", "gradient"])
def test_two_splits_equal_a_plain_loop(form):
    models, _, _, logged = train_two_splits(form)
    expected = plain_loop(strength=1.0)
    assert_equal(parameters_of(models), parameters_of(expected), rtol=1e-5, atol=1e-6)
    for split in small_splits(2):
        assert score(models, split) == pytest.approx(score(expected, split), abs=1e-5)
    steps = len(logged) // 2
    assert not any(logged[:steps]) and all(value > 0 for value in logged[steps + 1 :])


def test_the_penalty_reduces_forgetting():
    train = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "metric_learning_trainer.py"))["train"]
    plain, protected = train(0.0), train(300.0)
    assert plain.forgetting > 0.05 and protected.forgetting < 0.6 * plain.forgetting
    assert protected.final_average > plain.final_average


@pytest.mark.parametrize("form", ["loss", "gradient"])
def test_strength_0_is_the_trainer_without_a_method(form):
    protected = train_two_splits(form, make_method=lambda model: me.MAS(model, strength=0))[0]
    assert_equal(parameters_of(protected), parameters_of(train_two_splits(None)[0]))


def test_the_loss_at_strength_0_is_the_loss():
    models, method, _, _ = train_two_splits("loss")
    embeddings, labels = models["embedder"](models["trunk"](torch.randn(6, 2))), torch.tensor([0, 0, 1, 1, 2, 2])
    plain, wrapped = make_loss(), WithPenalty(make_loss(), method)
    added = wrapped(embeddings, labels) - plain(embeddings, labels)
    torch.testing.assert_close(added, method.penalty())
    assert wrapped.penalty == method.penalty() > 0
    method.strength = 0
    value = wrapped(embeddings, labels)
    assert (
        torch.equal(value, plain(embeddings, labels))
        and value.grad_fn.name() == plain(embeddings, labels).grad_fn.name()
    )


def test_other_clippers_run_after_the_penalty():
    splits, models = small_splits(2), make_models()
    method = me.MAS(joined(models), strength=1.0)
    norms = []

    def clip():
        norms.append(float(nn.utils.clip_grad_norm_(joined(models).parameters(), 0.01)))

    clippers = gradient_clippers(method, clippers={"trunk_grad_clipper": clip})
    trainer = make_trainer(
        models, {"metric_loss": make_loss()}, make_dataset(splits[0].train), gradient_clippers=clippers
    )
    method.consolidate(make_batches(splits[0].train))
    before = parameters_of(models)
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.add_(1.0)
    moved = parameters_of(models)
    trainer.train(num_epochs=1)
    change = torch.cat([(one - other).flatten() for one, other in zip(parameters_of(models), moved, strict=True)])
    assert max(norms) > 1 and change.norm() <= 0.1 * 0.01 * len(norms) * 1.001
    assert len(before) == len(moved)
    with pytest.raises(me.UserError, match="make one method of both with Combine"):
        gradient_clippers(me.MAS(joined(models)), clippers=clippers)


# Methods with other hooks


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam], ids=["SGD", "Adam"])
@pytest.mark.parametrize("name", ["SI", "decoupled MAS", "EWC", "combined"])
def test_methods_train_as_in_our_own_hooks(name, optimizer):
    """Against a loop that calls every hook, with one optimizer for the whole model."""

    def make_method(model):
        if name == "SI":
            return me.SI(model, strength=1.0)
        if name == "EWC":
            return me.EWC(model, strength=1.0, loss=make_loss())
        decoupled = me.MAS(model, strength=1.0, decoupled=True)
        return decoupled if name == "decoupled MAS" else me.Combine(model, methods=[me.SI(model), decoupled])

    def make_optimizer(parameters):
        return optimizer(parameters, lr=0.05)

    models = train_two_splits("gradient", make_method=make_method, optimizer=make_optimizer)[0]
    expected = make_models()
    model, loss = joined(expected), make_loss()
    method = make_method(model)
    with me.seeded(0):
        for split in small_splits(2):
            steps = make_optimizer(model.parameters())
            dataset = make_dataset(split.train)
            loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
            method.begin_split()
            batches = [batch for _ in range(EPOCHS) for batch in loader]
            for inputs, labels in batches:
                steps.zero_grad()
                loss(model(inputs), labels).backward()
                method.add_penalty_grad()
                steps.step()
                method.after_step(steps)
            method.consolidate(make_batches(split.train))
            if split.name == "s1":
                break
    assert_equal(parameters_of(models), parameters_of(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["Replay", "inputs", "layer", "combined"])
def test_methods_that_extend_batches_train_as_in_our_own_hooks(name):
    def make_method(model):
        if name == "inputs":
            return me.ClassStatistics(model)
        if name == "layer":
            return me.ClassStatistics(model, layer="trunk")
        replay = me.Replay(model, buffer_size=6)
        return replay if name == "Replay" else me.Combine(model, methods=[me.MAS(model, strength=1.0), replay])

    models, split_pair = make_models(), small_splits(2)
    method = make_method(joined(models))
    getter, hook = ExtendedBatches(method), IterationHook(method)
    loss = WithPenalty(make_loss(), method, extend_batch=getter, after_step=hook)
    trainer = make_trainer(
        models, {"metric_loss": loss}, make_dataset(split_pair[0].train),
        data_and_label_getter=getter, end_of_iteration_hook=hook,
    )  # fmt: skip
    with me.seeded(0):
        trainer.train(num_epochs=1)
        method.consolidate(make_batches(split_pair[0].train))
        start = next_split(trainer, make_dataset(split_pair[1].train))
        trainer.train(start, start + 1)
    expected = make_models()
    model, loss = joined(expected), make_loss()
    method = make_method(model)
    with me.seeded(0):
        for split, epochs in zip(split_pair, (1, 2), strict=True):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            dataset = make_dataset(split.train)
            loader = torch.utils.data.DataLoader(dataset, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
            for inputs, labels in [batch for _ in range(epochs) for batch in loader]:
                inputs, labels = method.extend_batch(inputs, labels)
                embeddings, labels = method.extend_embeddings(model(inputs), labels)
                optimizer.zero_grad()
                (loss(embeddings, labels) + method.penalty()).backward()
                optimizer.step()
                method.after_step(optimizer)
            if split is split_pair[0]:
                method.consolidate(make_batches(split.train))
    assert_equal(parameters_of(models), parameters_of(expected), rtol=1e-5, atol=1e-6)


def test_what_a_form_cannot_do_is_refused():
    models = make_models()
    model = joined(models)
    si, replay = me.SI(model), me.Replay(model)
    decoupled = me.MAS(model, decoupled=True)
    statistics = me.ClassStatistics(model, layer="trunk")
    with pytest.raises(me.UserError, match="LwF needs the inputs and the embeddings of a batch together"):
        WithPenalty(make_loss(), me.LwF(model))
    with pytest.raises(me.UserError, match="LwF needs the inputs"):
        gradient_clippers(me.Combine(model, methods=[me.MAS(model), me.LwF(model)]))
    for form in (lambda method, **options: WithPenalty(make_loss(), method, **options), gradient_clippers):
        with pytest.raises(me.UserError, match="Replay extends batches: pass getter = ExtendedBatches"):
            form(replay)
        with pytest.raises(me.UserError, match="Replay extends batches"):
            form(replay, extend_batch=ExtendedBatches(me.Replay(model)))
        with pytest.raises(me.UserError, match="SI acts after every step: pass hook = IterationHook"):
            form(si)
        form(replay, extend_batch=ExtendedBatches(replay))
        form(me.MAS(model))
    with pytest.raises(me.UserError, match="SI reads the gradient without the penalty"):
        WithPenalty(make_loss(), si, after_step=IterationHook(si))
    with pytest.raises(me.UserError, match="MAS is decoupled"):
        WithPenalty(make_loss(), decoupled, after_step=IterationHook(decoupled))
    with pytest.raises(me.UserError, match="ClassStatistics extends embeddings, which a gradient clipper does not"):
        gradient_clippers(statistics, extend_batch=ExtendedBatches(statistics), after_step=IterationHook(statistics))
    with pytest.raises(me.UserError, match="the loss must be a torch.nn.Module, got an object of type function"):
        WithPenalty(make_loss, me.MAS(model))
    with pytest.raises(me.UserError, match=r"must be a Method such as MAS\(joined\(models\)\), got a dict"):
        gradient_clippers(models)
    with pytest.raises(me.UserError, match="models must have a 'trunk'"):
        joined({"embedder": nn.Identity()})
    with pytest.raises(me.UserError, match="with labels"):
        ExtendedBatches(replay)((torch.zeros(2, 2), torch.zeros(2, 2), torch.zeros(2)))


def test_embeddings_are_not_extended_beside_a_miner():
    models, splits = make_models(), small_splits(2)
    method = me.ClassStatistics(joined(models), layer="trunk")
    getter, hook = ExtendedBatches(method), IterationHook(method)
    trainer = make_trainer(
        models, {"metric_loss": WithPenalty(make_loss(), method, extend_batch=getter, after_step=hook)},
        make_dataset(splits[0].train), mining_funcs={"tuple_miner": miners.MultiSimilarityMiner()},
        data_and_label_getter=getter, end_of_iteration_hook=hook,
    )  # fmt: skip
    trainer.train()
    method.consolidate(make_batches(splits[0].train))
    with pytest.raises(me.UserError, match="train without 'tuple_miner'"):
        trainer.train()


def test_a_frozen_method_does_not_train():
    models, splits = make_models(), small_splits(2)
    method = me.Frozen(joined(models))
    loss_funcs = {"metric_loss": WithPenalty(make_loss(), method)}
    trainer = make_trainer(models, loss_funcs, make_dataset(splits[0].train))
    trainer.train()
    method.consolidate([])
    with pytest.raises(me.UserError, match="Frozen does not train on this split"):
        trainer.train()
    with pytest.raises(me.UserError, match="Frozen does not train on this split"):
        gradient_clippers(method)["trunk_grad_clipper_penalty"]()


@pytest.mark.parametrize("mistake", ["twice", "both", "never", "another model"])
def test_mistakes_in_a_trainer_are_refused(mistake):
    models = make_models()
    method = me.MAS(joined(make_models() if mistake == "another model" else models))
    options = {} if mistake in ("never", "twice") else {"gradient_clippers": gradient_clippers(method)}
    loss_funcs = {
        "metric_loss": make_loss() if mistake in ("never", "another model") else WithPenalty(make_loss(), method)
    }
    if mistake == "twice":
        loss_funcs["classifier_loss"] = WithPenalty(nn.CrossEntropyLoss(), method)
        models["classifier"] = nn.Linear(4, 2)
    trainer = make_trainer(
        models, loss_funcs, make_dataset(small_splits(2)[0].train),
        trainer=trainers.TrainWithClassifier, end_of_iteration_hook=IterationHook(method), **options,
    )  # fmt: skip
    number = {"twice": "2 times", "both": "2 times", "never": "never adds", "another model": "another model"}[mistake]
    with pytest.raises(me.UserError, match=number):
        trainer.train()


@pytest.mark.parametrize(
    ("mistake", "message"), [("both", "adds the penalty of MAS 2 times"), ("another model", "another model")]
)
def test_mistakes_are_refused_before_the_second_split_without_a_hook(mistake, message):
    models, dataset = make_models(), make_dataset(small_splits(2)[0].train)
    method = me.MAS(joined(make_models() if mistake == "another model" else models))
    options = {"gradient_clippers": gradient_clippers(method)} if mistake == "both" else {}
    trainer = make_trainer(models, {"metric_loss": WithPenalty(make_loss(), method)}, dataset, **options)
    with pytest.raises(me.UserError, match=message):
        next_split(trainer, dataset)


# Other trainers


def with_classifier(wrap, models, options):
    with me.seeded(1):
        models["classifier"] = nn.Linear(4, 4)
    return trainers.TrainWithClassifier, {
        "metric_loss": wrap(make_loss()), "classifier_loss": nn.CrossEntropyLoss()
    }  # fmt: skip


def cascaded(wrap, models, options):
    options["embedding_sizes"] = [2, 2]
    return trainers.CascadedEmbeddings, {"metric_loss_0": wrap(make_loss()), "metric_loss_1": make_loss()}


def adversarial(wrap, models, options):
    with me.seeded(1):
        models["generator"] = nn.Linear(24, 8)
    options |= {"metric_alone_epochs": 1, "g_alone_epochs": 1, "g_triplets_per_anchor": 2}
    options["sampler"] = samplers.MPerClassSampler(small_splits(2)[0].train.labels, 2, BATCH_SIZE, 12)
    return trainers.DeepAdversarialMetricLearning, {
        "metric_loss": wrap(make_loss()), "synth_loss": losses.TripletMarginLoss(), "g_adv_loss": losses.TripletMarginLoss(),
    }  # fmt: skip


@pytest.mark.parametrize("kind", [with_classifier, cascaded, adversarial])
def test_both_forms_are_equal_in_the_other_trainers(kind):
    results = {}
    for form in ("loss", "gradient", "none"):
        splits, models, options, logged = small_splits(2), make_models(), {}, []
        method = me.MAS(joined(models), strength=1.0)
        trainer_class, loss_funcs = kind(
            (lambda loss, m=method: WithPenalty(loss, m)) if form == "loss" else lambda loss: loss, models, options
        )
        if form == "gradient":
            options["gradient_clippers"] = gradient_clippers(method)
        if form != "none":
            options["end_of_iteration_hook"] = IterationHook(
                method, lambda trainer, logged=logged: logged.append(float(trainer.losses["penalty"]))
            )
        dataset = make_dataset(splits[0].train)
        trainer = make_trainer(models, loss_funcs, dataset, trainer=trainer_class, **options)
        with me.seeded(0):
            trainer.train(num_epochs=3)
            method.consolidate(make_batches(splits[0].train))
            sampler = samplers.MPerClassSampler(splits[1].train.labels, 2, BATCH_SIZE, 12)
            start = next_split(trainer, make_dataset(splits[1].train), sampler=sampler)
            trainer.train(start, start + 1)
        results[form] = parameters_of(models)
        assert form == "none" or logged[-1] > 0
    assert_equal(results["loss"], results["gradient"], rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        assert_equal(results["loss"], results["none"], rtol=1e-5, atol=1e-6)


# Wrapped losses, and attributes


def test_attributes_of_the_loss_are_visible():
    method = me.MAS(joined(make_models()))
    loss = WithPenalty(losses.ProxyAnchorLoss(num_classes=4, embedding_size=4), method)
    assert loss.proxies is loss.loss.proxies and loss.num_classes == 4
    assert [name for name, _ in loss.named_parameters()] == ["loss.proxies"]  # not those of the model
    with pytest.raises(AttributeError, match="no_such_name"):
        loss.no_such_name  # noqa: B018
    assert loss._record_these == ["penalty"]


def test_a_cross_batch_memory_is_filled_and_emptied():
    memory = losses.CrossBatchMemory(make_loss(), embedding_size=4, memory_size=16)
    models, _, trainer, _ = train_two_splits("loss", loss=memory)
    expected = train_two_splits("gradient", loss=losses.CrossBatchMemory(make_loss(), embedding_size=4, memory_size=16))
    assert_equal(parameters_of(models), parameters_of(expected[0]), rtol=1e-5, atol=1e-6)
    assert memory.queue_idx > 0 and memory.label_memory.any()
    next_split(trainer, trainer.dataset)
    assert memory.queue_idx == 0 and not memory.label_memory.any() and not memory.has_been_filled


def test_a_distributed_loss_cannot_contain_the_penalty():
    method = me.MAS(joined(make_models()))
    with pytest.raises(TypeError, match="must extend BaseMetricLossFunction"):
        DistributedLossWrapper(WithPenalty(make_loss(), method))
    with pytest.raises(Exception, match="not supported for WithPenalty"):
        losses.CrossBatchMemory(WithPenalty(make_loss(), method), 4)


def test_a_distributed_loss_in_one_process(tmp_path):
    compare_distributed_losses(0, tmp_path, 1)


@pytest.mark.slow
def test_a_distributed_loss_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(compare_distributed_losses, (str(tmp_path), 2), nprocs=2)


def compare_distributed_losses(rank, folder, num_processes):
    """The two forms have the same gradients, for losses over the embeddings of all processes."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_processes
    )
    try:
        for has_memory in (False, True):
            plain, loss_form, gradient_form = (
                distributed_gradients(form, has_memory, rank, num_processes) for form in (None, "loss", "gradient")
            )
            assert_equal(loss_form, gradient_form, rtol=1e-5, atol=1e-6)
            assert not any(torch.allclose(one, other) for one, other in zip(plain, loss_form, strict=True))
    finally:
        torch.distributed.destroy_process_group()


def distributed_gradients(form, has_memory, rank, num_processes):
    split, models = small_splits(2)[0], make_models()
    method = me.MAS(joined(models), strength=1.0)
    method.consolidate([split.train.inputs])
    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.add_(0.1)
    inner = losses.CrossBatchMemory(make_loss(), embedding_size=4, memory_size=16) if has_memory else make_loss()
    loss = DistributedLossWrapper(inner)
    loss = WithPenalty(loss, method) if form == "loss" else loss
    wrapped = nn.parallel.DistributedDataParallel(joined(models))
    loss(wrapped(split.train.inputs[rank::num_processes]), split.train.labels[rank::num_processes]).backward()
    if form == "gradient":
        method.add_penalty_grad()
    return [parameter.grad for parameter in method.model.parameters()]


# Saved state


@pytest.mark.parametrize("form", ["loss", "gradient"])
def test_a_resumed_run_equals_an_uninterrupted_one(form, tmp_path):
    splits = small_splits(3)

    def make(seed):
        models = make_models(seed)
        method = me.MAS(joined(models), strength=1.0)
        loss = losses.ProxyAnchorLoss(num_classes=6, embedding_size=4)
        with torch.no_grad():
            loss.proxies.copy_(torch.arange(24.0).reshape(6, 4) % 5)
        optimizer = {"metric_loss_optimizer": torch.optim.SGD(loss.parameters(), lr=0.1)}
        options = {"gradient_clippers": gradient_clippers(method)} if form == "gradient" else {}
        loss = WithPenalty(loss, method) if form == "loss" else loss
        trainer = make_trainer(
            models, {"metric_loss": loss}, make_dataset(splits[0].train), optimizers=optimizer,
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.01), **options,
        )  # fmt: skip
        hooks = HookContainer(None)
        if form == "gradient":  # as on the page of the documentation
            hooks.saveable_trainer_objects.append("methods")
            trainer.methods = {"method": method}
        return models, method, trainer, hooks

    models, method, trainer, hooks = make(0)
    with me.seeded(0):
        trainer.train(num_epochs=2)
        method.consolidate(make_batches(splits[0].train))
        start = next_split(trainer, make_dataset(splits[1].train))
        trainer.train(start, start)
        hooks.save_models(trainer, tmp_path, trainer.epoch)
    resumed_models, resumed_method, resumed, resumed_hooks = make(7)
    resumed.dataset = make_dataset(splits[1].train)
    epoch = resumed_hooks.load_latest_saved_models(resumed, tmp_path, CPU)
    assert epoch == start + 1 and resumed_method.num_splits == 1
    for one in (trainer, resumed):
        with me.seeded(1):
            one.train(epoch, epoch + 1)
    assert float(method.penalty()) > 0
    assert_equal(parameters_of(resumed_models), parameters_of(models))


# The next split


def test_the_next_split_is_read_from_the_start():
    models, splits = make_models(), small_splits(2)
    labels_seen = []

    def getter(batch):
        labels_seen.append(batch[1])
        return batch

    larger = me.Part(splits[1].train.inputs.repeat(2, 1), splits[1].train.labels.repeat(2))
    trainer = make_trainer(
        models, {"metric_loss": make_loss()}, make_dataset(splits[0].train), data_and_label_getter=getter,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    )  # fmt: skip
    trainer.train(num_epochs=2)
    assert trainer.iterations_per_epoch == 3
    del labels_seen[:]
    start = next_split(trainer, make_dataset(larger))
    assert start == 3 and not any(optimizer.state for optimizer in trainer.optimizers.values())
    trainer.train(start, start)
    assert trainer.iterations_per_epoch == 6 and trainer.epoch == 3
    assert torch.cat(labels_seen).sort().values.tolist() == larger.labels.sort().values.tolist()
    next_split(trainer, make_dataset(larger), iterations_per_epoch=1)
    trainer.train(4, 4)
    assert trainer.iterations_per_epoch == 1


def test_proxies_and_classifiers_grow():
    models, splits = make_models(), small_splits(2)
    models["classifier"] = nn.Linear(4, 2)
    method = me.MAS(joined(models), strength=1.0)
    loss = losses.ProxyAnchorLoss(num_classes=2, embedding_size=4)
    loss_funcs = {"metric_loss": WithPenalty(loss, method), "classifier_loss": nn.CrossEntropyLoss()}
    trainer = make_trainer(
        models, loss_funcs, make_dataset(splits[0].train), trainer=trainers.TrainWithClassifier,
        optimizers={"metric_loss_optimizer": torch.optim.SGD(loss.parameters(), lr=0.1)},
    )  # fmt: skip
    trainer.train()
    method.consolidate(make_batches(splits[0].train))
    new_loss = copy_classes(loss, losses.ProxyAnchorLoss(num_classes=4, embedding_size=4))
    classifier = copy_classes(models["classifier"], nn.Linear(4, 4))
    assert torch.equal(new_loss.proxies[:2], loss.proxies) and torch.equal(
        classifier.bias[:2], models["classifier"].bias
    )
    assert torch.equal(classifier.weight[:2], models["classifier"].weight)
    replaced = {"models": {"classifier": classifier}, "loss_funcs": {"metric_loss": WithPenalty(new_loss, method)}}
    dataset = make_dataset(splits[1].train)
    with pytest.raises(me.UserError, match="classifier_optimizer holds parameters that have been replaced"):
        next_split(trainer, dataset, **replaced)
    assert trainer.models["classifier"] is not classifier  # nothing has been changed
    optimizers = {
        "classifier_optimizer": torch.optim.SGD(classifier.parameters(), lr=0.1),
        "metric_loss_optimizer": torch.optim.SGD(new_loss.parameters(), lr=0.1),
    }
    start = next_split(trainer, dataset, optimizers=optimizers, **replaced)
    before = new_loss.proxies.detach().clone(), classifier.weight.detach().clone()
    trainer.train(start, start)
    assert not torch.equal(new_loss.proxies, before[0]) and not torch.equal(classifier.weight, before[1])
    assert float(method.penalty()) > 0


def test_columns_grow_as_rows_do():
    old = losses.ArcFaceLoss(num_classes=2, embedding_size=4)
    new = copy_classes(old, losses.ArcFaceLoss(num_classes=5, embedding_size=4))
    assert torch.equal(new.W[:, :2], old.W)
    with pytest.raises(me.UserError, match=r"parameter 'W' has shape \[4, 2\], but the new module has it with shape"):
        copy_classes(old, losses.ArcFaceLoss(num_classes=1, embedding_size=4))
    with pytest.raises(me.UserError, match="but the new module lacks it"):
        copy_classes(old, nn.Linear(2, 2))


def test_what_the_next_split_lacks_is_named():
    models, splits = make_models(), small_splits(2)
    dataset = make_dataset(splits[0].train)
    sampler = samplers.MPerClassSampler(splits[0].train.labels, 2, BATCH_SIZE, 12)
    optimizer = torch.optim.SGD(models["trunk"].parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    trainer = make_trainer(
        models, {"metric_loss": make_loss()}, dataset, sampler=sampler, optimizers={"trunk_optimizer": optimizer},
        lr_schedulers={"trunk_scheduler_by_epoch": scheduler},
    )  # fmt: skip
    with pytest.raises(me.UserError, match="sampler draws indices of the last data set"):
        next_split(trainer, dataset)
    with pytest.raises(me.UserError, match="trunk_scheduler_by_epoch schedules an optimizer that has been replaced"):
        new = {"trunk_optimizer": torch.optim.SGD(models["trunk"].parameters(), lr=0.1)}
        next_split(trainer, dataset, sampler=sampler, optimizers=new)
    with pytest.raises(me.UserError, match="no models named classifier to replace"):
        next_split(trainer, dataset, sampler=sampler, models={"classifier": nn.Linear(2, 2)})
    trainer.sampler = None
    with pytest.raises(me.UserError, match="has 3 items, fewer than a batch of 4"):
        next_split(trainer, torch.utils.data.Subset(dataset, range(3)))
    trainer.set_min_label_to_zero = True
    with pytest.raises(me.UserError, match="pass dataset_labels="):
        next_split(trainer, dataset)
    next_split(trainer, dataset, dataset_labels=[5, 6, 7])
    assert trainer.label_mapper(np.array([7]), 0).tolist() == [2]


# Scores


def make_tester():
    calculator = AccuracyCalculator(include=("mean_average_precision", "precision_at_1"), device=CPU)
    return testers.GlobalEmbeddingSpaceTester(
        batch_size=8, dataloader_num_workers=0, data_device=CPU, accuracy_calculator=calculator
    )


def query_datasets(splits):
    return {split.name: make_dataset(split.query) for split in splits}


@pytest.mark.parametrize("by", ["tester", "evaluate_retrieval"])
def test_a_score_matrix_is_filled(by):
    splits, models = small_splits(2), make_models()
    scores = me.ScoreMatrix(np.full((2, 2), np.nan))
    trainer = make_trainer(models, {"metric_loss": make_loss()}, make_dataset(splits[0].train))
    datasets, tester = query_datasets(splits), make_tester()
    trainer.end_of_epoch_hook = score_hook(scores, 0, datasets, tester, by=by)
    trainer.train(num_epochs=2)
    for column, split in enumerate(splits):
        assert scores.scores[0, column] == pytest.approx(normalized_score(models, split), abs=1e-6)
    assert np.isnan(scores.scores[1]).all()
    score_hook(scores, 1, datasets, tester, by=by)(trainer)
    assert scores.scores[1].tolist() == scores.scores[0].tolist()


def normalized_score(models, split):
    with torch.no_grad():
        embeddings = models["embedder"](models["trunk"](split.query.inputs))
    return me.evaluate_retrieval(embeddings, split.query.labels).mean_average_precision


@pytest.mark.parametrize("by", ["tester", "evaluate_retrieval"])
def test_one_gallery_of_all_splits(by):
    splits, models = small_splits(2), make_models()
    trainer = make_trainer(models, {"metric_loss": make_loss()}, make_dataset(splits[0].train))
    trainer.epoch = 1
    scores = me.ScoreMatrix(np.full((2, 2), np.nan))
    to_eval = [("s0", ["s1", "s0"]), ("s1", ["s1", "s0"])]
    score_hook(
        scores, 0, query_datasets(splits), make_tester(), by=by, splits_to_eval=to_eval, metric="precision_at_1"
    )(trainer)
    everything = me.join_splits(splits).query
    with torch.no_grad():
        embeddings = models["embedder"](models["trunk"](everything.inputs))
    per_query = []
    rows = nn.functional.normalize(embeddings)
    for index in range(len(rows)):
        distances = (rows - rows[index]).norm(dim=1)
        distances[index] = torch.inf
        per_query.append(float(everything.labels[distances.argmin()] == everything.labels[index]))
    expected = np.array(per_query).reshape(2, -1).mean(1)
    np.testing.assert_allclose(scores.scores[0], expected, atol=1e-6)
    assert to_eval[0] == ("s0", ["s1", "s0"])


def test_measuring_does_not_change_the_training():
    results = []
    for measures in (False, True):
        splits, models = small_splits(2), make_models()
        trainer = make_trainer(models, {"metric_loss": make_loss()}, make_dataset(splits[0].train))
        if measures:
            scores = me.ScoreMatrix(np.full((2, 2), np.nan))
            trainer.end_of_epoch_hook = score_hook(scores, 0, query_datasets(splits), make_tester())
        with me.seeded(0):
            trainer.train(num_epochs=3)
        results.append(parameters_of(models))
        assert models["trunk"].training
    assert_equal(*results)


def test_score_hooks_are_checked_and_chained():
    splits, scores = small_splits(2), me.ScoreMatrix(np.full((2, 2), np.nan))
    datasets = query_datasets(splits)
    with pytest.raises(me.UserError, match=r"scores of shape \[2, 2\] cannot hold row 2 with the scores of 2 splits"):
        score_hook(scores, 2, datasets, make_tester())
    with pytest.raises(me.UserError, match="no metric 'r_precision'; it has mean_average_precision, precision_at_1"):
        score_hook(scores, 0, datasets, make_tester(), metric="r_precision")
    with pytest.raises(me.UserError, match="by must be 'tester' or 'evaluate_retrieval', got 'ours'"):
        score_hook(scores, 0, datasets, make_tester(), by="ours")
    trainer = make_trainer(make_models(), {"metric_loss": make_loss()}, make_dataset(splits[0].train))
    with pytest.raises(me.UserError, match="evaluate_retrieval has no metric 'best'; it has mean_average_precision"):
        score_hook(scores, 0, datasets, make_tester(), metric="best", by="evaluate_retrieval")(trainer)
    trainer.end_of_epoch_hook = score_hook(scores, 0, datasets, make_tester(), then=lambda trainer: False)
    trainer.train(num_epochs=5)
    assert trainer.epoch == 1


def test_records_have_the_same_entries_in_every_iteration():
    models, keys = make_models(), []
    method = me.MAS(joined(models))
    trainer = make_trainer(
        models, {"metric_loss": WithPenalty(make_loss(), method)}, make_dataset(small_splits(2)[0].train),
        end_of_iteration_hook=IterationHook(
            method, lambda trainer: keys.append((set(trainer.losses), set(trainer.loss_tracker.loss_weights)))
        ),
    )  # fmt: skip
    trainer.train(num_epochs=2)
    assert all(pair == keys[0] for pair in keys) and keys[0][0] == {"metric_loss", "total_loss", "penalty"}


def test_replicated_models_are_joined_without_their_wrapper():
    models = make_models()
    wrapped = models | {"trunk": nn.DataParallel(models["trunk"])}
    assert list(dict(joined(wrapped).named_parameters())) == list(dict(joined(models).named_parameters()))
    assert list(joined({"trunk": models["trunk"]})) == [models["trunk"]]


def test_a_model_that_is_copied_is_not_part_of_the_loss():
    """Saving the loss must not save the model."""
    models = make_models()
    state = WithPenalty(make_loss(), me.MAS(joined(models))).state_dict()
    assert list(state) == ["_extra_state"] and copy.deepcopy(state)
