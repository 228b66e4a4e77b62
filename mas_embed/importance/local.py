"""Local MAS: importance from the inputs and outputs of each layer, without a backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mas_embed.errors import UserError
from mas_embed.importance.checks import check_arguments, check_num_samples
from mas_embed.importance.estimate import estimation_settings
from mas_embed.importance.parameters import trainable_parameters, zero_sums
from mas_embed.importance.record import Importance
from mas_embed.importance.rules import rule_of
from mas_embed.runtime.distributed import sum_over_processes
from mas_embed.runtime.fingerprint import fingerprint_of
from mas_embed.runtime.forward import Embed, batch_to, device_of, embed_batch, unwrap_compiled
from mas_embed.runtime.modes import eval_mode
from mas_embed.runtime.progress import with_progress

LOCAL_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def estimate_local_importance(
    model: nn.Module, batches: Iterable[Any], *, embed: Embed | str | None = None, progress: bool = False
) -> Importance:
    """Estimates the Hebbian importance of l-MAS, `Omega_ij = 1/N sum_n |sum_t x_i^(n,t) y_j^(n,t)|`, `y = relu(W x + b)`.

    This is the gradient of the squared norm of the layer's output after a ReLU, without the factor 2. x is the input of the
    layer (1 for a bias), and t runs over the positions of a sample (of an image or a sequence). In a ReLU network the inputs
    are not negative, and the absolute value changes nothing. The result contains the parameters of linear layers and
    convolutions only. If a layer runs several times, its runs are added. Only forward passes are needed.

    Args:
        model: a module that embeds a batch as [N, D].
        batches: see `estimate_importance`.
        embed: replaces `model(input)`, see `estimate_importance`.
        progress: whether to show a progress bar.

    Returns:
        The importance by parameter name, with values >= 0.

    Raises:
        UserError: there are no batches; no linear layer or convolution is trainable; or the first dimension of the input of
            such a layer is not the samples.

    Source: Aljundi et al., *Memory Aware Synapses*, ECCV 2018, section 4.3.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 2.0]]))
        >>> inputs = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # y is 3 and relu(-1) = 0
        >>> estimate_local_importance(model, [inputs])["weight"]
        tensor([[1.5000, 1.5000]])
    """
    model, prefix = unwrap_compiled(model)
    check_arguments(model, batches, "sample", 1)
    names = {parameter: name for name, parameter in trainable_parameters(model).items()}
    layers = [layer for layer in model.modules() if isinstance(layer, LOCAL_LAYERS) and rule_of(layer) is not None]
    sums = zero_sums({names[p]: p for layer in layers for p in layer.parameters(recurse=False) if p in names})
    if not sums:
        raise UserError(
            "the model has no trainable linear layer or convolution; local importance is defined for these layers only"
        )
    num_samples = 0
    with eval_mode(model), _recorded_runs(layers, names) as runs:
        for index, batch in enumerate(with_progress(batches, "importance" if progress else None)):
            try:
                num_in_batch = len(embed_batch(model, batch_to(batch, device_of(model)), embed))
            except UserError as error:
                raise UserError(f"batch {index}: {error}") from error.__cause__
            for run in runs:
                _check_rows(run, num_in_batch)
                for name, total in run.sums.items():
                    sums[names[getattr(run.layer, name)]] += total
            runs.clear()
            num_samples += num_in_batch
    num_samples = sum_over_processes(sums, num_samples)
    check_num_samples(num_samples)
    return Importance(
        sums, num_samples, estimation_settings("local", "sample", 1, embed), fingerprint_of(model)
    ).renamed(prefix)


class _Run(NamedTuple):
    """One run of a layer: the first dimension of its input, and the sums over it by the parameter names within the layer."""

    layer: nn.Module
    num_rows: int
    sums: dict[str, Tensor]


@contextmanager
def _recorded_runs(layers: Iterable[nn.Module], names: Mapping[nn.Parameter, str]) -> Iterator[list[_Run]]:
    """Records every run of the layers within the context, for the parameters in `names`."""
    runs: list[_Run] = []

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        # Computed at once, because later operations may modify input and output in place
        layer_input, rule = args[0] if args else kwargs["input"], rule_of(layer)
        assert rule is not None
        trainable = [name for name, parameter in layer.named_parameters(recurse=False) if parameter in names]
        runs.append(_Run(layer, len(layer_input), rule.function(layer, layer_input, output.relu(), 1, trainable)))

    handles = [layer.register_forward_hook(record, prepend=True, with_kwargs=True) for layer in layers]
    try:
        yield runs
    finally:
        for handle in handles:
            handle.remove()


def _check_rows(run: _Run, num_samples: int) -> None:
    if run.num_rows != num_samples:
        raise UserError(
            f"the input of a {type(run.layer).__name__} layer has {run.num_rows} rows for {num_samples} samples; keep the "
            "samples in the first dimension, so that it is known which rows belong to which sample"
        )
