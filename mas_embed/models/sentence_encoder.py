"""Embedding networks for texts: models of sentence-transformers, and a small transformer on word vectors.

N texts, T words of the longest one, V numbers of a word vector, W the width of the transformer, H heads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_embed.errors import UserError, reason_of
from mas_embed.models.embedding_net import MODELS, EmbeddingNet, check_sizes
from mas_embed.runtime.forward import device_of
from mas_embed.runtime.libraries import require_library
from mas_embed.runtime.text import printable, shortened
from mas_embed.runtime.word_vectors import read_word_vectors

UNKNOWN = 0  # the row of words without a vector, and of padding, which is masked

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[^\w\s]")


class SentenceEncoder(nn.Module):
    """Embeds lists of texts with a model of sentence-transformers, with gradients.

    `SentenceTransformer.encode` computes the same embeddings, but without gradients.

    Args:
        model: a `SentenceTransformer`, whose parameters are trained.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, texts: Sequence[str]) -> Tensor:
        """The embeddings [N, D] of N texts."""
        return self._embed(texts, list(self.model.children()))

    def unnormalized(self, texts: Sequence[str]) -> Tensor:
        """The embeddings [N, D] before they are scaled to unit length, if the model ends with that."""
        modules = list(self.model.children())
        while type(modules[-1]).__name__ == "Normalize":
            modules.pop()
        return self._embed(texts, modules)

    def _embed(self, texts: Sequence[str], modules: Sequence[nn.Module]) -> Tensor:
        check_texts(texts)
        features: Any = _features(self.model, list(texts))
        for module in modules:
            features = module(features)
        embeddings: Tensor = features["sentence_embedding"]
        return embeddings


@MODELS.register("sentence_transformer")
def sentence_transformer(
    *, path: str, max_words: int | None = None, revision: str | None = None, local_files_only: bool = False
) -> SentenceEncoder:
    """A model of sentence-transformers (5.0 or later), with the weights that it is stored with.

    Weights are read from safetensors files only, and no code of the model's authors is run.

    Args:
        path: a folder, or a name on the Hugging Face hub such as "sentence-transformers/all-MiniLM-L6-v2", which is
            downloaded once.
        max_words: the number of tokens after which a text is cut off; None for that of the model.
        revision: of the model on the hub: a branch, a tag or a commit.
        local_files_only: whether nothing is downloaded.

    Raises:
        UserError: sentence-transformers is not installed (the extra `sentence-transformers`), or the model cannot be loaded.
    """
    library = require_library("sentence_transformers", extra="sentence-transformers")
    _check_has_no_pickles(Path(path))
    try:
        model = library.SentenceTransformer(
            path,
            device="cpu",
            revision=revision,
            local_files_only=local_files_only,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except Exception as error:  # of many kinds: no internet connection, no such model, damaged files
        raise UserError(
            f"the model {_shown(path)} cannot be loaded by sentence-transformers: {reason_of(error)}"
        ) from None
    if max_words is not None:
        check_sizes(max_words=max_words)
        model.max_seq_length = max_words
    return SentenceEncoder(model)


def _check_has_no_pickles(folder: Path) -> None:
    """Raises `UserError` if a module of a local model has its weights in a pickle only, which could run code."""
    if not folder.is_dir():
        return
    for path in sorted(folder.rglob("pytorch_model*.bin")):
        if not list(path.parent.glob("*.safetensors")):
            raise UserError(
                f"{path} is a pickle, which can run code when it is loaded; save the model with safe_serialization=True"
            )


def _features(model: Any, texts: list[str]) -> dict[str, Any]:
    """The tokenised texts on the device of the model."""
    preprocess = getattr(model, "preprocess", None) or model.tokenize  # before 5.4 there is only the latter
    device = device_of(model)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in preprocess(texts).items()}


