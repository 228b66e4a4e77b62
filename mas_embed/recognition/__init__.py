"""Object recognition as a plug-in: sequences of data sets with one classification head for each on a shared trunk.

Importing this package registers its components. No other part of mas-embed imports it: like the components of any other
package, it is loaded through the entry-point group `mas_embed.components`.
"""

from mas_embed.recognition.evaluator import RECOGNITION_METRICS, RecognitionDetails, RecognitionEvaluator
from mas_embed.recognition.loss import MultiHeadCrossEntropy
from mas_embed.recognition.lwf import MultiHeadLwF
from mas_embed.recognition.network import ClassHeads, MultiHeadNet, multi_head
from mas_embed.recognition.sequence import recognition

__all__ = [
    "RECOGNITION_METRICS",
    "ClassHeads",
    "MultiHeadCrossEntropy",
    "MultiHeadLwF",
    "MultiHeadNet",
    "RecognitionDetails",
    "RecognitionEvaluator",
    "multi_head",
    "recognition",
]
