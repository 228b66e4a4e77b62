"""How old knowledge is kept while new splits are learned: one file a method, by name in `METHODS`."""

from mas_embed.methods.base import METHODS, Method
from mas_embed.methods.elastic import Elastic
from mas_embed.methods.finetune import Finetune
from mas_embed.methods.frozen import Frozen
from mas_embed.methods.mas import MAS

__all__ = ["MAS", "METHODS", "Elastic", "Finetune", "Frozen", "Method"]
