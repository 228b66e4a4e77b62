"""Ready-made `embed` functions for text models, by name in `READY_MADE`: sentence-transformers and Hugging Face encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.runtime.forward import LABEL_KEYS, Embed, batch_to, call_with, device_of, input_of, is_texts


def sentence_transformers(model: nn.Module, batch: Any) -> Tensor:
    """The embeddings [N, D] of a `SentenceTransformer`, with gradients.

    Args:
        model: the `SentenceTransformer`.
        batch: a list of N texts, which the model tokenizes after its default prompt, as in `model.encode`; the features that
            its `preprocess` or `tokenize` returns, or that its trainer passes to a loss; or a pair of either and labels. It
            is not changed, and moved to the device of the model.

    Raises:
        UserError: the model cannot tokenize texts, or returns no "sentence_embedding".
    """
    return _sentence_embedding(model, model, batch)


def sentence_transformers_unnormalized(model: nn.Module, batch: Any) -> Tensor:
    """As `sentence_transformers`, but without the `Normalize` modules at the end of the model.

    Embeddings of unit length have no norm whose sensitivity could be measured; the embeddings before the normalization have.
    """
    modules = list(model.children())
    while modules and type(modules[-1]).__name__ == "Normalize":
        modules.pop()
    return _sentence_embedding(model, nn.Sequential(*modules), batch)


def mean_pooling(model: nn.Module, batch: Any) -> Tensor:
    """The mean [N, D] of a Hugging Face encoder's `last_hidden_state` over the tokens that the attention mask does not leave out.

    Args:
        model: an encoder, such as `transformers.BertModel`.
        batch: the output of its tokenizer, in which labels are ignored; a tensor of token ids [N, T], none of which is
            padding; or a pair of either and labels. It is moved to the device of the model.

    Raises:
        UserError: the batch holds texts, or the model returns no `last_hidden_state`.
    """
    hidden_NTD, mask_NT = _hidden_states(model, batch)
    mask_NT1 = mask_NT.unsqueeze(2).to(hidden_NTD.dtype)
    return (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1).clamp(min=1)


def cls_pooling(model: nn.Module, batch: Any) -> Tensor:
    """As `mean_pooling`, but the first token that the attention mask does not leave out, which is the CLS token of BERT."""
    hidden_NTD, mask_NT = _hidden_states(model, batch)
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
    """The features of texts after the model's default prompt, as in its `encode`.

    They are made by the model's own `preprocess` or, before sentence-transformers 5.4, by its `tokenize`.
    """
    name = getattr(model, "default_prompt_name", None)
    prompt = cast(Mapping[str, str], model.prompts)[name] if name is not None else None
    if callable(preprocess := getattr(model, "preprocess", None)):
        return preprocess(list(texts), prompt=prompt) if prompt else preprocess(list(texts))
    if not callable(tokenize := getattr(model, "tokenize", None)):
        raise UserError(
            f"the model, a {type(model).__name__}, cannot tokenize texts; pass the output of its tokenizer, with "
            "embed='mean_pooling' or embed='cls_pooling' for a Hugging Face encoder"
        )
    return tokenize([f"{prompt or ''}{text}" for text in texts])


def _sentence_embedding(model: nn.Module, modules: nn.Module, batch: Any) -> Tensor:
    inputs = input_of(batch)
    features = batch_to(tokenized(model, inputs) if is_texts(inputs) else inputs, device_of(model))
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


def _hidden_states(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The last hidden states [N, T, D] and the attention mask [N, T], which is one everywhere if the inputs have none."""
    inputs = batch_to(input_of(batch), device_of(model))
    if is_texts(inputs):
        raise UserError("a Hugging Face encoder does not tokenize texts; pass the output of its tokenizer as the batch")
    output = call_with(model, inputs)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None and isinstance(output, tuple) and output:  # return_dict=False
        hidden = output[0]
    if not isinstance(hidden, Tensor) or hidden.ndim != 3:
        raise UserError(
            f"the model, a {type(model).__name__}, returns no last_hidden_state [N, T, D] to pool; load the encoder without "
            "a head, such as transformers.AutoModel, or pool the model inside, as in "
            "embed=lambda model, batch: mean_pooling(model.base_model, batch)"
        )
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return hidden, torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