class WordVectorTransformer(nn.Module):
    """Maps lists of texts to features [N, W]: word vectors under a transformer encoder, and the mean over the words.

    A text is divided into words, numbers and single other characters. A word is looked up as it is written, then in lower
    case; words without a vector share one, the mean of all vectors. The features of a text do not depend on the other texts
    of its batch: padding is masked in the attention and left out of the mean.

    Args:
        vectors: by word its vector [V].
        width: W, a multiple of `heads`.
        num_layers: the number of layers of the encoder.
        heads: the number of attention heads of a layer.
        max_words: the number of words after which a text is cut off.
        train_vectors: whether the word vectors are trained, too.
    """

    def __init__(
        self,
        vectors: Mapping[str, Tensor],
        *,
        width: int = 64,
        num_layers: int = 1,
        heads: int = 4,
        max_words: int = 64,
        train_vectors: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(width=width, num_layers=num_layers, heads=heads, max_words=max_words)
        if width % heads:
            raise UserError(f"width must be a multiple of the number of heads, {heads}, got {width}")
        rows = torch.stack(list(vectors.values()))
        self.index = {word: row for row, word in enumerate(vectors, start=UNKNOWN + 1)}
        self.max_words = max_words
        self.words = nn.Embedding.from_pretrained(
            torch.cat([rows.mean(0, keepdim=True), rows]), freeze=not train_vectors
        )
        self.positions = nn.Embedding(max_words, width)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.projection = nn.Linear(rows.shape[1], width)
        self.layers = nn.ModuleList(_EncoderLayer(width, heads) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, texts: Sequence[str]) -> Tensor:
        """The features [N, W] of N texts."""
        check_texts(texts)
        rows_NT, is_word_NT = self._rows(texts)
        positions_NT = torch.arange(rows_NT.shape[1], device=rows_NT.device).expand(rows_NT.shape)
        hidden_NTW = self.projection(self.words(rows_NT)) + self.positions(positions_NT)
        for layer in self.layers:
            hidden_NTW = layer(hidden_NTW, is_word_NT)
        is_word_NT1 = is_word_NT.unsqueeze(2).to(hidden_NTW.dtype)
        return (self.norm(hidden_NTW) * is_word_NT1).sum(1) / is_word_NT1.sum(1)

    def _rows(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The rows of the words of every text, padded to the longest text, and which of them are words, both [N, T]."""
        rows = [list(self._rows_of(text))[: self.max_words] or [UNKNOWN] for text in texts]
        longest = max(map(len, rows))
        padded = [row + [UNKNOWN] * (longest - len(row)) for row in rows]
        lengths = torch.tensor([len(row) for row in rows])
        device = self.words.weight.device
        return torch.tensor(padded, device=device), (torch.arange(longest) < lengths.unsqueeze(1)).to(device)

    def _rows_of(self, text: str) -> Iterator[int]:
        for word in words_of_text(text):
            yield self.index.get(word, self.index.get(word.lower(), UNKNOWN))


class _EncoderLayer(nn.Module):
    """A layer of a transformer encoder with normalisation before attention and before the feed-forward network.

    Attention is made of linear layers, for which importance has a rule; `nn.MultiheadAttention` keeps its weights otherwise.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.network_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden_NTW: Tensor, is_word_NT: Tensor) -> Tensor:
        hidden_NTW = hidden_NTW + self._attend(self.attention_norm(hidden_NTW), is_word_NT)
        return hidden_NTW + self.network(self.network_norm(hidden_NTW))

    def _attend(self, hidden_NTW: Tensor, is_word_NT: Tensor) -> Tensor:
        query, key, value = (
            layer(hidden_NTW).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=is_word_NT[:, None, None, :])
        return self.output(attended.transpose(1, 2).flatten(2))


@MODELS.register("word_vector_transformer")
def word_vector_transformer(
    *,
    path: str | Path,
    embedding_size: int = 32,
    width: int = 64,
    num_layers: int = 1,
    heads: int = 4,
    max_words: int = 64,
    train_vectors: bool = False,
    is_normalized: bool = True,
) -> EmbeddingNet:
    """A small transformer encoder on the word vectors of a file, with random initial weights; needs no download.

    See `WordVectorTransformer`, whose features a linear layer maps to the embedding.

    Args:
        path: of a file of word2vec or GloVe, see `read_word_vectors`. All of its words are read.
        embedding_size: D, the size of the embeddings.
        width: the width of the encoder, a multiple of `heads`.
        num_layers: the number of layers of the encoder.
        heads: the number of attention heads of a layer.
        max_words: the number of words after which a text is cut off.
        train_vectors: whether the word vectors are trained, too.
        is_normalized: whether embeddings have unit length.

    Raises:
        UserError: the file cannot be read, or a size is not accepted.
    """
    check_sizes(embedding_size=embedding_size)
    trunk = WordVectorTransformer(
        read_word_vectors(path),
        width=width,
        num_layers=num_layers,
        heads=heads,
        max_words=max_words,
        train_vectors=train_vectors,
    )
    return EmbeddingNet(trunk, nn.Linear(width, embedding_size), is_normalized=is_normalized)


def words_of_text(text: str) -> list[str]:
    """The words, numbers and single other characters of a text, without spaces.

    >>> words_of_text("Don't wake me_up at 7:30!")
    ["Don't", 'wake', 'me', 'up', 'at', '7', ':', '30', '!']
    """
    return _WORD.findall(text)


def check_texts(texts: object) -> None:
    """Raises `UserError` unless the input of the model is a list or tuple of at least one str."""
    if not isinstance(texts, list | tuple):
        raise UserError(f"the model embeds lists of str, got an object of type {type(texts).__name__}")
    if not texts:
        raise UserError("the model embeds lists of at least one str, got none")
    for text in texts:
        if not isinstance(text, str):
            raise UserError(
                f"the model embeds lists of str, got one that holds an object of type {type(text).__name__}"
            )


def _shown(value: str) -> str:
    return shortened(printable(repr(value)), 80)
