"""The trainer of sentence-transformers, for real, against a plain loop over the same batches."""

import copy

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding, Transformer
from tiny_text import QUICK, WORDS, texts_of, tiny_bert, tiny_tokenizer
from torch import nn

from mas_embed import MAS, SI, Combine, Finetune, LwF, Method, Replay, ScoreMatrix, UserError, load_method
from mas_embed.integrations.sentence_transformers import (
    WithPenalty,
    embed,
    retrieval_evaluator,
    retrieval_scores,
)
from mas_embed.integrations.transformers import MethodCallback

STRENGTH = 0.1  # with which SGD at this learning rate is stable


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tiny_bert(pooler=True).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_model(bert_folder):
    """Makes the same small sentence transformer every time."""

    def make(*extra):
        transformer = Transformer(bert_folder, max_seq_length=8)
        return SentenceTransformer(modules=[transformer, Pooling(16), *extra], device="cpu")

    return make


def static_model(*extra):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        static = StaticEmbedding(tiny_tokenizer(), embedding_dim=8)
    return SentenceTransformer(modules=[static, *extra], device="cpu")


def pairs_of(split_index):
    """Pairs of texts of one label."""
    texts, labels = texts_of(split_index)
    by_label = [[text for text, label in zip(texts, labels, strict=True) if label == value] for value in (0, 1)]
    rows = [pair for texts in by_label for pair in zip(texts, texts[1:] + texts[:1], strict=True)]
    return Dataset.from_dict({"anchor": [a for a, _ in rows], "positive": [b for _, b in rows]})


def labelled(split_index):
    texts, labels = texts_of(split_index)
    return Dataset.from_dict({"text": texts, "label": labels})


def features_of(model, split_index):
    return [model.preprocess(texts_of(split_index)[0])]


def trainer_of(model, loss, dataset, folder, callbacks=(), optimizer=None, **options):
    trainer = RecordingTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(output_dir=str(folder), **(QUICK | options)),
        train_dataset=dataset,
        loss=loss,
        callbacks=list(callbacks),
        optimizers=(optimizer or torch.optim.SGD(model.parameters(), lr=0.05), None),
    )
    trainer.seen = []
    return trainer


class RecordingTrainer(SentenceTransformerTrainer):
    """Keeps the batches that it trains on."""

    def compute_loss(self, model, inputs, *args, **options):
        self.seen.append(copy.deepcopy(inputs))
        return super().compute_loss(model, inputs, *args, **options)


def columns(batch):
    return [
        {key.removeprefix(f"{column}_"): value for key, value in batch.items() if key.startswith(f"{column}_")}
        for column in ("anchor", "positive", "text")
        if f"{column}_input_ids" in batch
    ]


def plain_loop(model, loss, method, batches, *, form="loss", accumulate=1, clip_norm=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for start in range(0, len(batches), accumulate):
        for batch in batches[start : start + accumulate]:
            (loss(columns(batch), batch.get("label")) / accumulate).backward()
        if form == "gradient" and clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        if form == "gradient":
            method.add_penalty_grad()
        else:
            method.penalty().backward() if method.penalty().requires_grad else None
        if form == "loss" and clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()


def check_same_weights(model, other, **tolerance):
    for name, value in other.state_dict().items():
        torch.testing.assert_close(
            model.state_dict()[name], value, **(tolerance or {"rtol": 1e-5, "atol": 1e-6}), msg=name
        )


def mnrl(model):
    return losses.MultipleNegativesRankingLoss(model, scale=5.0)


def protected_model(make_model):
    """A model and a method that has consolidated the first split, and then moved a little."""
    model = make_model()
    method = MAS(model, strength=STRENGTH, embed=embed)
    method.consolidate(features_of(model, 0))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model, method


# Training


@pytest.mark.parametrize("form", ["loss", "gradient"])
@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
def test_training_equals_a_plain_loop(make_model, tmp_path, form, clip_norm):
    model, method = protected_model(make_model)
    expected, expected_method = protected_model(make_model)
    loss = WithPenalty(mnrl(model), method) if form == "loss" else mnrl(model)
    callbacks = [MethodCallback(method, batches=features_of(model, 1))] if form == "gradient" else []
    trainer = trainer_of(model, loss, pairs_of(1), tmp_path, callbacks, max_grad_norm=clip_norm)
    trainer.train()
    plain_loop(expected, mnrl(expected), expected_method, trainer.seen, form=form, clip_norm=clip_norm)
    check_same_weights(model, expected)


@pytest.mark.parametrize("form", ["loss", "gradient"])
def test_accumulated_batches_add_the_penalty_once(make_model, tmp_path, form):
    """The loss of one batch is a mean over its texts here, so that two batches are one of twice the size."""
    model, method = protected_model(make_model)
    expected, expected_method = protected_model(make_model)
    loss = WithPenalty(PullTogether(model), method) if form == "loss" else PullTogether(model)
    callbacks = [MethodCallback(method, batches=features_of(model, 1))] if form == "gradient" else []
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 1}
    trainer = trainer_of(model, loss, pairs_of(1), tmp_path, callbacks, **options)
    trainer.train()
    plain_loop(expected, PullTogether(expected), expected_method, trainer.seen, accumulate=2)
    check_same_weights(model, expected)
    joined = [joined_batch(*two) for two in zip(trainer.seen[::2], trainer.seen[1::2], strict=True)]
    one_model = protected_model(make_model)
    plain_loop(one_model[0], PullTogether(one_model[0]), one_model[1], joined)
    check_same_weights(model, one_model[0])


