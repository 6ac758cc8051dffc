"""Cuts a student out of a pretrained model."""

from capgap.prune.cut import Keep, LayerChoice, cut_model, select
from capgap.prune.importance import Method, score
from capgap.prune.scores import Scores
from capgap.prune.shape import solve_shape

__all__ = ["Keep", "LayerChoice", "Method", "Scores", "cut_model", "score", "select", "solve_shape"]
