"""Learning without Forgetting, which keeps the embeddings of new data close to those of the old model."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.losses import embedding_distillation, similarity_distillation
from mas_embed.methods.base import METHODS, Method
from mas_embed.methods.checks import check_strength
from mas_embed.runtime.checks import check_choice
from mas_embed.runtime.distributed import rows_of_whole_batch
from mas_embed.runtime.forward import Embed, check_embed, embed_batch

Distillation = Literal["embedding", "similarity"]


@METHODS.register("lwf")
class LwF(Method):
    """Learning without Forgetting (Li and Hoiem, ECCV 2016) for embeddings: distillation from a frozen copy of the old model.

    The copy is made when a split ends. In the next split, it embeds every batch as y_n, and the model that is trained embeds
    it as z_n. One of the following distances is multiplied by `strength` and added to the loss of the batch:

    - "embedding": `1/N sum_n ||z_n - y_n||_2^2`, the adaptation of LwF to embeddings by Yu et al. (CVPR 2020);
    - "similarity": `1/N^2 sum_nm (cos(z_n, z_m) - cos(y_n, y_m))^2`, which does not penalize a rotation of all embeddings
      (Tung and Mori, ICCV 2019, on embeddings of unit length).

    The method deviates from Li and Hoiem, who distil the class scores of a classifier; an embedding network has none. The old
    model is always in eval mode. The cost is one more forward pass per batch and the memory of one copy of the model.

    Args:
        model: any module that embeds a batch as [N, D].
        strength: factor of the distance, >= 0; 0 is plain finetuning.
        distillation: "embedding" or "similarity".
        embed: replaces `model(inputs)` for the old model, see `MAS`. It must compute what the new model computes in training.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1.0,
        distillation: Distillation = "embedding",
        embed: Embed | str | None = None,
    ) -> None:
        super().__init__(model)
        check_strength(strength)
        check_choice("distillation", distillation, get_args(Distillation))
        check_embed(model, embed)
        self.strength, self.distillation, self.embed = strength, distillation, embed
        self._old: nn.Module | None = None

    @property
    def is_exact_in_processes(self) -> bool:
        """True: the distance is that of the whole batch."""
        return True

    def batch_penalty(self, inputs: Any, embeddings: Tensor) -> Tensor | None:
        """`strength` times the distance between the embeddings [N, D] and those of the old model."""
        if self._old is None or self.strength == 0:
            return None
        embeddings, old = self._new_and_old(inputs, embeddings)
        distance = embedding_distillation if self.distillation == "embedding" else similarity_distillation
        return self.strength * distance(embeddings, old)

    def _new_and_old(self, inputs: Any, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The embeddings [N, D] of the batch, that of all processes, and those of the old model."""
        assert self._old is not None
        with torch.no_grad():
            old = embed_batch(self._old, inputs, self.embed)
        old = old[len(old) - len(embeddings) :]  # without an item that only keeps the model busy, see `training_step`
        return rows_of_whole_batch(embeddings), rows_of_whole_batch(old)

    def consolidate(self, batches: Iterable[Any]) -> None:
        """Ends a split: a copy of the current model becomes the old model. `batches` is not read."""
        self._old = _frozen_copy(self.model)

    def _state(self) -> dict[str, Any]:
        """The old model's `state_dict`, empty before the first `consolidate`."""
        return {"old": dict(self._old.state_dict()) if self._old is not None else {}}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        """Restores a state.

        Raises:
            UserError: the state belongs to another model.
        """
        old = _frozen_copy(self.model) if state["old"] else None
        if old is not None:
            try:
                old.load_state_dict(state["old"])
            except RuntimeError as error:
                raise UserError(f"the state is of another model: {' '.join(str(error).split())}") from None
        self._old = old


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode, with all parameters frozen and without gradients."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    frozen.zero_grad()
    return frozen
