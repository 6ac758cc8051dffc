"""Races to test: a study's family, laws of losses, and the records of full grids under them."""

import numpy as np

from capgap.records import RunRecord
from capgap.study import Family
from capgap.study.trials import Trial
from study.small import study

WSD = {"tokens_per_step": 512, "lr": 5e-3, "schedule": "wsd", "warmup": "1k", "evaluations": 3}
SIZES = (24, 32, 48, 64, 96, 128)
NANO = {
    "vocabulary": 300,
    "members": [{"hidden": hidden, "neurons": 2 * hidden, "lr": 5e-3} for hidden in SIZES],
    "pretrain": {"tokens": 5_120, "tokens_per_step": 512, "evaluations": 1},
}
RACED = {"nano": NANO, "students": [{"scale": "12k"}], "tokens": ["1x", "3x", "10x"], "distill": WSD}
SCALES = tuple(round(16_000 * 1.65**i) for i in range(8))


def family(**more) -> Family:
    return Family(study(**{**RACED, "grids": [{"race": True}], **more}))


def moving(scale: float, tokens: float) -> float:
    """A law in which a larger teacher starts worse and ends better, up to a point."""
    x = np.log(scale / 15_000)
    return float(3 + (tokens / 12_000) ** -0.5 * (1 + 0.3 * x) + 0.03 * (x - 0.8) ** 2)


def inner(scale: float, tokens: float) -> float:
    """A law whose best teacher is the third or so of a grid at any number of tokens."""
    x = np.log(scale / 15_000)
    return float(3 + (tokens / 12_000) ** -0.5 + 0.05 * (x - 1.1) ** 2)


def noisy(seed: int, noise: float, base=moving):
    rng, drawn = np.random.default_rng(seed), {}

    def law(scale, tokens):
        if (scale, tokens) not in drawn:
            drawn[scale, tokens] = rng.normal(0, noise * (tokens / 1e5) ** -0.25)
        return base(scale, tokens) + drawn[scale, tokens]

    return law


def record_of(trial: Trial, scale: int, law=moving, *, student_scale: int = 12_000) -> RunRecord:
    at = [(trial.tokens * share, 5e-3) for share in (0.25, 0.5, 0.75)] + [(trial.tokens, 0.0)]
    return RunRecord(
        run=trial.name,
        kind="distill",
        student="s12k",
        student_scale=student_scale,
        teacher=trial.teacher,
        teacher_scale=scale,
        start=trial.start,
        start_scale=scale,
        tokens=trial.tokens,
        tokens_taken_over=trial.taken_over,
        seed=trial.seed,
        loss=law(scale, trial.tokens),
        bits_per_byte=1,
        curve=[{"step": 1, "tokens": float(round(t)), "lr": lr, "loss": law(scale, round(t))} for t, lr in at],
        flops=trial.tokens * (2.0 * scale + 6.0 * student_scale),
        seconds=1,
        device="",
        recipe={"schedule": "wsd", "lr": 5e-3},
        recipe_hash="",
        data_hash="",
        versions={},
    )


def grid(scales, law, budgets=(120_000, 360_000, 1_200_000), seed=0) -> list[RunRecord]:
    """The records of a full grid, each run going on from the one of fewer tokens."""
    found = []
    for scale in scales:
        for before, tokens in zip((0, *budgets), budgets, strict=False):
            name = f"t{scale}"
            trial = Trial(name=f"{name}-{tokens}", kind="distill", start=name, teacher=name, seed=seed, tokens=tokens)
            trial = trial.model_copy(update={"taken_over": before * 8 // 10})
            found.append(record_of(trial, scale, law))
    return found
