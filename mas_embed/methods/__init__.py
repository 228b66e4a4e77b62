"""Methods of continual learning, which reduce the forgetting of earlier splits, by name in `METHODS`. One file per method."""

from mas_embed.methods.base import METHODS, Loss, Method
from mas_embed.methods.class_statistics import ClassStatistics
from mas_embed.methods.combine import Combine
from mas_embed.methods.elastic import Elastic
from mas_embed.methods.ewc import EWC
from mas_embed.methods.finetune import Finetune
from mas_embed.methods.fisher import estimate_fisher
from mas_embed.methods.frozen import Frozen
from mas_embed.methods.imm import IMM
from mas_embed.methods.joint import Joint
from mas_embed.methods.local_mas import LocalMAS
from mas_embed.methods.lwf import LwF
from mas_embed.methods.mas import MAS
from mas_embed.methods.replay import Replay
from mas_embed.methods.si import SI
from mas_embed.methods.state_file import load_method, save_method

__all__ = [
    "EWC",
    "IMM",
    "MAS",
    "METHODS",
    "SI",
    "ClassStatistics",
    "Combine",
    "Elastic",
    "Finetune",
    "Frozen",
    "Joint",
    "LocalMAS",
    "Loss",
    "LwF",
    "Method",
    "Replay",
    "estimate_fisher",
    "load_method",
    "save_method",
]
