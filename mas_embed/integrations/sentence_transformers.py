"""Continual learning with sentence-transformers; tested with sentence-transformers 6.2.

`WithPenalty` adds the penalty of a method to a loss of the library. `embed` embeds texts or tokenised features with gradients;
use it as `embed` of a method or of `estimate_importance`. `retrieval_evaluator` and `retrieval_scores` measure what the model
still knows of a split.
`mas_embed.integrations.transformers.MethodCallback` works with the trainer of this library too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mas_embed import (
    SI,
    Combine,
    Method,
    RetrievalScores,
    UserError,
    evaluate_retrieval,
    flatten_state,
    require_library,
    unflatten_state,
)
from mas_embed import sentence_transformers_unnormalized as embed
from mas_embed.integrations.transformers import check_batch_hooks, mark_penalized_by_loss

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
else:
    _library = require_library("sentence_transformers", extra="sentence-transformers")
    SentenceTransformer, SentenceTransformerTrainer = _library.SentenceTransformer, _library.SentenceTransformerTrainer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

__all__ = ["WithPenalty", "embed", "feature_columns", "retrieval_evaluator", "retrieval_scores"]

_STATE, _NUMBERS = "method/", "method_numbers"


class WithPenalty(nn.Module):
    """A loss of sentence-transformers plus the penalty of a method, for the `loss` of a `SentenceTransformerTrainer`.

    It returns a dict of losses, which the trainer adds up and logs one by one: `base_loss` (or the losses of a loss that
    returns a dict itself) and `penalty`. The trainer divides the loss of every batch by the number of accumulated batches, so
    the penalty enters once in every step of the optimizer. It takes part in gradient clipping.

    It must be the outermost loss: `WithPenalty(MatryoshkaLoss(model, loss, dims), method)`. Every loss of the library works,
    also those with cached gradients. The caller calls `method.begin_split()` before a split and `method.consolidate(...)` after
    it, or adds a `MethodCallback` of the same method to the trainer, which does both and leaves the penalty to the loss.

    The tensors of the method's state, such as importance and anchor, are among the module's buffers and in its `state_dict`.
    They follow the parameters to their device. Checkpoints of the trainer hold no losses; `MethodCallback` saves the state.

    Args:
        loss: `(sentence_features, labels) -> Tensor []`, or a dict of such tensors.
        method: a method with a penalty on parameters, made with the model of the loss or a part of it.

    Attributes:
        model: the model of the loss; the trainer reads and replaces it.

    Raises:
        UserError: the method needs the batches, the gradients or the steps of the optimizer, or belongs to another model.
    """

    def __init__(self, loss: nn.Module, method: Method) -> None:
        super().__init__()
        check_batch_hooks(method, "WithPenalty")
        _check_penalty_is_enough(method)
        self.model = getattr(loss, "model", method.model)
        self.loss = loss
        self.method = method
        self._loaded_state: dict[str, Any] | None = None
        self.register_load_state_dict_post_hook(WithPenalty._restore_method)
        trained = set(map(id, self.parameters()))
        if not all(id(parameter) in trained for parameter in method.model.parameters()):
            raise UserError(
                f"the method {method.name} belongs to another model than the loss; make both with the same model"
            )

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The losses of a batch by name, "penalty" among them."""
        loss = self.loss(sentence_features, labels)
        losses = dict(loss) if isinstance(loss, Mapping) else {"base_loss": loss}
        if "penalty" in losses:
            raise UserError("the loss has a component 'penalty' already; wrap a loss in WithPenalty once")
        if torch.is_grad_enabled():
            mark_penalized_by_loss(self.method)
        return _Losses(losses | {"penalty": self.method.penalty()})

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card says of this loss."""
        return {"loss": type(self.loss).__name__, "method": self.method.name}

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The buffers of the loss and the model, and the tensors of the method's state."""
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        tensors, _ = flatten_state(self.method.state_dict(), f"{prefix}.{_STATE}" if prefix else _STATE)
        yield from tensors.items()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tensors, numbers = flatten_state(self.method.state_dict())
        for path, value in tensors.items():
            destination[f"{prefix}{_STATE}{path}"] = value if keep_vars else value.detach()
        destination[prefix + _NUMBERS] = torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        start, numbers_key = prefix + _STATE, prefix + _NUMBERS
        unexpected_keys[:] = [key for key in unexpected_keys if key != numbers_key and not key.startswith(start)]
        if numbers_key not in state_dict:
            missing_keys.append(numbers_key)
            return
        tensors = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        self._loaded_state = tensors | json.loads(bytes(state_dict[numbers_key].tolist()))

    def _restore_method(self, *_: Any) -> None:
        """Called when the weights of the model have been loaded, which the state of the method is checked against."""
        if self._loaded_state is not None:
            flat, self._loaded_state = self._loaded_state, None
            self.method.load_state_dict(unflatten_state(flat))


