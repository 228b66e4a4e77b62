import json
import sys

import pytest
import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import nn

from mas_embed import (
    EWC,
    MAS,
    Joint,
    LwF,
    Part,
    Recipe,
    Replay,
    RetrievalEvaluator,
    Split,
    UserError,
    estimate_importance,
    train_sequence,
)
from mas_embed.methods import ClassStatistics
from mas_embed.models import MODELS, SentenceEncoder, sentence_transformer, word_vector_transformer
from mas_embed.models.sentence_encoder import words_of_text
from mas_embed.runtime.forward import embed_batch

WORDS = ["turn", "on", "the", "light", "play", "music", "pay", "my", "bill", "send", "money", "what", "is", "time"]
TEXTS = ["turn on the light", "play", "what is the time now , my light ?", "pay my bill", ""]


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    path = tmp_path_factory.mktemp("vectors") / "vectors.txt"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(len(WORDS), 6, generator=generator)
    path.write_text(
        "".join(f"{word} {' '.join(map(str, row.tolist()))}\n" for word, row in zip(WORDS, rows, strict=True))
    )
    return path


def make(vectors, **options):
    torch.manual_seed(0)
    return word_vector_transformer(path=vectors, **{"embedding_size": 4, "width": 8, "heads": 2, **options})


def plain_embedding(model, text):
    """The embedding of one text, with loops over words and heads and without padding."""
    trunk = model.trunk
    words = words_of_text(text)[: trunk.max_words] or ["<unknown>"]
    rows = [trunk.index.get(word, trunk.index.get(word.lower(), 0)) for word in words]
    hidden = torch.stack(
        [trunk.projection(trunk.words.weight[row]) + trunk.positions.weight[i] for i, row in enumerate(rows)]
    )
    for layer in trunk.layers:
        normed = layer.attention_norm(hidden)
        query, key, value = layer.query(normed), layer.key(normed), layer.value(normed)
        heads, size = [], query.shape[1] // layer.heads
        for head in range(layer.heads):
            columns = slice(head * size, (head + 1) * size)
            weights = (query[:, columns] @ key[:, columns].T / size**0.5).softmax(1)
            heads.append(weights @ value[:, columns])
        hidden = hidden + layer.output(torch.cat(heads, 1))
        hidden = hidden + layer.network(layer.network_norm(hidden))
    embedding = model.head(trunk.norm(hidden).mean(0))
    return embedding / embedding.norm() if model.is_normalized else embedding


@pytest.mark.parametrize("is_normalized", [True, False])
def test_a_text_is_embedded_as_without_its_batch(vectors, is_normalized):
    model = make(vectors, num_layers=2, max_words=6, is_normalized=is_normalized).double()
    expected = torch.stack([plain_embedding(model, text) for text in TEXTS])
    torch.testing.assert_close(model(TEXTS), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(tuple(reversed(TEXTS))), expected.flip(0), rtol=1e-10, atol=1e-12)


def test_words_are_looked_up_as_written_and_then_in_lower_case(vectors):
    model = make(vectors)
    assert torch.equal(model(["Turn ON the light"]), model(["turn on the light"]))
    assert torch.equal(model(["zebra"]), model(["giraffe"]))  # unknown words share a vector
    means = model.trunk.words.weight[1:].mean(0)
    torch.testing.assert_close(model.trunk.words.weight[0], means)


def test_word_vectors_are_trained_only_on_request(vectors):
    assert not make(vectors).trunk.words.weight.requires_grad
    trained = make(vectors, train_vectors=True)
    trained(TEXTS)[0].sum().backward()
    used = trained.trunk.words.weight.grad.abs().sum(1) > 0
    assert used[trained.trunk.index["turn"]] and not used[trained.trunk.index["music"]]


def test_options_and_inputs_that_are_refused(vectors):
    with pytest.raises(UserError, match="width must be a multiple of the number of heads, 3"):
        make(vectors, heads=3)
    with pytest.raises(UserError, match="max_words must be a whole number >= 1"):
        make(vectors, max_words=0)
    with pytest.raises(UserError, match="No such file"):
        make(vectors.parent / "none.txt")
    for wrong, match in (
        ("one text", "type str"),
        ([], "at least one str"),
        (["a", 3], "type int"),
        (torch.zeros(2), "Tensor"),
    ):
        with pytest.raises(UserError, match=match):
            make(vectors)(wrong)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("train_vectors", [False, True])
def test_importance_is_the_mean_over_the_texts(vectors, batch_size, train_vectors):
    """One `autograd.grad` for each text, whatever the batches; labels beside the texts are ignored."""
    model = make(vectors, train_vectors=train_vectors, is_normalized=False).double()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for text in TEXTS:
        value = plain_embedding(model, text).square().sum()
        gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for total, gradient in zip(expected.values(), gradients, strict=True):
            total += 0 if gradient is None else gradient.abs() / len(TEXTS)
    batches = [TEXTS[start : start + batch_size] for start in range(0, len(TEXTS), batch_size)]
    for given in (batches, [(tuple(batch), torch.zeros(len(batch))) for batch in batches]):
        importance = estimate_importance(model, given)
        assert importance.num_samples == len(TEXTS) and importance.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(importance[name], value, rtol=1e-9, atol=1e-12, msg=name)


# Training


def make_splits():
    """Two splits of two intents; a text is words of its intent in some order."""
    generator, splits = torch.Generator().manual_seed(0), []
    vocabularies = [["turn", "on", "light"], ["play", "music"], ["pay", "bill", "my"], ["what", "time", "is"]]
    for index in range(2):
        parts = []
        for _ in range(2):
            labels = torch.arange(2 * index, 2 * index + 2).repeat(8)
            parts.append(Part([" ".join(_shuffled(vocabularies[label], generator)) for label in labels], labels))
        splits.append(Split(f"s{index}", parts[0], query=parts[1], gallery=parts[1]))
    return splits


