"""The method multi_head_lwf: Learning without Forgetting on the class scores of the old heads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.methods import METHODS, LwF
from mas_embed.recognition.heads import check_classes_per_split, check_scores
from mas_embed.recognition.network import head_scores
from mas_embed.runtime.checks import as_number


@METHODS.register("multi_head_lwf")
class MultiHeadLwF(LwF):
    """Learning without Forgetting (Li and Hoiem, ECCV 2016): the old heads answer new images as the old model did.

    When a split ends, a copy of the model becomes the old model. In the next split, with the class scores f_h(x) of the new
    and g_h(x) of the old model at every head h of an earlier split, the following is added to the loss of a batch of N images:
    `strength sum_h 1/N sum_n -sum_c p_hc(x_n) log q_hc(x_n)`, where `p_h = softmax(g_h / T)` and `q_h = softmax(f_h / T)`.
    The head of the current split is not distilled, because the old model never trained it. The splits must be learned in the
    order of the heads.

    The method deviates from Li and Hoiem, who first train the new head alone for some epochs. The old heads move, as theirs do.
    The cost is one more forward pass per batch and the memory of one copy of the model.

    Args:
        model: gives the class scores [N, C] of all heads side by side, as `MultiHeadNet` does.
        classes_per_split: the number of classes of each split, in order; the data set provides it.
        strength: lambda of the paper, >= 0; 0 is plain finetuning.
        temperature: T of the paper, > 0.

    Raises:
        UserError: an option is not accepted; or, in training, the class scores do not have the shape [N, C].
    """

    def __init__(
        self, model: nn.Module, classes_per_split: Sequence[int], *, strength: float = 1.0, temperature: float = 2.0
    ) -> None:
        super().__init__(model, strength=strength)
        self.classes_per_split = check_classes_per_split(classes_per_split)
        self.temperature = as_number("temperature", temperature)
        if self.temperature <= 0:
            raise UserError(f"temperature must be greater than 0, got {temperature}")
        self.num_splits = 0

    def batch_penalty(self, inputs: Any, embeddings: Tensor) -> Tensor | None:
        """`strength` times the cross-entropy of the old heads, from the class scores [N, C] of the batch."""
        if self._old is None or self.strength == 0:
            return None
        check_scores(embeddings, sum(self.classes_per_split))
        pairs = zip(*map(self._old_heads, self._new_and_old(inputs, embeddings)), strict=True)
        return self.strength * torch.stack([F.cross_entropy(new, target.softmax(1)) for new, target in pairs]).sum()

    def consolidate(self, batches: Iterable[Any]) -> None:
        """Ends a split: a copy of the current model becomes the old model. `batches` is not read."""
        super().consolidate(batches)
        self.num_splits += 1

    def _old_heads(self, scores: Tensor) -> list[Tensor]:
        """The scores of every head of an earlier split, divided by the temperature."""
        return head_scores(scores / self.temperature, self.classes_per_split, self.num_splits)

    def _state(self) -> dict[str, Any]:
        """The old model's `state_dict`, and the number of splits that were consolidated."""
        return {**super()._state(), "num_splits": self.num_splits}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        super()._load_state(state)
        self.num_splits = int(state["num_splits"])
