"""Fact learning as a plug-in: its data sets, networks, loss, metrics and evaluator.

Importing this package registers its components. No other part of mas-embed imports it: like the components of any other
package, it is loaded through the entry-point group `mas_embed.components`.
"""

from mas_embed.facts.digits import fact_digits
from mas_embed.facts.evaluator import FACT_METRICS, FactEvaluator, score_facts
from mas_embed.facts.fact_list import read_fact_list
from mas_embed.facts.loss import FactLoss, fact_loss
from mas_embed.facts.metrics import evaluate_fact_recognition, evaluate_fact_retrieval
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
