"""Cuts a student out of a pretrained model."""

from capgap.prune.cut import Keep, cut_model, select
from capgap.prune.importance import Scores, expressiveness
from capgap.prune.shape import solve_shape

__all__ = ["Keep", "Scores", "cut_model", "expressiveness", "select", "solve_shape"]
