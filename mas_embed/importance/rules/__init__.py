"""Exact rules, one module a layer family; importing the package registers them all."""

from mas_embed.importance.rules import convolution, linear, normalization
from mas_embed.importance.rules.registry import RULES, Rule, rule, rule_of

__all__ = ["RULES", "Rule", "convolution", "linear", "normalization", "rule", "rule_of"]
