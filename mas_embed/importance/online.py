"""`OnlineImportance` accumulates importance from the requests that a deployed model serves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance.checks import check_arguments, check_sums_are_finite
from mas_embed.importance.engine import BatchImportance
from mas_embed.importance.estimate import estimation_settings
from mas_embed.importance.outputs import Output, resolve_output
from mas_embed.importance.parameters import trainable_parameters, zero_sums
from mas_embed.importance.record import Importance
from mas_embed.importance.samples import num_samples_of, take_samples
from mas_embed.runtime.checks import as_number, as_whole_number, check_at_least
from mas_embed.runtime.fingerprint import fingerprint_of
from mas_embed.runtime.forward import Embed, batch_to, device_of, unwrap_compiled
from mas_embed.runtime.modes import eval_mode_with_grad


class OnlineImportance:
    """Accumulates importance from the unlabeled batches that a deployed model is applied to, in bounded memory.

    Call `observe` for each request, in the thread that serves it or in another one that reads from a queue. It works under
    `no_grad` and `inference_mode`. Other threads may use the model at the same time if it is in eval mode; concurrent calls of
    `observe` run one after another. The records of several servers of the same model can be merged exactly:
    `Importance.merge(a.importance(), b.importance())`.

    Args:
        model: the deployed model; its weights must not change while it is observed.
        output: see `estimate_importance`.
        every: 1 uses all samples; k uses one sample in k, counted over all batches, at 1 / k of the cost.
        decay: None gives all samples the same weight. A number in (0, 1) multiplies the weight of all earlier samples each
            time that a batch adds at least one sample.
        embed: see `estimate_importance`.

    Raises:
        UserError: the model has no trainable parameter, or `every` or `decay` is out of range.

    Memory: two float32 copies of the trainable parameters, and the memory of one backward pass of the used samples.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2).eval()
        >>> online = OnlineImportance(model, every=2)
        >>> with torch.inference_mode():
        ...     for request in torch.randn(3, 5, 4):
        ...         answer = model(request)
        ...         online.observe(request)
        >>> online.importance().num_samples  # half of 15, rounded up
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
        every = as_whole_number("every", every)
        check_at_least("every", every, 1)
        if decay is not None and not 0 < as_number("decay", decay) < 1:
            raise UserError(f"decay must lie between 0 and 1, or be None for a mean over all samples, got {decay}")
        self._model, self._prefix = unwrap_compiled(model)
        self._output = resolve_output(output)
        check_arguments(self._model, (), "sample", 1)
        self._every, self._decay = every, decay
        self._lock = threading.Lock()
        self._num_seen = self._num_taken = 0
        self._weight = 0.0
        self._settings = estimation_settings(self._output.name, "sample", 1, embed)
        self._fingerprint = fingerprint_of(self._model)
        with eval_mode_with_grad(self._model):
            self._sums = zero_sums(trainable_parameters(self._model))
            self._batch_importance = BatchImportance(
                self._model, output=self._output, exponent=1, embed=embed, may_swap_parameters=False
            )

    def observe(self, batch: Any) -> None:
        """Adds the importance of a batch; `estimate_importance` describes the accepted batches.

        Raises:
            UserError: `estimate_importance` would refuse the batch, for example because of NaN. The batch is then ignored.
        """
        with self._lock:
            num_samples = num_samples_of(batch)
            indices = [i for i in range(num_samples) if (self._num_seen + i) % self._every == 0]
            if indices:
                self._add(batch if len(indices) == num_samples else take_samples(batch, num_samples, indices))
            self._num_seen += num_samples

    def importance(self) -> Importance:
        """The mean over the samples used so far, which is weighted if there is a decay, and their number.

        Raises:
            UserError: no sample was used yet.
        """
        with self._lock, torch.inference_mode(False):
            if self._num_taken == 0:
                raise UserError("nothing was observed yet; call observe(batch) first")
            scale = self._num_taken / self._weight
            sums = {name: total * scale for name, total in self._sums.items()}
            return Importance(sums, self._num_taken, self._settings, self._fingerprint).renamed(self._prefix)

    def state_dict(self) -> dict[str, Any]:
        """The state from which a restarted process can continue; `torch.load` reads it with `weights_only=True`."""
        with self._lock, torch.inference_mode(False):
            return {
                "sums": {name: total.clone() for name, total in self._sums.items()},
                "num_taken": self._num_taken,
                "num_seen": self._num_seen,
                "weight": self._weight,
                "made with": self._options(),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the state of another process.

        Raises:
            UserError: the state belongs to other weights, was collected with other options, or is not a state of this class.
        """
        _check_state(state)
        made_with = state["made with"]
        for name, value in self._options().items():
            if made_with.get(name) != value:
                raise UserError(
                    f"the state was collected with another {name}: {made_with.get(name)}, not {value}; "
                    "start a new OnlineImportance"
                )
        _check_sums(state["sums"], self._sums)
        with self._lock, torch.inference_mode(False), torch.no_grad():
            for name, total in self._sums.items():
                total.copy_(state["sums"][name])
            self._num_taken, self._num_seen = state["num_taken"], state["num_seen"]
            self._weight = state["weight"]

    def _options(self) -> dict[str, Any]:
        return {
            "fingerprint": self._fingerprint,
            "every": self._every,
            "decay": self._decay,
            "settings": self._settings,
        }

    def _add(self, batch: Any) -> None:
        """Computes the sums of the batch separately first, so that a batch that is refused changes nothing."""
        batch_importance = self._batch_importance
        batch_importance.num_samples = 0
        batch_importance.norms.clear()
        with eval_mode_with_grad(self._model), torch.no_grad():
            for total in batch_importance.sums.values():
                total.zero_()
            with torch.enable_grad():
                batch_importance.add(batch_to(batch, device_of(self._model)))
            check_sums_are_finite(batch_importance.sums)
            for name, total in self._sums.items():
                total.mul_(self._decay or 1.0).add_(batch_importance.sums[name])
        self._weight = (self._decay or 1.0) * self._weight + batch_importance.num_samples
        self._num_taken += batch_importance.num_samples


def _check_state(state: Any) -> None:
    """Raises `UserError` unless the state has the entries of `state_dict`, and counts that are possible."""
    entries = state if isinstance(state, Mapping) else {}
    missing = {"sums", "num_taken", "num_seen", "weight", "made with"} - entries.keys()
    if missing or not isinstance(entries["sums"], Mapping) or not isinstance(entries["made with"], Mapping):
        raise UserError("this is no state of an OnlineImportance; pass the result of its state_dict()")
    for name in ("num_taken", "num_seen"):
        as_whole_number(f"'{name}' of the state", entries[name], 0)
    if as_number("'weight' of the state", entries["weight"]) < 0:
        raise UserError(f"'weight' of the state must be >= 0, got {entries['weight']}")


def _check_sums(saved: Mapping[str, Any], sums: Mapping[str, Tensor]) -> None:
    """Raises `UserError` that names the parameter, unless the saved sums can take the place of the sums."""
    for name, total in sums.items():
        value = saved.get(name)
        has_shape = isinstance(value, Tensor) and value.shape == total.shape
        if value is None or not has_shape or not bool((value.isfinite() & (value >= 0)).all()):
            raise UserError(
                f"the state is damaged: the sum of '{name}' is missing, negative, not finite, or of another shape"
            )
