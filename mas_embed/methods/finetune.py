"""Plain finetuning on one split after another, the lower reference."""

from __future__ import annotations

from mas_embed.methods.base import METHODS, Method


@METHODS.register("finetune")
class Finetune(Method):
    """Trains on one split after another without any protection against forgetting."""
