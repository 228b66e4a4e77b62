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
from mas_embed.models.trunks import load_model_weights, read_weights, without_reading_weights

__all__ = [
    "MODELS",
    "PREPROCESSING",
    "Backbone",
    "EmbeddingNet",
    "SentenceEncoder",
    "WordVectorTransformer",
    "backbone",
    "load_model_weights",
    "preprocessing_of",
    "read_weights",
    "sentence_transformer",
    "small_conv",
    "without_reading_weights",
    "word_vector_transformer",
]
