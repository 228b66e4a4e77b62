"""Text models, unchanged, with the ready-made `embed` functions, against one autograd call per text in float64."""

import pytest
import torch
from importance_cases import assert_equal
from oracles import per_sample_importance
from torch import nn

from mas_embed import OnlineImportance, UserError, estimate_importance, explain_coverage
from mas_embed.retrieval.embedding import embed as embed_all

VOCABULARY = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far", "away", "from", "home"]
TEXTS = ["the cat sat", "a dog ran far away from home", "on mat", "cat cat dog home", "the dog"]


def bert(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=16, **sizes, **options)
    return transformers.BertModel(config).double().eval()


def tokens():
    batch = {"input_ids": torch.randint(1, 20, (5, 7)), "attention_mask": torch.ones(5, 7, dtype=torch.long)}
    batch["attention_mask"][1, 4:] = batch["attention_mask"][3, 2:] = 0
    return batch


def sentence_transformer(*more, first=None):
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, WordEmbeddings
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    torch.manual_seed(0)
    tokenizer = WhitespaceTokenizer(VOCABULARY, stop_words=set())
    words = WordEmbeddings(tokenizer, torch.randn(len(VOCABULARY), 4), update_embeddings=True)
    modules = [first] if first is not None else [words, Pooling(4)]
    return library.SentenceTransformer(modules=[*modules, *more], device="cpu").double().eval()


def normalize():
    from sentence_transformers.base.modules import Normalize

    return Normalize()


def embedding_of(model, text):
    return model(model.preprocess([text]))["sentence_embedding"][0]


def expected_of_texts(model):
    return per_sample_importance(model, TEXTS, lambda text: [embedding_of(model, text).square().sum()])


@pytest.mark.parametrize("embed", ["mean_pooling", "cls_pooling"])
def test_a_bert_is_exact_and_has_only_rules(embed, monkeypatch):
    model, batch = bert(), tokens()
    samples = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(5)]

    def output(sample):
        hidden, mask = model(**sample).last_hidden_state[0], sample["attention_mask"][0]
        kept = [row for row, is_token in zip(hidden, mask, strict=True) if is_token]
        pooled = sum(kept) / len(kept) if embed == "mean_pooling" else hidden[0]
        return [pooled.square().sum()]

    expected = per_sample_importance(model, samples, output)
    monkeypatch.setattr("mas_embed.importance.fallback.PerSampleGradients.sums", None)
    for sizes in ((5,), (3, 2)):
        parts = {key: value.split(list(sizes)) for key, value in batch.items()}
        batches = [
            {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(len(ids))}
            for ids, mask in zip(parts["input_ids"], parts["attention_mask"], strict=True)
        ]
        assert_equal(estimate_importance(model, batches, embed=embed), expected, rtol=1e-9)
    coverage = explain_coverage(model, batch, embed=embed)
    assert {name for name, kind in coverage.items() if kind != "rule"} == {"pooler.dense.weight", "pooler.dense.bias"}
    assert coverage["embeddings.position_embeddings.weight"] == "rule"


def test_pooling_skips_padding_on_the_left():
    model, batch = bert(), tokens()
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    embeddings = embed_all(model, [batch], embed="cls_pooling")
    hidden = model(**batch).last_hidden_state
    assert torch.allclose(embeddings[3], hidden[3, 5])
    assert torch.allclose(embeddings[0], hidden[0, 0])


def test_pooling_refuses_texts_and_models_without_hidden_states():
    with pytest.raises(UserError, match="does not tokenize texts; pass the output of its tokenizer"):
        estimate_importance(bert(), [TEXTS], embed="mean_pooling")
    with pytest.raises(UserError, match="returns no last_hidden_state"):
        estimate_importance(nn.Linear(3, 2), [torch.zeros(2, 3)], embed="cls_pooling")
    with pytest.raises(UserError, match="pass embed='mean_pooling' or embed='cls_pooling'"):
        estimate_importance(bert(), [tokens()])


def test_raw_and_tokenized_texts_of_a_sentence_transformer():
    model = sentence_transformer()
    expected = expected_of_texts(model)
    features = model.preprocess(TEXTS)
    for batches in ([TEXTS], [TEXTS[:3], TEXTS[3:]], [(TEXTS, torch.arange(5))], [features], [[features, "labels"]]):
        assert_equal(estimate_importance(model, batches, embed="sentence_transformers"), expected)
    assert "sentence_embedding" not in features
    assert explain_coverage(model, TEXTS, embed="sentence_transformers")["0.emb_layer.weight"] == "rule"
    assert embed_all(model, [TEXTS], embed="sentence_transformers").shape == (5, 4)


def test_an_embed_function_that_tokenizes():
    model = sentence_transformer()

    def embed(model, texts):
        assert all(isinstance(text, str) for text in texts)
        return torch.stack([embedding_of(model, text) for text in texts])

    assert_equal(estimate_importance(model, [TEXTS, TEXTS], embed=embed), expected_of_texts(model))


def test_the_embeddings_before_normalization():
    plain, model = sentence_transformer(), sentence_transformer(normalize())
    importance = estimate_importance(model, [TEXTS], embed="sentence_transformers_unnormalized")
    assert_equal(importance, expected_of_texts(plain))
    with pytest.raises(UserError, match="unit length.*embed='sentence_transformers_unnormalized'"):
        estimate_importance(model, [TEXTS], embed="sentence_transformers")


def test_encode_is_refused_with_the_remedy():
    model = sentence_transformer()
    with pytest.raises(UserError, match="inference mode.*embed='sentence_transformers'"):
        estimate_importance(model, [TEXTS], embed="encode")
    for embed in (None, "encode"):
        with pytest.raises(UserError, match="pass embed='sentence_transformers'"):
            embed_all(model, [TEXTS], embed=embed)


def test_concatenated_tokens_of_a_static_embedding():
    tokenizers = pytest.importorskip("tokenizers")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    words = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="the"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = sentence_transformer(first=StaticEmbedding(tokenizer, embedding_dim=4))
    expected = expected_of_texts(model)
    for batch in (TEXTS, model.preprocess(TEXTS)):
        assert_equal(estimate_importance(model, [batch], embed="sentence_transformers"), expected)
    assert explain_coverage(model, TEXTS, embed="sentence_transformers")["0.embedding.weight"] == "rule"


def test_texts_observed_online_are_counted():
    model = sentence_transformer()
    online = OnlineImportance(model, every=2, embed="sentence_transformers")
    online.observe(TEXTS)
    taken = per_sample_importance(model, TEXTS[::2], lambda text: [embedding_of(model, text).square().sum()])
    assert online.importance().num_samples == 3
    assert_equal(online.importance(), taken)


def test_a_method_of_the_model_precedes_the_ready_made_function():
    class Model(nn.Linear):
        def mean_pooling(self, inputs):
            return 2 * self(inputs)

    torch.manual_seed(0)
    model, inputs = Model(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    expected = {name: 4 * value for name, value in estimate_importance(model, [inputs]).items()}
    assert_equal(estimate_importance(model, [inputs], embed="mean_pooling"), expected)
