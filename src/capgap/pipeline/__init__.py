"""Stages of a run: each reads folders, writes one folder, and is skipped where that came from the same inputs."""

from capgap.pipeline.caching import cache_stage
from capgap.pipeline.pruning import prune_stage
from capgap.pipeline.run import RunResult, Stage, run_pretrain, run_recipe, student_shape
from capgap.pipeline.shapes import ShapeRow, compare_shapes
from capgap.pipeline.stages import Corpus, open_corpus, score_model_stage, versions
from capgap.pipeline.teachers import Teachers
from capgap.pipeline.training import Training, train_stage, train_stages

__all__ = [
    "Corpus",
    "RunResult",
    "ShapeRow",
    "Stage",
    "Teachers",
    "Training",
    "cache_stage",
    "compare_shapes",
    "open_corpus",
    "prune_stage",
    "run_pretrain",
    "run_recipe",
    "score_model_stage",
    "student_shape",
    "train_stage",
    "train_stages",
    "versions",
]
