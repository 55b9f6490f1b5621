"""Regularisation of recurrent models by masks and by random weights: the methods that the paper compares (Sec. 4.2).

A :class:`Method` says what is dropped, how long each mask lasts, and which weights are random; :class:`Regularized` puts it on any
module with recurrent layers of torch, without touching the module. :data:`CHAR` and :data:`WORD` have the paper's methods by name.
"""

from flipout.regularize.masks import Dropout, EmbeddingDropout, Zoneout
from flipout.regularize.methods import CHAR, TRANSFORMER, WORD, Method
from flipout.regularize.regularized import Regularized

__all__ = ["CHAR", "TRANSFORMER", "WORD", "Dropout", "EmbeddingDropout", "Method", "Regularized", "Zoneout"]
