"""The trainer of Hugging Face Transformers, for real, against a plain loop over the same batches."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_text import QUICK, texts_of, tiny_bert, tiny_tokenizer
from torch import nn
from transformers import Trainer, TrainingArguments

from mas_embed import EWC, MAS, SI, Combine, Finetune, Frozen, LwF, Method, Replay, UserError, load_method
from mas_embed.integrations.transformers import (
    STATE_FILE,
    MethodCallback,
    cls_pooling,
    mean_pooling,
)

TOKENIZER = tiny_tokenizer()


class Classifier(nn.Module):
    """A BERT with a fixed head on its pooled output, so that only the encoder can forget."""

    def __init__(self, seed=0):
        super().__init__()
        self.bert = tiny_bert(seed)
        self.head = nn.Linear(16, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.eye(2, 16) * 4)
            self.head.bias.zero_()
        self.head.requires_grad_(False)

    def forward(self, input_ids, attention_mask, labels=None):
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        logits = self.head(mean_pooling(self.bert, batch))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def embed(model, batch):
    return mean_pooling(model.bert, batch)


class Collator:
    """Tokenises pairs (text, label), and keeps every batch."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        texts, labels = zip(*rows, strict=True)
        encoded = TOKENIZER(list(texts), padding="max_length", max_length=4, return_tensors="pt")
        batch = {key: encoded[key] for key in ("input_ids", "attention_mask")} | {"labels": torch.tensor(labels)}
        self.batches.append(batch)
        return batch


def rows_of(split_index):
    return list(zip(*texts_of(split_index), strict=True))


def batches_of(split_index):
    collator = Collator()
    return [collator(rows_of(split_index))]


def arguments(folder, **options):
    return TrainingArguments(output_dir=str(folder), **(QUICK | options))


def sgd(model, momentum=0.9, lr=0.05):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=momentum)


def trainer_of(model, callbacks, folder, split_index=0, collator=None, **options):
    return Trainer(
        model=model,
        args=arguments(folder, **options),
        data_collator=collator or Collator(),
        train_dataset=rows_of(split_index),
        callbacks=callbacks,
        optimizers=(sgd(model), None),
    )


def mas_of(model, strength=1.0, **options):
    return MAS(model, strength=strength, embed=embed, **options)


def trained_on_two(folder, make_method=mas_of, **options):
    """A classifier trained on two splits, its method, and the batches of each split."""
    model, batches = Classifier(), []
    method = make_method(model)
    for split_index in range(2):
        collator = Collator()
        callback = MethodCallback(method, batches=batches_of(split_index))
        trainer = trainer_of(model, [callback], folder, split_index, collator, **options)
        trainer.train()
        batches.append(collator.batches)
    return model, method, batches, trainer


def plain_loop(batches_of_splits, make_method=mas_of, *, clip_norm=None, accumulate=1):
    """What the trainer does, in the dullest way."""
    model = Classifier()
    method = make_method(model)
    for split_index, batches in enumerate(batches_of_splits):
        optimizer = sgd(model)
        method.begin_split()
        for start in range(0, len(batches), accumulate):
            for batch in batches[start : start + accumulate]:
                (model(**batch)["loss"] / accumulate).backward()
            if clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            method.add_penalty_grad()
            optimizer.step()
            method.after_step(optimizer)
            optimizer.zero_grad()
        method.consolidate(batches_of(split_index))
    return model, method


def check_same_weights(model, other, **tolerance):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            value, other.state_dict()[name], **(tolerance or {"rtol": 1e-5, "atol": 1e-6}), msg=name
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make_method", [mas_of, SI], ids=["mas", "si"])
def test_training_on_a_gpu_is_that_on_the_cpu(tmp_path, make_method):
    model, method, batches, _ = trained_on_two(tmp_path, make_method, use_cpu=False)
    expected, _ = plain_loop(batches, make_method)
    assert method.penalty().is_cuda
    check_same_weights(model.cpu(), expected, rtol=1e-2, atol=2e-3)


@torch.no_grad()
def loss_on(model, split_index):
    return float(model(**batches_of(split_index)[0])["loss"])


# Training