class _Losses(dict[str, Tensor]):
    """Losses by name, which cannot be the loss that another one, such as `MatryoshkaLoss`, weights or adds up."""

    def _refuse(self, other: Any) -> Any:
        raise UserError(
            "WithPenalty must be the outermost loss, because the losses of this library compute with one tensor; write "
            "WithPenalty(MatryoshkaLoss(model, loss, dims), method)"
        )

    __add__ = __radd__ = __mul__ = __rmul__ = __truediv__ = _refuse


def feature_columns(batch: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """The features of every text column in a batch of a `SentenceTransformerTrainer`, and the labels or None."""
    inputs = {key: value for key, value in batch.items() if key != "dataset_name"}
    return SentenceTransformerTrainer.collect_features(None, inputs)  # type: ignore[arg-type]  # reads no attribute


def retrieval_evaluator(
    queries: Sequence[str],
    query_labels: Sequence[Any],
    gallery: Sequence[str],
    gallery_labels: Sequence[Any],
    *,
    name: str = "",
    batch_size: int = 32,
) -> InformationRetrievalEvaluator:
    """The library's evaluator for one split, in which gallery texts with the label of a query are relevant to it.

    Give a trainer one for each split: `evaluator=[retrieval_evaluator(...), ...]`. Its `map@100` and other measures are cut;
    `retrieval_scores` computes measures over the whole ranking.

    Args:
        queries: texts that are searched for; none may be in the gallery, where each would find itself.
        query_labels: one for each query.
        gallery: texts that are searched.
        gallery_labels: one for each text of the gallery.
        name: of the split, with which the names of its metrics begin.
        batch_size: of the texts that are embedded at a time.

    Raises:
        UserError: there is not one label for each text, or no query has a relevant text.
    """
    _check_labels("queries", queries, query_labels)
    _check_labels("gallery", gallery, gallery_labels)
    members: dict[Any, set[str]] = {}
    for index, label in enumerate(gallery_labels):
        members.setdefault(label, set()).add(f"g{index}")
    relevant = {f"q{index}": members[label] for index, label in enumerate(query_labels) if label in members}
    if not relevant:
        raise UserError("no text of the gallery has the label of a query; give labels that both share")
    return InformationRetrievalEvaluator(
        {f"q{index}": text for index, text in enumerate(queries)},
        {f"g{index}": text for index, text in enumerate(gallery)},
        relevant,
        name=name,
        batch_size=batch_size,
        write_csv=False,
    )


def retrieval_scores(
    model: SentenceTransformer,
    queries: Sequence[str],
    query_labels: Sequence[Any],
    gallery: Sequence[str] | None = None,
    gallery_labels: Sequence[Any] | None = None,
    *,
    batch_size: int = 32,
) -> RetrievalScores:
    """The scores of `evaluate_retrieval` on texts, embedded by `model.encode`, with exact average precision.

    The mean average precision of split j after split i is entry [i, j] of a `ScoreMatrix`.

    Args:
        model: a `SentenceTransformer`.
        queries: texts that are searched for.
        query_labels: one for each query, of any type that can be compared.
        gallery: texts that are searched. None: the other queries of each query.
        gallery_labels: one for each text of the gallery.
        batch_size: of the texts that are embedded at a time.

    Raises:
        UserError: there is not one label for each text.
    """
    _check_labels("queries", queries, query_labels)
    codes: dict[Any, int] = {}

    def coded(labels: Sequence[Any]) -> Tensor:
        return torch.tensor([codes.setdefault(label, len(codes)) for label in labels])

    def embedded(texts: Sequence[str]) -> Tensor:
        embeddings = model.encode(list(texts), batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
        return embeddings.cpu()

    if gallery is None or gallery_labels is None:
        return evaluate_retrieval(embedded(queries), coded(query_labels))
    _check_labels("gallery", gallery, gallery_labels)
    return evaluate_retrieval(embedded(queries), coded(query_labels), embedded(gallery), coded(gallery_labels))


def _check_penalty_is_enough(method: Method) -> None:
    """Raises `UserError` for a method that does more between the steps of the optimizer than to add a penalty."""
    if isinstance(method, Combine):
        for inner in method.methods:
            _check_penalty_is_enough(inner)
    elif isinstance(method, SI):
        raise UserError(
            "SI reads the gradients of the loss without the penalty; use MethodCallback instead of WithPenalty"
        )
    elif getattr(method, "decoupled", False):
        raise UserError(
            f"{method.name} with decoupled=True acts after the steps of the optimizer; use MethodCallback instead of WithPenalty"
        )
    elif method.acts_after_step:
        raise UserError(
            f"{method.name} acts after the steps of the optimizer; use MethodCallback instead of WithPenalty"
        )


def _check_labels(what: str, texts: Sequence[str], labels: Sequence[Any]) -> None:
    if len(texts) != len(labels):
        raise UserError(f"{what} must have one label for each text, got {len(texts)} texts and {len(labels)} labels")
