"""Fact learning, complete: data, networks, loss, measures and evaluator.

A plug-in: importing this package registers its components, and nothing else in mas-embed imports it. It comes in through the
entry-point group `mas_embed.components`, as components of other packages do.
"""

from mas_embed.facts.digits import fact_digits
from mas_embed.facts.evaluator import FACT_METRICS, FactEvaluator, score_facts
from mas_embed.facts.image_list import read_fact_list
from mas_embed.facts.loss import FactLoss, fact_loss
from mas_embed.facts.measures import evaluate_fact_recognition, evaluate_fact_retrieval
from mas_embed.facts.networks import FactNet, sherlock, small_fact_conv, two_branch
from mas_embed.facts.release import read_fact_release
from mas_embed.facts.table import FactSequence, FactTable, assign_facts, make_fact_table
from mas_embed.facts.word_vectors import read_word_vectors

__all__ = [
    "FACT_METRICS",
    "FactEvaluator",
    "FactLoss",
    "FactNet",
    "FactSequence",
    "FactTable",
    "assign_facts",
    "evaluate_fact_recognition",
    "evaluate_fact_retrieval",
    "fact_digits",
    "fact_loss",
    "make_fact_table",
    "read_fact_list",
    "read_fact_release",
    "read_word_vectors",
    "score_facts",
    "sherlock",
    "small_fact_conv",
    "two_branch",
]