@pytest.mark.parametrize(
    ("make_method", "options"),
    [
        (mas_of, {}),
        (mas_of, {"max_grad_norm": 0.5}),
        (lambda model: mas_of(model, decoupled=True), {}),
        (lambda model: SI(model, strength=3.0), {}),
        (lambda model: Combine(model, methods=[SI(model), mas_of(model)]), {}),
    ],
    ids=["mas", "clipped", "decoupled", "si", "combine"],
)
def test_training_equals_a_plain_loop(tmp_path, make_method, options):
    model, method, batches, _ = trained_on_two(tmp_path, make_method, **options)
    expected, expected_method = plain_loop(batches, make_method, clip_norm=options.get("max_grad_norm"))
    check_same_weights(model, expected)
    assert method.penalty().item() == pytest.approx(expected_method.penalty().item(), abs=1e-6)


def test_accumulated_batches_add_the_penalty_once(tmp_path):
    model, _, batches, _ = trained_on_two(tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert [len(batch["labels"]) for batch in batches[1]] == [3] * 16
    joined = [
        [
            {key: torch.cat([first[key], second[key]]) for key in first}
            for first, second in zip(split[::2], split[1::2], strict=True)
        ]
        for split in batches
    ]
    check_same_weights(model, plain_loop(joined)[0], rtol=1e-4, atol=1e-5)
    check_same_weights(model, plain_loop(batches, accumulate=2)[0])


def test_less_is_forgotten_than_without(tmp_path):
    protected, _, _, trainer = trained_on_two(tmp_path)
    free = trained_on_two(tmp_path, Finetune)[0]
    assert loss_on(protected, 0) < loss_on(free, 0) - 0.1
    logged = [entry["penalty"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 8 and logged[-1] > 0


def test_the_penalty_is_logged_with_the_loss(tmp_path):
    seen = []

    class Reader(MethodCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            super().on_log(args, state, control, logs, **kwargs)
            seen.append(dict(logs))

    model = Classifier()
    method = mas_of(model)
    trainer_of(model, [Reader(method)], tmp_path, num_train_epochs=1).train()
    assert [entry["penalty"] for entry in seen if "loss" in entry] == [0.0] * 4
    assert all("penalty" not in entry for entry in seen if "loss" not in entry)


# Consolidation


def test_it_consolidates_on_the_training_data_by_default(tmp_path):
    model = Classifier()
    method = mas_of(model)
    trainer_of(model, [MethodCallback(method)], tmp_path).train()
    expected = mas_of(model)
    expected.consolidate(batches_of(0))
    assert method.num_splits == 1
    for name, value in expected.importance.items():
        torch.testing.assert_close(method.importance[name], value, rtol=1e-4, atol=1e-7)


def test_methods_that_need_labels_get_those_of_the_training_data(tmp_path):
    model = Classifier()

    def loss(embeddings, labels, mined=None):
        return nn.functional.cross_entropy(embeddings @ model.head.weight.T, labels)

    method = EWC(model, loss=loss, embed=lambda model, batch: mean_pooling(model.bert, batch))
    trainer_of(model, [MethodCallback(method)], tmp_path, num_train_epochs=1).train()
    assert method.num_splits == 1 and any(value.any() for value in method.importance.values())


def test_reading_the_training_data_leaves_the_random_generators(tmp_path):
    model, states = Classifier(), []

    class States(MethodCallback):
        def on_train_end(self, args, state, control, **kwargs):
            states.append(torch.get_rng_state())
            super().on_train_end(args, state, control, **kwargs)
            states.append(torch.get_rng_state())

    trainer_of(model, [States(mas_of(model))], tmp_path, num_train_epochs=1).train()
    assert torch.equal(*states)


def test_training_data_without_a_length_is_refused(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from rows_of(0)

    model = Classifier()
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=2),
        data_collator=Collator(),
        train_dataset=Endless(),
        callbacks=[MethodCallback(mas_of(model))],
    )
    with pytest.raises(UserError, match=r"the training data has no length.*batches="):
        trainer.train()


# Checkpoints


@pytest.mark.parametrize(
    ("make_method", "moves"), [(mas_of, False), (lambda model: SI(model, strength=3.0), True)], ids=["mas", "si, moved"]
)
def test_resuming_equals_training_without_a_stop(tmp_path, make_method, moves):
    options = {"save_strategy": "steps", "save_steps": 3}
    model = Classifier()
    method = make_method(model)
    if not moves:
        method.consolidate(batches_of(0))
    trainer_of(model, [MethodCallback(method, batches=batches_of(1))], tmp_path, 1, **options).train()

    checkpoint = tmp_path / "checkpoint-3"
    if moves:
        checkpoint = checkpoint.rename(tmp_path / "moved")
        options |= {"resume_from_checkpoint": str(checkpoint)}
    fresh = Classifier(seed=1)
    again = make_method(fresh)
    trainer = trainer_of(fresh, [MethodCallback(again, batches=batches_of(1))], tmp_path, 1, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    check_same_weights(fresh, model, rtol=0, atol=0)
    assert again.num_splits == method.num_splits
    for name, value in method.importance.items():
        assert torch.equal(again.importance[name], value), name


def test_resuming_from_a_folder_that_the_callback_does_not_know_is_refused(tmp_path):
    model = Classifier()
    options = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    for folder, seed in (("one", 3), ("two", 4)):
        trainer_of(model, [MethodCallback(Finetune(model))], tmp_path / folder, seed=seed, **options).train()
    trainer = trainer_of(model, [MethodCallback(Finetune(model))], tmp_path / "two", **options)
    with pytest.raises(UserError, match="checkpoint-3.*other weights than now"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-3"))


def test_the_state_after_training_is_in_the_output_folder(tmp_path):
    model, method, _, _ = trained_on_two(tmp_path, save_strategy="epoch")
    other = mas_of(copy.deepcopy(model))
    load_method(tmp_path / STATE_FILE, other)
    assert other.num_splits == 2
    for name, value in method.anchor.items():
        assert torch.equal(other.anchor[name], value)


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    model = Classifier()
    options = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    trainer_of(model, [], tmp_path, **options).train()
    trainer = trainer_of(model, [MethodCallback(mas_of(model))], tmp_path, **options)
    with pytest.raises(UserError, match=r"there is no state of a method in .*checkpoint-4; set output_dir"):
        trainer.train(resume_from_checkpoint=True)


# Refusals


@pytest.mark.parametrize(("make_method", "hook"), [(Replay, "extend_batch"), (LwF, "batch_penalty")])
def test_methods_that_need_batches_are_refused(make_method, hook):
    with pytest.raises(UserError, match=rf"MethodCallback cannot call {hook} of the method {make_method.__name__}"):
        MethodCallback(make_method(Classifier()))


def test_what_is_not_a_method_is_refused():
    with pytest.raises(
        UserError, match=r"MethodCallback takes a method, such as MAS\(model\), got an object of type Linear"
    ):
        MethodCallback(nn.Linear(2, 2))


@pytest.mark.parametrize("make_second", [lambda first: first, lambda first: SI(first.model)], ids=["same", "other"])
def test_two_callbacks_are_refused(tmp_path, make_second):
    model = Classifier()
    method = mas_of(model)
    callbacks = [MethodCallback(method), MethodCallback(make_second(method))]
    with pytest.raises(UserError, match="two MethodCallbacks, .* pass one callback, of Combine"):
        trainer_of(model, callbacks, tmp_path).train()
    trainer = trainer_of(model, callbacks[:1], tmp_path, num_train_epochs=1)
    trainer.train()
    trainer.train()  # a callback that is used again is not a second one
    assert method.num_splits == 2


def test_another_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="the method MAS belongs to another model"):
        trainer_of(Classifier(), [MethodCallback(mas_of(Classifier()))], tmp_path).train()


def test_a_method_that_has_stopped_learning_is_refused(tmp_path):
    model = Classifier()
    method = Frozen(model)
    method.consolidate([])
    with pytest.raises(UserError, match="does not learn a further split"):
        trainer_of(model, [MethodCallback(method)], tmp_path).train()


def test_sharded_parameters_are_refused(tmp_path):
    model = Classifier()
    args = arguments(tmp_path)
    args.deepspeed = {"zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match="DeepSpeed and FSDP shard them"):
        MethodCallback(mas_of(model)).on_train_begin(args, None, None, model=model)


def test_skipped_steps_are_not_reported_to_the_method():
    class Counter(Method):
        num_steps = 0

        def after_step(self, optimizer):
            self.num_steps += 1

    class Optimizer:
        step_was_skipped = True

    method = Counter(nn.Linear(1, 1))
    callback = MethodCallback(method)
    callback.on_optimizer_step(None, None, None, optimizer=Optimizer())
    assert method.num_steps == 0
    Optimizer.step_was_skipped = False
    callback.on_optimizer_step(None, None, None, optimizer=Optimizer())
    assert method.num_steps == 1


# Pooling


def encoded(texts=("sun1 sea2", "oak0 oak1 fox2")):
    return dict(TOKENIZER(list(texts), padding=True, return_tensors="pt"))


def test_pooling_by_hand():
    bert, batch = tiny_bert().eval(), encoded()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    hidden = bert(**inputs).last_hidden_state
    expected = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)])
    torch.testing.assert_close(mean_pooling(bert, batch), expected)
    torch.testing.assert_close(mean_pooling(bert, (inputs | {"labels": torch.tensor([0, 1])}, None)), expected)
    assert torch.equal(cls_pooling(bert, batch), hidden[:, 0])
    assert mean_pooling(bert, batch).requires_grad


def test_pooling_does_not_depend_on_padding():
    bert = tiny_bert().eval()
    alone = torch.cat([mean_pooling(bert, encoded([text])) for text in ("sun1 sea2", "oak0 oak1 fox2")])
    torch.testing.assert_close(mean_pooling(bert, encoded()), alone)


def test_pooling_refuses_what_it_cannot_pool():
    with pytest.raises(UserError, match="does not tokenize texts; pass the output of its tokenizer"):
        mean_pooling(tiny_bert(), ["sun1"])
    with pytest.raises(
        UserError, match=r"a Classifier, returns no last_hidden_state .*mean_pooling\(model.base_model, batch\)"
    ):
        mean_pooling(_NoHiddenStates(), encoded())


class _NoHiddenStates(Classifier):
    def forward(self, **inputs):
        return {"logits": 0}


_NoHiddenStates.__name__ = "Classifier"


# LoRA


def lora_of(model):
    config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, config)


def test_of_a_lora_model_the_adapters_are_protected_and_nothing_else(tmp_path):
    model = lora_of(Classifier())
    method = MAS(model, embed=lambda model, batch: mean_pooling(model.base_model.model.bert, batch))
    options = {"num_train_epochs": 1, "save_strategy": "no"}
    trainer_of(model, [MethodCallback(method, batches=batches_of(0))], tmp_path, 0, **options).train()
    assert method.importance and all("lora_" in name for name in method.importance)
    trainer = trainer_of(model, [MethodCallback(method, batches=batches_of(1))], tmp_path, 1, **options)
    trainer.train()
    assert [entry for entry in trainer.state.log_history if "loss" in entry][-1]["penalty"] > 0


def test_resuming_a_lora_model(tmp_path):
    options = {"num_train_epochs": 1, "save_strategy": "steps", "save_steps": 2}
    embed_lora = lambda model, batch: mean_pooling(model.base_model.model.bert, batch)  # noqa: E731
    model = lora_of(Classifier())
    method = MAS(model, embed=embed_lora)
    method.consolidate(batches_of(1))
    trainer_of(model, [MethodCallback(method, batches=batches_of(0))], tmp_path, **options).train()
    fresh = lora_of(Classifier())
    again = MAS(fresh, embed=embed_lora)
    trainer_of(fresh, [MethodCallback(again, batches=batches_of(0))], tmp_path, **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    check_same_weights(fresh, model, rtol=0, atol=0)
    assert again.num_splits == 2


def test_a_merge_does_not_end_the_protection_silently():
    model = lora_of(Classifier())
    method = MAS(model, embed=lambda model, batch: mean_pooling(model.base_model.model.bert, batch))
    method.consolidate(batches_of(0))
    model.merge_and_unload().requires_grad_(True)
    with pytest.warns(UserWarning, match="lora_"):
        assert method.penalty().item() == 0


def test_checkpoints_hold_no_pickle_of_the_method(tmp_path):
    model = Classifier()
    trainer_of(model, [MethodCallback(mas_of(model))], tmp_path, num_train_epochs=1, save_strategy="epoch").train()
    content = (tmp_path / "checkpoint-4" / STATE_FILE).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert json.loads(header["__metadata__"]["mas_embed"])["numbers"]["origin/method"] == "MAS"
    assert math.isfinite(loss_on(model, 0))
