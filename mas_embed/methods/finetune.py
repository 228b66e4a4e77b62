"""Finetune: no protection, the lower reference."""

from __future__ import annotations

from mas_embed.methods.base import METHODS, Method


@METHODS.register("finetune")
class Finetune(Method):
    """Trains on every split in turn and protects nothing."""
