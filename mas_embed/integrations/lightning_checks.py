"""What `MethodCallback` of Lightning refuses when `fit` starts, because it could not serve it exactly."""

from __future__ import annotations

from typing import Any

from torch.optim import LBFGS

from mas_embed import Method, UserError

_SHARDED = {"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy", "XLAFSDPStrategy"}
# Callbacks that replace the weights when training ends
_AVERAGING = {"StochasticWeightAveraging", "WeightAveraging"}


def check_trainer(trainer: Any, pl_module: Any) -> None:
    """Raises `UserError` if the gradients of a step are not complete and whole in `on_before_optimizer_step`."""
    if not pl_module.automatic_optimization:
        raise UserError(
            "MethodCallback needs automatic optimization, because in manual optimization the module clips gradients and steps "
            "its optimizers by itself; call the hooks of the method in training_step, as in a plain loop"
        )
    if sharded := _SHARDED & {cls.__name__ for cls in type(trainer.strategy).__mro__}:
        raise UserError(
            f"MethodCallback needs every parameter whole on each device, but {sharded.pop()} shards them; train with "
            "strategy='ddp' or on one device"
        )
    if "MultiProcessing" in type(trainer.strategy.launcher).__name__:
        raise UserError(
            "the trainer starts its processes by spawn or fork and drops the state of callbacks when they end; train with "
            "strategy='ddp'"
        )


def check_order(callback: Any, trainer: Any) -> None:
    """Raises `UserError` if a callback would change the weights after the method has stored them as the anchor."""
    later = trainer.callbacks[trainer.callbacks.index(callback) + 1 :]
    if found := [item for item in later if _AVERAGING & {cls.__name__ for cls in type(item).__mro__}]:
        raise UserError(
            f"{type(found[0]).__name__} changes the weights when training ends; put it before MethodCallback in the list of "
            "callbacks, so that the method sees the final weights"
        )


def check_optimizers(trainer: Any) -> None:
    """Raises `UserError` for optimizers that evaluate the loss by themselves, or unscale gradients by themselves."""
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, LBFGS):
            raise UserError(
                "LBFGS needs the penalty in the loss, which MethodCallback does not add; take another optimizer"
            )
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if is_scaled and any(group.get("fused") for group in optimizer.param_groups):
            raise UserError(
                f"under precision='16-mixed', a fused {type(optimizer).__name__} unscales gradients after the penalty is added; "
                "take fused=False, or precision='bf16-mixed'"
            )


def check_method(method: Method, trainer: Any, pl_module: Any) -> None:
    """Raises `UserError` if the method protects another model, or cannot be served with this module or trainer."""
    trained = {id(parameter) for parameter in pl_module.parameters()}
    if any(id(parameter) not in trained for parameter in method.model.parameters()):
        raise UserError(
            f"{method.name} was made with a {type(method.model).__name__} that is not part of the {type(pl_module).__name__} "
            "that is trained; make the method with the module or with a module inside it"
        )
    if trainer.world_size > 1 and method.keeps != "nothing":
        raise UserError(
            f"{method.name} stores {method.keeps}, which every process would have of its own items only; train in one process"
        )
    if method.batch_hooks and "training_step" in vars(pl_module):  # where Lightning puts the compiled one
        raise UserError(
            f"{method.name} needs {', '.join(sorted(method.batch_hooks))} in a training_step that is not compiled; compile a "
            "module inside the LightningModule instead of the LightningModule"
        )
