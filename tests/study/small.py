"""Studies small enough to run in a test, and a queue's helpers."""

from typing import Any

from capgap.recipe import check
from capgap.study import Queue, StudySpec


def study(**more: Any) -> StudySpec:
    """Two members (t30.2k, t60.7k), one student of a fixed scale, few tokens of the standard library."""
    tree: dict[str, Any] = {
        "data": {
            "train": {"python_stdlib": True, "part": "train"},
            "held_out": {"python_stdlib": True, "part": "held-out"},
            "block": 64,
        },
        "nano": {
            "vocabulary": 300,
            "members": [{"hidden": 32, "neurons": 64, "lr": 5e-3}, {"hidden": 48, "neurons": 96, "lr": 5e-3}],
            "pretrain": {"tokens": 5_120, "tokens_per_step": 512, "evaluations": 1},
        },
        "students": [{"scale": "15k"}],
        "prune": {"calibration_tokens": 2048},
        "distill": {"tokens": 5_120, "tokens_per_step": 512, "lr": 5e-3, "evaluations": 1},
        "evaluate": {"tokens": 2_000},
        "train_tokens": 20_000,
    }
    return check({**tree, **more}, StudySpec, "test")


def states(queue: Queue) -> dict[str, str]:
    return {row.user_attrs["name"]: row.state.name.lower() for row in queue.rows()}
