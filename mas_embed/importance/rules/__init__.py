"""Exact rules for the importance of a layer's parameters, one module per layer family; importing this package registers them."""

from mas_embed.importance.rules import activation, convolution, linear, lookup, normalization
from mas_embed.importance.rules.registry import RULES, Rule, rule, rule_of

__all__ = ["RULES", "Rule", "activation", "convolution", "linear", "lookup", "normalization", "rule", "rule_of"]