class PullTogether(nn.Module):
    """The mean squared distance of the two texts of a pair."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sentence_features, labels=None):
        first, second = (self.model(features)["sentence_embedding"] for features in sentence_features)
        return (first - second).square().sum(1).mean()


def joined_batch(first, second):
    def padded(value, length):
        return nn.functional.pad(value, (0, length - value.shape[1]))

    result = {}
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            length = max(value.shape[1], second[key].shape[1])
            result[key] = torch.cat([padded(value, length), padded(second[key], length)])
    return result


def crossed(split_index):
    """Texts of two words, which the first split labels by the first word and the second by the second word."""
    texts = [f"{first} {second}" for first in WORDS[:5] for second in WORDS[5:10]]
    labels = [text.split()[split_index] for text in texts]
    pairs = [(a, b) for a, i in zip(texts, labels, strict=True) for b, j in zip(texts, labels, strict=True) if i == j]
    return texts, labels, Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [b for _, b in pairs]})


def test_less_is_forgotten_than_without(tmp_path):
    scores = {}
    for strength in (0.0, 3.0):
        model = static_model(Dense(8, 8))
        method = MAS(model, strength=strength, normalize=True, embed=embed)
        rows = []
        for split_index in range(2):
            texts, _, dataset = crossed(split_index)
            callback = MethodCallback(method, batches=[texts])
            optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
            loss = WithPenalty(mnrl(model), method)
            trainer = trainer_of(model, loss, dataset, tmp_path, [callback], optimizer, per_device_train_batch_size=12)
            trainer.train()
            rows.append([retrieval_scores(model, *crossed(j)[:2]).mean_average_precision for j in range(2)])
        scores[strength] = ScoreMatrix(rows)
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(entry["loss"] == pytest.approx(entry["base_loss"] + entry["penalty"], abs=1e-3) for entry in logged)
        assert (logged[-1]["penalty"] > 0) == (strength > 0)
    assert scores[0.0].forgetting > 0.3
    assert scores[3.0].forgetting < scores[0.0].forgetting - 0.1


def test_a_callback_does_not_add_the_penalty_of_the_loss_again(make_model, tmp_path):
    model, method = protected_model(make_model)
    expected, expected_method = protected_model(make_model)
    callback = MethodCallback(method, batches=features_of(model, 1))
    trainer = trainer_of(model, WithPenalty(mnrl(model), method), pairs_of(1), tmp_path, [callback])
    trainer.train()
    plain_loop(expected, mnrl(expected), expected_method, trainer.seen)
    check_same_weights(model, expected)
    assert method.num_splits == 2


def test_resuming_equals_training_without_a_stop(make_model, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    model, method = protected_model(make_model)
    callback = MethodCallback(method)
    trainer_of(model, WithPenalty(mnrl(model), method), pairs_of(1), tmp_path, [callback], **options).train()

    fresh = make_model()
    again = MAS(fresh, strength=STRENGTH, embed=embed)
    trainer = trainer_of(
        fresh, WithPenalty(mnrl(fresh), again), pairs_of(1), tmp_path, [MethodCallback(again)], **options
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    check_same_weights(fresh, model, rtol=0, atol=0)
    assert again.num_splits == 2
    for name, value in method.importance.items():
        assert torch.equal(again.importance[name], value), name
    load_method(tmp_path / "mas_embed_method.safetensors", MAS(fresh))


def test_it_consolidates_on_every_column_of_the_training_data(make_model, tmp_path):
    model = make_model()
    method = MAS(model, embed=embed)
    dataset = pairs_of(0)
    trainer_of(model, mnrl(model), dataset, tmp_path, [MethodCallback(method)], num_train_epochs=1).train()
    expected = MAS(model, embed=embed)
    importance = expected.consolidate([model.preprocess([*dataset["anchor"], *dataset["positive"]])])
    for name, value in importance.items():
        torch.testing.assert_close(method.importance[name], value, rtol=1e-4, atol=1e-7)


# Losses


def gradients(model, loss, features, labels=None):
    model.zero_grad()
    value = loss([dict(column) for column in features], labels)
    total = torch.stack(list(value.values())).sum() if isinstance(value, dict) else value
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "make_loss",
    [
        mnrl,
        lambda model: losses.MatryoshkaLoss(model, mnrl(model), [16, 8]),
        lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2),
        lambda model: losses.MatryoshkaLoss(
            model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2), [16, 8]
        ),
        lambda model: losses.GlobalOrthogonalRegularizationLoss(model),
    ],
    ids=["mnrl", "matryoshka", "cached", "cached matryoshka", "dict"],
)
def test_losses_of_the_library_get_the_gradient_of_the_penalty(make_model, make_loss):
    model, method = protected_model(make_model)
    model.eval()
    dataset = pairs_of(1)[:6]
    features = [model.preprocess(dataset[column]) for column in ("anchor", "positive")]
    expected = gradients(model, make_loss(model), features)
    with torch.no_grad():
        pull = {
            name: 2 * STRENGTH * value * (dict(model.named_parameters())[name] - method.anchor[name])
            for name, value in method.importance.items()
        }
    found = gradients(model, WithPenalty(make_loss(model), method), features)
    for name, value in pull.items():
        torch.testing.assert_close(found[name], expected.get(name, 0) + value, rtol=1e-4, atol=1e-6, msg=name)


def test_batch_losses_without_a_model_attribute(make_model):
    model, method = protected_model(make_model)
    loss = WithPenalty(losses.BatchAllTripletLoss(model), method)
    assert loss.model is model
    value = loss([model.preprocess(texts_of(1)[0][:6])], torch.tensor([0, 1] * 3))
    assert value.keys() == {"base_loss", "penalty"}


def test_a_loss_for_each_dataset(make_model, tmp_path):
    model, method = protected_model(make_model)
    datasets = {"pairs": pairs_of(1), "classes": labelled(1)}
    loss = {
        "pairs": WithPenalty(mnrl(model), method),
        "classes": WithPenalty(losses.BatchAllTripletLoss(model), method),
    }
    trainer = trainer_of(model, loss, datasets, tmp_path, [MethodCallback(method)], num_train_epochs=1)
    trainer.train()
    assert method.num_splits == 2
    assert all(entry["penalty"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_evaluation_logs_the_penalty_and_does_not_hide_the_gradient(make_model, tmp_path):
    model, method = protected_model(make_model)
    loss = WithPenalty(mnrl(model), method)
    with torch.no_grad():
        loss([model.preprocess(texts_of(1)[0][:4]) for _ in range(2)], None)
    before = [parameter.grad for parameter in model.parameters()]
    MethodCallback(method).on_pre_optimizer_step(None, None, None)
    assert before.count(None) == len(before) and any(p.grad is not None for p in model.parameters())


# State


def test_the_state_of_the_method_is_in_that_of_the_loss(make_model):
    model, method = protected_model(make_model)
    loss = WithPenalty(mnrl(model), method)
    buffers = dict(loss.named_buffers())
    name = "0.auto_model.embeddings.word_embeddings.weight"
    name = name if name in method.importance else next(iter(method.importance))
    assert buffers[f"method/importance/{name}"] is method.importance[name]

    fresh = make_model()
    again = MAS(fresh, strength=STRENGTH, embed=embed)
    WithPenalty(mnrl(fresh), again).load_state_dict(loss.state_dict())
    assert torch.equal(again.penalty(), method.penalty()) and again.penalty() > 0
    incomplete = {key: value for key, value in loss.state_dict().items() if not key.startswith("method")}
    with pytest.raises(RuntimeError, match="Missing key.*method_numbers"):
        loss.load_state_dict(incomplete)


# Refusals


class Stepper(Method):
    def after_step(self, optimizer):
        """Does something."""


@pytest.mark.parametrize(
    ("make_method", "message"),
    [
        (Replay, "WithPenalty cannot call extend_batch of the method Replay"),
        (LwF, "WithPenalty cannot call batch_penalty of the method LwF"),
        (SI, "SI reads the gradients of the loss without the penalty; use MethodCallback"),
        (lambda model: MAS(model, decoupled=True), "MAS with decoupled=True acts after the steps"),
        (lambda model: Combine(model, methods=[SI(model), MAS(model)]), "SI reads the gradients"),
        (Stepper, "Stepper acts after the steps of the optimizer"),
        (lambda model: MAS(static_model()), "belongs to another model than the loss"),
    ],
)
def test_methods_that_need_more_than_a_penalty_are_refused(make_model, make_method, message):
    model = make_model()
    with pytest.raises(UserError, match=message):
        WithPenalty(mnrl(model), make_method(model))


def test_wrapping_twice_is_refused(make_model):
    model = make_model()
    loss = WithPenalty(WithPenalty(mnrl(model), Finetune(model)), Finetune(model))
    with pytest.raises(UserError, match="has a component 'penalty' already"):
        loss([model.preprocess(["sun1"]), model.preprocess(["sun2"])], None)


@pytest.mark.parametrize("wrap", [losses.MatryoshkaLoss, losses.Matryoshka2dLoss])
def test_wrapping_inside_another_loss_is_refused(make_model, wrap):
    model = make_model()
    loss = wrap(model, WithPenalty(mnrl(model), Finetune(model)), matryoshka_dims=[16, 8])
    with pytest.raises(UserError, match="WithPenalty must be the outermost loss"):
        loss([model.preprocess(["sun1"]), model.preprocess(["sun2"])], None)


# Embeddings


def test_embeddings_are_those_of_encode(make_model):
    texts = texts_of(0)[0][:5]
    for model in (make_model(), static_model()):
        model.eval()
        expected = torch.from_numpy(model.encode(texts))
        features = model.preprocess(texts)
        keys = set(features)
        for batch in (texts, tuple(texts), features, (texts, torch.zeros(5)), [features, None]):
            embeddings = embed(model, batch)
            assert embeddings.requires_grad
            torch.testing.assert_close(embeddings.detach(), expected)
        assert set(features) == keys


def test_a_final_normalisation_is_left_out(make_model):
    texts = texts_of(0)[0][:5]
    plain, normalized = make_model().eval(), make_model(Normalize(), Normalize()).eval()
    torch.testing.assert_close(embed(normalized, texts), embed(plain, texts))
    assert not torch.allclose(embed(normalized, texts).norm(dim=1), torch.ones(5))


def test_texts_get_the_default_prompt(make_model):
    model = make_model().eval()
    model.prompts, model.default_prompt_name = {"query": "sea1 sea2 "}, "query"
    expected = torch.from_numpy(model.encode(["sun1"]))
    torch.testing.assert_close(embed(model, ["sun1"]).detach(), expected)
    assert not torch.allclose(embed(model, model.preprocess(["sun1"])), expected)


def test_what_cannot_be_embedded_is_refused(make_model):
    with pytest.raises(UserError, match="the model, a Linear, cannot tokenize texts"):
        embed(nn.Linear(1, 1), ["sun1"])
    for batch, message in (
        ("sun1", "embeds a list of texts, or the features .* got an object of type str"),
        ([], "a batch is an empty list"),
        (torch.zeros(2, 3), "got an object of type Tensor"),
    ):
        with pytest.raises(UserError, match=message):
            embed(make_model(), batch)


def test_consolidate_takes_lists_of_texts(make_model):
    model = make_model()
    texts = texts_of(0)[0]
    method, expected = MAS(model, embed=embed), MAS(model, embed=embed)
    importance = method.consolidate([texts[:10], texts[10:]])
    for name, value in expected.consolidate([model.preprocess(texts)]).items():
        torch.testing.assert_close(importance[name], value, rtol=1e-4, atol=1e-7)


def test_consolidate_takes_texts_for_a_static_embedding():
    model = static_model()
    texts = texts_of(0)[0]
    importance = MAS(model, embed=embed).consolidate([texts])
    (weights,) = (value for name, value in model.named_parameters())
    total = torch.zeros_like(weights)
    for text in texts:
        (gradient,) = torch.autograd.grad(embed(model, [text]).square().sum(), weights)
        total += gradient.abs()
    (found,) = importance.values()
    torch.testing.assert_close(found, total / len(texts), rtol=1e-4, atol=1e-7)


# Evaluation


def test_an_evaluator_for_each_split(make_model):
    model = make_model()
    texts, labels = texts_of(0)
    names = ["sun" if label == 0 else "sea" for label in labels]
    split = texts[:8], names[:8], texts[8:], names[8:]
    metrics = retrieval_evaluator(*split, name="first", batch_size=4)(model)
    scores = retrieval_scores(model, *split)
    assert metrics["first_cosine_accuracy@1"] == pytest.approx(scores.precision_at_1, abs=0.13)
    assert metrics["first_cosine_map@100"] == pytest.approx(scores.mean_average_precision, abs=0.1)


def test_evaluators_refuse_what_has_no_answer():
    with pytest.raises(UserError, match="queries must have one label for each text, got 2 texts and 1 labels"):
        retrieval_evaluator(["a", "b"], [0], ["c"], [0])
    with pytest.raises(UserError, match="gallery must have one label for each text"):
        retrieval_scores(None, ["a"], [0], ["c"], [])
    with pytest.raises(UserError, match="no text of the gallery has the label of a query"):
        retrieval_evaluator(["a"], [0], ["c"], [1])
