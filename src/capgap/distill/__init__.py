"""Trains students from a teacher's distribution, or without a teacher."""

from capgap.distill.cache import CachedTeacher
from capgap.distill.divergences import Divergence
from capgap.distill.fused import Mix, Sums, fused_loss
from capgap.distill.hidden import HiddenLoss
from capgap.distill.learner import Run, Trained
from capgap.distill.loop import Stopped, train, train_together
from capgap.distill.objective import Objective
from capgap.distill.processes import (
    first_process_first,
    first_process_says,
    is_first_process,
    rank_and_world,
    sum_over_processes,
    wait_for_all,
)
from capgap.distill.schedule import Schedule
from capgap.distill.sharding import bfloat16_wanted, shard, whole_weights
from capgap.distill.teacher import OnlineTeacher, Teacher

__all__ = [
    "CachedTeacher",
    "Divergence",
    "HiddenLoss",
    "Mix",
    "Objective",
    "OnlineTeacher",
    "Run",
    "Schedule",
    "Stopped",
    "Sums",
    "Teacher",
    "Trained",
    "bfloat16_wanted",
    "first_process_first",
    "first_process_says",
    "fused_loss",
    "is_first_process",
    "rank_and_world",
    "shard",
    "sum_over_processes",
    "train",
    "train_together",
    "wait_for_all",
    "whole_weights",
]
