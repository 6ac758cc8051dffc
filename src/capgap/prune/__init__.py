"""Cuts a student out of a pretrained model."""

from capgap.prune.cut import Keep, LayerChoice, cut_model, select
from capgap.prune.importance import Method, score
from capgap.prune.probe import Place, Probe
from capgap.prune.repair import Repair, repair
from capgap.prune.scores import Scores
from capgap.prune.shape import Preference, list_shapes, solve_shape
from capgap.prune.stream import cut_folder
from capgap.prune.without import losses_without

__all__ = [
    "Keep",
    "LayerChoice",
    "Method",
    "Place",
    "Preference",
    "Probe",
    "Repair",
    "Scores",
    "cut_folder",
    "cut_model",
    "list_shapes",
    "losses_without",
    "repair",
    "score",
    "select",
    "solve_shape",
]
