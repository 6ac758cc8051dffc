"""What a study will cost, before it starts: trials, tokens, FLOPs, disk, and hours on this device."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil
import torch
from transformers import PretrainedConfig

from capgap import distill
from capgap.cost import count_parameters, flops_per_token, format_bytes, format_count, format_flops
from capgap.models import default_device, new_model
from capgap.recipe import Train
from capgap.records import RunRecord
from capgap.study.family import Family
from capgap.study.race import may_be_stopped
from capgap.study.trials import Trial, training_of, trials_of

_SECONDS = 2.0
"""For which each of the two runs that tell this device's speed is timed."""


@dataclass(frozen=True)
class Cost:
    """What is still to be done of a study.

    Attributes:
        trials: number of trials, by kind; done: those finished before.
        tokens: trained on; flops: teachers included; each without what runs take over from shorter ones.
        disk: bytes of all models, branches and checkpoints, and of packed text as far as it is known.
        hours: of one worker that runs alone on this device; None where that was not measured.
        raced: how many of the trials still to be done a race may stop.
    """

    trials: dict[str, int]
    done: int
    tokens: int
    flops: float
    disk: int
    hours: float | None
    raced: int = 0

    def lines(self, workers: int) -> list[str]:
        kinds = ", ".join(f"{count} to {kind}" for kind, count in self.trials.items())
        lines = [
            f"trials: {sum(self.trials.values())} ({kinds})" + (f", {self.done} of them done" if self.done else ""),
            f"to be trained on: {format_count(self.tokens)} tokens, {format_flops(self.flops)}, teachers included",
            f"disk: about {format_bytes(self.disk)} for models, branches and checkpoints; packed text comes to it",
        ]
        if self.raced:
            lines.append(f"race: all of this is the most it can be; {self.raced} of the trials may be stopped early")
        if self.hours is None:
            return [*lines, "hours: not measured (asked not to, or the largest models do not fit here)"]
        shared = f", about {self.hours / workers:.3g} if {workers} workers are not in each other's way" * (workers > 1)
        return [
            *lines,
            f"hours: about {self.hours:.3g} on this device, one worker, by a short run of two trials{shared}",
        ]


def estimate_study(family: Family, records: list[RunRecord] | None = None, *, measure: bool = True) -> Cost:
    """The cost of what is not done yet.

    Args:
        records: of the trials that are done.
        measure: time the smallest and the largest kind of trial for two seconds each; else the hours are None.
    """
    trials = trials_of(family)
    done = {record.run for record in records or ()}
    todo = [trial for trial in trials if trial.name not in done]
    names = {trial.name for trial in trials}
    tokens = {trial.name: own_tokens(trial, names) for trial in todo}
    flops = {trial.name: _flops_per_token(family, trial) for trial in todo}
    hours = (_hours(family, todo, tokens, flops) if measure else None) if todo else 0.0
    return Cost(
        dict(Counter(trial.kind for trial in trials)),
        len(trials) - len(todo),
        sum(tokens.values()),
        sum(flops[name] * tokens[name] for name in tokens),
        sum(_bytes(family, trial) for trial in todo),
        hours,
        len(may_be_stopped(trials) - done),
    )


def own_tokens(trial: Trial, trials: Collection[str]) -> int:
    """Tokens that a trial is trained on itself, without those taken over from its trunk, if that is of `trials`."""
    return trial.tokens - (trial.taken_over if trial.trunk in trials else 0)


def _student_config(family: Family, trial: Trial) -> PretrainedConfig:
    if trial.member is not None:
        return family.models[trial.member].config
    assert trial.student is not None
    return family.config(trial.student, family.models[trial.start] if trial.start else None)


def _flops_per_token(family: Family, trial: Trial) -> float:
    block = family.spec.data.block
    flops = flops_per_token(_student_config(family, trial), block).training
    return flops + (flops_per_token(family.models[trial.teacher].config, block).forward if trial.teacher else 0.0)


def _bytes(family: Family, trial: Trial) -> int:
    """A model, a branch with AdamW's state, and while it runs checkpoints; the student before training."""
    scale = count_parameters(_student_config(family, trial)).total
    return 4 * scale * (1 + (trial.student is not None) + 3 * (1 + family.spec.distill.keep_checkpoints))


def _hours(family: Family, todo: list[Trial], tokens: dict[str, int], flops: dict[str, float]) -> float | None:
    """By the speed of the cheapest and of the dearest kind of trial, in between on a line in the logarithms."""
    ends = [min(todo, key=lambda t: flops[t.name]), max(todo, key=lambda t: flops[t.name])]
    needed = max(_weights(family, trial) for trial in ends)
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
    if needed > 0.5 * free:
        return None
    speeds = [math.log(_tokens_per_second(family, trial)) for trial in ends]
    work = [math.log(flops[trial.name]) for trial in ends]
    if work[0] == work[1]:
        work[1] += 1.0
    seconds = sum(tokens[t.name] / math.exp(float(np.interp(math.log(flops[t.name]), work, speeds))) for t in todo)
    return seconds / 3600


def _weights(family: Family, trial: Trial) -> int:
    """Bytes of the student with its gradients and AdamW's state, and of the teacher."""
    teacher = family.models[trial.teacher].scale if trial.teacher else 0
    return 16 * count_parameters(_student_config(family, trial)).total + 4 * teacher


def _tokens_per_second(family: Family, trial: Trial) -> float:
    """Of training the trial's student on random ids, with a teacher of random weights."""
    spec = family.spec
    settings: Train = spec.nano.pretrain if trial.kind == "pretrain" and spec.nano else training_of(family, trial)
    student = new_model(_student_config(family, trial), seed=0)
    teacher = distill.OnlineTeacher(new_model(family.models[trial.teacher].config, seed=0)) if trial.teacher else None
    settings = settings.model_copy(update={"checkpoint_every": 1e9, "log_every": 10**9, "trackers": []})
    batches = _Timed(settings, spec.data.block, student.config.vocab_size)
    with TemporaryDirectory() as place:
        run = distill.Run(student.to(default_device()), settings, Path(place) / "run")  # pyright: ignore
        with contextlib.suppress(_TimeIsUp):
            distill.train(run, batches, block=spec.data.block, teacher=teacher, quiet=True)
    return batches.speed()


class _TimeIsUp(Exception):
    pass


class _Timed:
    """Random ids for some seconds, counted from the second step on, as the first step makes much ready."""

    def __init__(self, settings: Train, block: int, vocabulary: int):
        self.blocks, self.block, self.vocabulary = settings.tokens_per_step // block, block, vocabulary
        self.began, self.steps, self.ended = 0.0, -1, 0.0

    def rows(self, step: int, rank: int, world: int) -> torch.Tensor:
        self.ended = time.monotonic()
        self.steps += 1
        if self.steps == 1:
            self.began = self.ended
        if self.steps > 1 and self.ended - self.began > _SECONDS:
            raise _TimeIsUp
        return torch.randint(0, self.vocabulary, (self.blocks, self.block + 1))

    def numbers(self, step: int, rank: int, world: int) -> torch.Tensor:
        return torch.arange(self.blocks)

    def describe(self, step: int) -> str:
        return "random ids"

    def speed(self) -> float:
        return max(1, self.steps - 1) * self.blocks * self.block / max(self.ended - self.began, 1e-9)
