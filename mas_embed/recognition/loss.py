"""The loss multi_head_cross_entropy: every sample is classified by the head of its own split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mas_embed.losses import LOSSES
from mas_embed.recognition.heads import check_labels, check_scores, split_of_classes, without_other_heads


@LOSSES.register("multi_head_cross_entropy")
class MultiHeadCrossEntropy(nn.Module):
    """The cross-entropy of every sample over the classes of its own split, averaged over samples.

    With class scores f(x) and the set H(y) of the classes whose split is that of class y, it is
    `1/N sum_n (log sum_{c in H(y_n)} exp f_c(x_n) - f_{y_n}(x_n))`. For a batch of one split this is the cross-entropy of
    that split's head. In a batch of several splits, as in replay and in joint training, every sample counts equally. Its
    gradient with respect to the scores of all other heads is exactly zero.

    Args:
        classes_per_split: the number of classes of each split, in order; the data set provides it.

    Raises:
        UserError: there is no split, or a split has no class.

    Examples:
        >>> import torch
        >>> loss = MultiHeadCrossEntropy([2, 3])
        >>> print(f"{loss(torch.zeros(1, 5), torch.tensor([1])).item():.4f}")  # log 2: the second head does not matter
        0.6931
    """

    split_of_class: Tensor

    def __init__(self, classes_per_split: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("split_of_class", split_of_classes(classes_per_split))

    def forward(self, scores: Tensor, labels: Tensor, mined: Any = None) -> Tensor:
        """The loss of a batch, a scalar >= 0.

        Args:
            scores: [N, C], those of all heads side by side.
            labels: [N] int64, from 0 to C - 1.
            mined: the output of a miner, which every training loss is called with; this loss does not use it.

        Raises:
            UserError: the scores do not have the shape [N, C], or a label is out of range. Labels are checked on the CPU
                only, because the check would wait for any other device, which raises an indexing error itself.
        """
        num_classes = len(self.split_of_class)
        check_scores(scores, num_classes)
        if labels.device.type == "cpu":
            check_labels(labels, num_classes, of="of a batch")
        return F.cross_entropy(without_other_heads(scores, labels, self.split_of_class), labels)
