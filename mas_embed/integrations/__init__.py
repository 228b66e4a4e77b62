"""Continual learning in training pipelines of other libraries: one module for each library, imported only when it is used."""
