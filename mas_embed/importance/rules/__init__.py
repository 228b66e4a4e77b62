"""Exact rules, one module a layer family; importing the package registers them all."""

from mas_embed.importance.rules import activation, convolution, linear, lookup, normalization
from mas_embed.importance.rules.registry import RULES, Rule, rule, rule_of

__all__ = ["RULES", "Rule", "activation", "convolution", "linear", "lookup", "normalization", "rule", "rule_of"]
