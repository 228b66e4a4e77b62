"""Importance of a model that serves: what it is asked, it should not forget."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance.checks import check_arguments, check_finite
from mas_embed.importance.engine import BatchImportance
from mas_embed.importance.estimate import describe
from mas_embed.importance.fallback import take_samples
from mas_embed.importance.outputs import Output, resolve_output
from mas_embed.importance.parameters import trainable_parameters, zero_sums
from mas_embed.importance.record import Importance
from mas_embed.runtime.fingerprint import fingerprint_of
from mas_embed.runtime.forward import Embed, batch_to, device_of, map_tensors, unwrap_compiled
from mas_embed.runtime.modes import eval_mode_with_grad


class OnlineImportance:
    """Accumulates importance from the batches that a deployed model is applied to: unlabeled, in bounded memory.

    Call `observe` beside each request, on the hot path or off it (a queue and a thread). The caller may be under `no_grad` or
    `inference_mode`. Other threads may use the model meanwhile if it is in eval mode; observations wait for one another.
    Records of several servers of one model join exactly: `Importance.merge(a.importance(), b.importance())`.

    Args:
        model: the deployed model; its weights must not change while it is observed.
        output: see `estimate_importance`.
        every: take one sample in so many, counted over all batches: 1 takes all, 100 a hundredth of the cost.
        decay: None weighs all samples alike. A number in (0, 1): what was observed before counts that many times as much with
            every batch of which a sample is taken.
        embed: see `estimate_importance`.

    Raises:
        UserError: no trainable parameter, or `every` or `decay` out of range.

    Memory: two float32 copies of the trainable parameters, and what one backward pass of the taken samples needs.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2).eval()
        >>> online = OnlineImportance(model, every=2)
        >>> with torch.inference_mode():
        ...     for request in torch.randn(3, 5, 4):
        ...         answer = model(request)
        ...         online.observe(request)
        >>> online.importance().num_samples  # of 15
        8
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        output: str | Output | Callable[[Tensor, Any], Tensor] = "squared_norm",
        every: int = 1,
        decay: float | None = None,
        embed: Embed | str | None = None,
    ) -> None:
        if every < 1:
            raise UserError(f"every must be at least 1, got {every}")
        if decay is not None and not 0 < decay < 1:
            raise UserError(f"decay must lie between 0 and 1, or be None for a mean over all samples, got {decay}")
        self._model, self._prefix = unwrap_compiled(model)
        self._output = resolve_output(output)
        check_arguments(self._model, (), "sample", 1)
        self._every, self._decay = every, decay
        self._lock = threading.Lock()
        self._num_seen = self._num_taken = 0
        self._weight = 0.0
        self._settings = describe(self._output.name, "sample", 1, embed)
        self._fingerprint = fingerprint_of(self._model)
        with eval_mode_with_grad(self._model):
            self._sums = zero_sums(trainable_parameters(self._model))
            self._newest = BatchImportance(
                self._model, output=self._output, exponent=1, embed=embed, may_swap_parameters=False
            )

    def observe(self, batch: Any) -> None:
        """Takes notice of a batch that the model was, or will be, applied to; see `estimate_importance` for its form.

        Raises:
            UserError: as `estimate_importance`, for example for NaN; what was observed before is untouched then.
        """
        with self._lock:
            num_samples = _num_samples(batch)
            taken = [i for i in range(num_samples) if (self._num_seen + i) % self._every == 0]
            if taken:
                self._add(batch if len(taken) == num_samples else take_samples(batch, num_samples, taken))
            self._num_seen += num_samples

    def importance(self) -> Importance:
        """What was observed so far; under decay the weighted mean, with the number of samples that were taken.

        Raises:
            UserError: nothing was observed yet.
        """
        with self._lock, torch.inference_mode(False):
            if self._num_taken == 0:
                raise UserError("nothing was observed yet; call observe(batch) first")
            scale = self._num_taken / self._weight
            sums = {name: total * scale for name, total in self._sums.items()}
            return Importance(sums, self._num_taken, self._settings, self._fingerprint).renamed(self._prefix)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restarted process needs to go on: tensors and numbers, which `torch.load` reads safely."""
        with self._lock, torch.inference_mode(False):
            return {
                "sums": {name: total.clone() for name, total in self._sums.items()},
                "num_taken": self._num_taken,
                "num_seen": self._num_seen,
                "weight": self._weight,
                "made with": self._made_with(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another process stopped.

        Raises:
            UserError: the state is of other weights, or was observed with other options.
        """
        for name, value in self._made_with().items():
            if state["made with"][name] != value:
                raise UserError(
                    f"the state was observed at another {name} than this one has ({state['made with'][name]}, not {value}); "
                    "start a new OnlineImportance"
                )
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for name, total in self._sums.items():
                total.copy_(state["sums"][name])
            self._num_taken, self._num_seen = state["num_taken"], state["num_seen"]
            self._weight = state["weight"]

    def _made_with(self) -> dict[str, Any]:
        return {
            "fingerprint": self._fingerprint,
            "every": self._every,
            "decay": self._decay,
            "settings": self._settings,
        }

    def _add(self, batch: Any) -> None:
        """Adds to a set of sums of its own first, so that a batch that is refused spoils nothing."""
        newest = self._newest
        newest.num_samples = 0
        newest.lengths.clear()
        with eval_mode_with_grad(self._model), torch.no_grad():
            for total in newest.sums.values():
                total.zero_()
            with torch.enable_grad():
                newest.add(batch_to(batch, device_of(self._model)))
            check_finite(newest.sums)
            for name, total in self._sums.items():
                total.mul_(self._decay or 1.0).add_(newest.sums[name])
        self._weight = (self._decay or 1.0) * self._weight + newest.num_samples
        self._num_taken += newest.num_samples


def _num_samples(batch: Any) -> int:
    """The size of the first dimension of the batch's first tensor."""
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(len(tensor) if tensor.ndim else 1)
        return tensor

    map_tensors(note, batch)
    if not sizes:
        raise UserError("a batch must hold a tensor with the samples in its first dimension")
    return sizes[0]
