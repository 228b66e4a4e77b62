"""Learning without Forgetting: the embeddings of new data stay what the old model makes of it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.losses import embedding_distillation, similarity_distillation
from mas_embed.methods.base import METHODS, Method
from mas_embed.methods.checks import check_choice, check_strength
from mas_embed.runtime.forward import Embed, embed_batch

Distillation = Literal["embedding", "similarity"]


@METHODS.register("lwf")
class LwF(Method):
    """Learning without Forgetting (Li and Hoiem, ECCV 2016) for embeddings: a frozen copy of the old model is imitated.

    To the loss of a batch of the new split, embedded as z_n now and as y_n by the copy that was made when the last split
    ended, `strength` times one of these is added:

    - "embedding": `1/N sum_n ||z_n - y_n||_2^2`, as Yu et al. (CVPR 2020) carry LwF over to embeddings;
    - "similarity": `1/N^2 sum_nm (cos(z_n, z_m) - cos(y_n, y_m))^2`, which leaves the space free to turn as a whole
      (Tung and Mori, ICCV 2019, on embeddings of unit length).

    Deviates from Li and Hoiem, whose networks classify: there are no old output units whose responses could be kept. The old
    model is in eval mode, as it was used, also where the new one is in train mode. O(one forward pass) a batch and
    one copy of the model.

    Args:
        model: any module that embeds a batch as [N, D].
        strength: >= 0; 0 is finetune.
        distillation: "embedding" or "similarity".
        embed: how the old model embeds instead of `model(inputs)`; must be how the new one does in training.
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
        self.strength, self.distillation, self.embed = strength, distillation, embed
        self._old: nn.Module | None = None

    def batch_penalty(self, inputs: Any, embeddings: Tensor) -> Tensor | None:
        """`strength` times the distance of the embeddings [N, D] from what the old model makes of the inputs."""
        if self._old is None or self.strength == 0:
            return None
        with torch.no_grad():
            old = embed_batch(self._old, inputs, self.embed)
        distance = embedding_distillation if self.distillation == "embedding" else similarity_distillation
        return self.strength * distance(embeddings, old)

    def consolidate(self, batches: Iterable[Any]) -> None:
        """Ends a split: the model as it is now becomes the old one; `batches` are not read."""
        self._old = _frozen_copy(self.model)

    def state_dict(self) -> dict[str, Any]:
        """The old model's `state_dict`, empty before the first `consolidate`."""
        return {"old": dict(self._old.state_dict()) if self._old is not None else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a state.

        Raises:
            UserError: it is one of another model.
        """
        self._check_state(state)
        old = _frozen_copy(self.model) if state["old"] else None
        if old is not None:
            try:
                old.load_state_dict(state["old"])
            except RuntimeError as error:
                raise UserError(f"the state is of another model: {' '.join(str(error).split())}") from None
        self._old = old


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, without gradients."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    frozen.zero_grad()
    return frozen