def _shuffled(words, generator):
    words = [*words, "the"]
    return [words[i] for i in torch.randperm(len(words), generator=generator)]


METHODS = {
    "mas": lambda model: MAS(model, strength=10, output="projection"),
    "ewc": lambda model: EWC(model, loss=MultiSimilarityLoss(), strength=10),
    "lwf": lambda model: LwF(model, strength=10),
    "joint": Joint,
    "replay": lambda model: Replay(model, buffer_size=6),
}
RECIPE = Recipe(epochs=2, batch_size=8)


def train(model, method, splits):
    evaluator = RetrievalEvaluator(recall_at=(1,), batch_size=5)
    return train_sequence(model, splits, method=method, loss=MultiSimilarityLoss(), recipe=RECIPE, evaluator=evaluator)


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_on_texts(vectors, name):
    splits = make_splits()
    model, finetuned = make(vectors), make(vectors)
    result = train(model, METHODS[name](model), splits)
    train(finetuned, Joint(finetuned), splits)
    scores = result.scores["mean_average_precision"].scores
    assert scores.shape == (2, 2) and bool(torch.as_tensor(scores).isfinite().all())
    is_same = all(torch.equal(p, q) for p, q in zip(model.parameters(), finetuned.parameters(), strict=True))
    assert is_same == (name == "joint")  # as a method, joint does nothing: an experiment joins the splits for it


def test_training_is_that_of_a_plain_loop(vectors):
    splits, model, plain = make_splits(), make(vectors), make(vectors)
    batches = []

    class Record(Joint):
        def extend_batch(self, inputs, labels):
            batches.append((list(inputs), labels))
            return inputs, labels

    train(model, Record(model), splits)
    optimizer, loss = None, MultiSimilarityLoss()
    plain.train()
    for step, (texts, labels) in enumerate(batches):
        if step % 4 == 0:  # a split has two epochs of two batches
            optimizer = torch.optim.Adam(plain.parameters())
        optimizer.zero_grad()
        loss(plain(texts), labels).backward()
        optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_replay_stores_texts_and_adds_them_to_batches(vectors):
    replay, (first, _) = Replay(make(vectors), buffer_size=4), make_splits()
    texts = ["café ", "", "a much longer text than the others", chr(0x1F600)]
    replay.consolidate([(texts[:2], torch.tensor([0, 1])), (tuple(texts[2:]), torch.tensor([2, 3]))])
    inputs, labels = replay.extend_batch(["new"] * 4, torch.full((4,), 9))
    assert inputs[:4] == ["new"] * 4
    assert {text: int(label) for text, label in zip(inputs[4:], labels[4:], strict=True)} == {
        text: i for i, text in enumerate(texts)
    }
    other = Replay(make(vectors), buffer_size=4)
    other.load_state_dict(replay.state_dict())
    batch = first.train.inputs[:4], torch.zeros(4).long()
    assert other.extend_batch(*batch)[0] == replay.extend_batch(*batch)[0]


def test_class_statistics_of_texts_need_a_layer(vectors):
    splits = make_splits()
    model = make(vectors)
    with pytest.raises(UserError):
        train(model, ClassStatistics(model), splits)
    model = make(vectors)
    train(model, ClassStatistics(model, layer="trunk"), splits)


# sentence-transformers


@pytest.fixture(scope="module")
def stored_model(tmp_path_factory):
    """A model of sentence-transformers with random weights: word embeddings, pooling, a dense layer, unit length."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    torch.manual_seed(0)
    words = modules.WordEmbeddings(
        WhitespaceTokenizer(vocab=["PADDING", *WORDS], stop_words=[]),
        torch.randn(len(WORDS) + 1, 6),
        update_embeddings=True,
    )
    chain = [words, modules.Pooling(6, pooling_mode="mean"), modules.Dense(6, 4), modules.Normalize()]
    path = tmp_path_factory.mktemp("stored") / "model"
    SentenceTransformer(modules=chain, device="cpu").save(str(path))
    return path


def test_a_stored_model_embeds_as_encode_with_gradients(stored_model):
    model = MODELS["sentence_transformer"](path=str(stored_model), local_files_only=True)
    assert isinstance(model, SentenceEncoder)
    texts = TEXTS[:4]
    embeddings = embed_batch(model, texts)
    torch.testing.assert_close(embeddings, torch.from_numpy(model.model.encode(texts)), rtol=1e-5, atol=1e-6)
    before = model.unnormalized(texts)
    torch.testing.assert_close(nn.functional.normalize(before), embeddings)
    assert not torch.allclose(before.norm(dim=1), torch.ones(4))
    embeddings[:, 0].sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_a_stored_model_trains_under_mas(stored_model):
    model = sentence_transformer(path=str(stored_model), local_files_only=True, max_words=3)
    assert model.model.max_seq_length == 3
    result = train(model, MAS(model, embed="unnormalized"), make_splits())
    assert result.scores["mean_average_precision"].scores.shape == (2, 2)


def test_stored_models_that_are_refused(stored_model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="cannot be loaded by sentence-transformers"):
        sentence_transformer(path=str(tmp_path / "none"), local_files_only=True)
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "modules.json").write_text(json.dumps([]))
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(UserError, match="pytorch_model.bin is a pickle"):
        sentence_transformer(path=str(folder))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'mas-embed\[sentence-transformers\]'"):
        sentence_transformer(path=str(stored_model))
