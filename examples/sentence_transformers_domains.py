"""Trains a sentence-transformers model on one domain after another: the same training with and without MAS.

    python examples/sentence_transformers_domains.py

Two domains of short made-up requests are learned one after another. Both talk about the same things ("card", "light", ...), but
group them differently, so that learning the second undoes the first. The model is built from modules of the library and needs no
download; with a model of yours, only `make_model` changes. Three marked lines add MAS.
"""

import tempfile

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense, StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

import mas_embed as me
from mas_embed.integrations.sentence_transformers import WithPenalty, embed, retrieval_scores

VERBS = ["show", "find", "change", "cancel", "lock", "add"]
THINGS = ["card", "account", "light", "door", "alarm", "song"]


def domain(by_verb: bool) -> tuple[list[str], list[str]]:
    """Requests and their intents: what is to be done, or with which thing."""
    texts = [f"{verb} {thing}" for verb in VERBS for thing in THINGS]
    return texts, [text.split()[0 if by_verb else 1] for text in texts]


def pairs(texts: list[str], labels: list[str]) -> Dataset:
    """Pairs of different texts with the same label."""
    rows = [
        (a, b)
        for a, i in zip(texts, labels, strict=True)
        for b, j in zip(texts, labels, strict=True)
        if i == j and a != b
    ]
    return Dataset.from_dict({"anchor": [a for a, _ in rows], "positive": [b for _, b in rows]})


def make_model() -> SentenceTransformer:
    """Word vectors, their mean, and a linear layer."""
    vocabulary = {word: index for index, word in enumerate(["[UNK]", *VERBS, *THINGS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106  (a word, no password)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with me.seeded(0):
        return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=16), Dense(16, 16)], device="cpu")


def train(strength: float) -> me.ScoreMatrix:
    """Trains on both domains; returns the mean average precision on each domain after each."""
    model = make_model()
    method = me.MAS(model, strength=strength, normalize=True, embed=embed)  # line 1: before the first domain
    domains = [domain(by_verb=True), domain(by_verb=False)]
    rows = []
    for texts, labels in domains:
        loss = WithPenalty(MultipleNegativesRankingLoss(model), method)  # line 2: the loss of the trainer
        with tempfile.TemporaryDirectory() as folder:
            arguments = SentenceTransformerTrainingArguments(
                output_dir=folder,
                num_train_epochs=3,
                per_device_train_batch_size=16,
                learning_rate=0.01,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_strategy="no",
                use_cpu=True,
                dataloader_pin_memory=False,
            )
            trainer = SentenceTransformerTrainer(
                model=model, args=arguments, train_dataset=pairs(texts, labels), loss=loss
            )
            trainer.train()
        method.consolidate([texts])  # line 3: when a domain ends; labels are not needed
        rows.append([retrieval_scores(model, *other).mean_average_precision for other in domains])
    return me.ScoreMatrix(rows)


if __name__ == "__main__":
    for name, strength in (("without protection", 0.0), ("with MAS", 1.0)):
        scores = train(strength)
        print(f"{name}: in the end, mAP {scores[1, 0]:.3f} on the first domain and {scores[1, 1]:.3f} on the second")
