"""Embedding networks, by name in `MODELS`."""

from mas_embed.models.backbone import Backbone, backbone
from mas_embed.models.embedding_net import MODELS, EmbeddingNet, small_conv
from mas_embed.models.preprocessing import PREPROCESSING, preprocessing_of
from mas_embed.models.sentence_encoder import (
    SentenceEncoder,
    WordVectorTransformer,
    sentence_transformer,
    word_vector_transformer,
)

__all__ = [
    "MODELS",
    "PREPROCESSING",
    "Backbone",
    "EmbeddingNet",
    "SentenceEncoder",
    "WordVectorTransformer",
    "backbone",
    "preprocessing_of",
    "sentence_transformer",
    "small_conv",
    "word_vector_transformer",
]
