"""Ready-made `embed` functions for text models, by name in `READY_MADE`: sentence-transformers and Hugging Face encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.runtime.forward import LABEL_KEYS, Embed, batch_to, call_with, device_of, is_texts


def sentence_transformers(model: nn.Module, inputs: Any) -> Tensor:
    """The embeddings [N, D] of a `SentenceTransformer`, with gradients.

    Args:
        model: the `SentenceTransformer`.
        inputs: a list of texts, which the model tokenizes; or the features that its `preprocess` or `tokenize` returns.

    Raises:
        UserError: the model cannot tokenize texts, or returns no "sentence_embedding".
    """
    return _sentence_embedding(model, model, inputs)


def sentence_transformers_unnormalized(model: nn.Module, inputs: Any) -> Tensor:
    """As `sentence_transformers`, but without the `Normalize` modules at the end of the model."""
    modules = list(model.children())
    while modules and type(modules[-1]).__name__ == "Normalize":
        modules.pop()
    return _sentence_embedding(model, nn.Sequential(*modules), inputs)


def mean_pooling(model: nn.Module, inputs: Any) -> Tensor:
    """The mean [N, D] of a Hugging Face encoder's `last_hidden_state` over the tokens that the attention mask does not leave out.

    Args:
        model: an encoder, such as `transformers.BertModel`.
        inputs: the output of its tokenizer, or a tensor of token ids [N, T], none of which is padding.

    Raises:
        UserError: the inputs are texts, or the model returns no `last_hidden_state`.
    """
    hidden_NTD, mask_NT = _hidden_states(model, inputs)
    mask_NT1 = mask_NT.unsqueeze(2).to(hidden_NTD.dtype)
    return (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1).clamp(min=1)


def cls_pooling(model: nn.Module, inputs: Any) -> Tensor:
    """As `mean_pooling`, but the first token that the attention mask does not leave out, which is the CLS token of BERT."""
    hidden_NTD, mask_NT = _hidden_states(model, inputs)
    first_N11 = (mask_NT != 0).long().argmax(1)[:, None, None]
    return hidden_NTD.gather(1, first_N11.expand(-1, 1, hidden_NTD.shape[2])).squeeze(1)


READY_MADE: dict[str, Embed] = {
    function.__name__: function
    for function in (sentence_transformers, sentence_transformers_unnormalized, mean_pooling, cls_pooling)
}


def tokenizes(embed: Embed | None) -> bool:
    """Whether an `embed` function is a ready-made one that tokenizes texts."""
    return embed in (sentence_transformers, sentence_transformers_unnormalized)


def tokenized(model: nn.Module, texts: Sequence[str]) -> Any:
    """The features of texts, as the model's own `preprocess` or (before sentence-transformers 5.4) `tokenize` makes them."""
    tokenize = getattr(model, "preprocess", None) or getattr(model, "tokenize", None)
    if not callable(tokenize):
        raise UserError(
            f"the model, a {type(model).__name__}, cannot tokenize texts; pass the output of its tokenizer, with "
            "embed='mean_pooling' or embed='cls_pooling' for a Hugging Face encoder"
        )
    return tokenize(list(texts))


def _sentence_embedding(model: nn.Module, modules: nn.Module, inputs: Any) -> Tensor:
    features = batch_to(tokenized(model, inputs), device_of(model)) if is_texts(inputs) else inputs
    if not isinstance(features, Mapping):
        raise UserError(
            f"a SentenceTransformer embeds a list of texts, or the features that it tokenizes them to, got an object of "
            f"type {type(features).__name__}"
        )
    # A copy, because the modules of the model write their results into the features
    output = modules({key: value for key, value in features.items() if key not in LABEL_KEYS})
    embeddings = output.get("sentence_embedding") if isinstance(output, Mapping) else None
    if not isinstance(embeddings, Tensor):
        raise UserError(
            f"the model, a {type(model).__name__}, returns no 'sentence_embedding'; embed='sentence_transformers' is for a "
            "SentenceTransformer, 'mean_pooling' and 'cls_pooling' for a Hugging Face encoder"
        )
    return embeddings


def _hidden_states(model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
    """The last hidden states [N, T, D] and the attention mask [N, T], which is one everywhere if the inputs have none."""
    if is_texts(inputs):
        raise UserError("a Hugging Face encoder does not tokenize texts; pass the output of its tokenizer as the batch")
    output = call_with(model, inputs)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None and isinstance(output, tuple) and output:  # return_dict=False
        hidden = output[0]
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise UserError(
            f"the model, a {type(model).__name__}, returns no last_hidden_state [N, T, D] to pool; load the encoder without "
            "a head, such as transformers.AutoModel, or pass embed=(model, input) -> tensor"
        )
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return hidden, torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
