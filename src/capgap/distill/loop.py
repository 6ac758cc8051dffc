"""The training loop, from top to bottom; with a teacher it distils, without one it pretrains.

One process, or one for each device under `torchrun`. Losses are summed over tokens and divided once by the global
number of scored tokens, so that they depend neither on accumulation nor on how many processes there are. Several
students of one teacher may be trained side by side: the teacher runs once for all.
"""

import contextlib
import math
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from capgap.distill.learner import Learner, Run, Trained
from capgap.distill.processes import any_process, rank_and_world, sum_over_processes
from capgap.distill.schedule import Schedule
from capgap.distill.sharding import bfloat16_wanted, place_teacher
from capgap.distill.targets import for_several
from capgap.distill.teacher import OnlineTeacher, Teacher
from capgap.errors import RecipeError
from capgap.models import default_device
from capgap.progress import Bar
from capgap.recipe import Train


class StepBatches(Protocol):
    """What training reads: `capgap.data.Batches` is one."""

    def rows(self, step: int, rank: int, world: int) -> Tensor: ...

    def numbers(self, step: int, rank: int, world: int) -> Tensor: ...

    def describe(self, step: int) -> str: ...


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and wrote a checkpoint first.

    Attributes: step: steps done; terminated: by SIGTERM, as a cluster's scheduler sends it.
    """

    def __init__(self, step: int, steps: int, *, terminated: bool):
        super().__init__(f"stopped at step {step} of {steps}; the same command goes on from there")
        self.step, self.terminated = step, terminated


def train(
    run: Run,
    batches: StepBatches,
    *,
    block: int,
    teacher: Teacher | None = None,
    unscored_id: int | None = None,
    quiet: bool = False,
) -> Trained:
    """Trains one student; see `train_together`."""
    return train_together([run], batches, block=block, teacher=teacher, unscored_id=unscored_id, quiet=quiet)[0]


def train_together(
    runs: Sequence[Run],
    batches: StepBatches,
    *,
    block: int,
    teacher: Teacher | None = None,
    unscored_id: int | None = None,
    quiet: bool = False,
) -> list[Trained]:
    """Trains students side by side on the same batches, each as if it were alone.

    Args:
        runs: equal in tokens_per_step, micro_batch_tokens, seed and precision; one may have more tokens than another.
        batches: ids [blocks, block + 1] of each step; labels are the ids one further on.
        block: tokens of a block.
        teacher: None trains on cross-entropy alone.
        unscored_id: labels of this id, such as the separator between documents, are not scored.
    Returns: what came of each.
    Raises: TrainingError if losses or gradients stay not finite; CheckpointError; RecipeError if the runs do not
        fit together; Stopped on SIGINT or SIGTERM, after a checkpoint.
    """
    rank, world = rank_and_world()
    device = default_device()
    settings = _common(runs)
    schedule = Schedule.of(settings, block)
    step_tokens = schedule.step_tokens
    if isinstance(teacher, OnlineTeacher):
        place_teacher(teacher, settings, device)
    learners = [Learner(run, block=block, device=device, world=world) for run in runs]
    steps = max(learner.steps for learner in learners)
    rows_at_once = max(1, (settings.micro_batch_tokens or 16_384) // block)
    # Under FSDP every process must go through the model equally often; the first has most rows.
    parts_per_step = math.ceil(math.ceil(schedule.blocks_per_step / world) / rows_at_once)
    saved_at = time.monotonic()

    with _stop_requests() as stop, Bar(_title(runs), steps, quiet=quiet) as bar:
        for step in range(min(learner.done for learner in learners), steps):
            began = time.monotonic()
            active = [learner for learner in learners if learner.done == step < learner.steps]
            if not active:
                continue
            ids, numbers = batches.rows(step, rank, world), batches.numbers(step, rank, world)
            inputs, labels = _labelled(ids, unscored_id)
            scored = float(step_tokens)
            if unscored_id is not None:
                scored = max(1.0, sum_over_processes(float((labels >= 0).sum()))[0])
            for part in range(parts_per_step):
                rows = slice(part * rows_at_once, (part + 1) * rows_at_once)
                input_BL, label_BL, block_B = inputs[rows], labels[rows], numbers[rows]
                if not len(input_BL):  # a process without rows goes along with a block that is not scored
                    input_BL, label_BL = torch.zeros(1, block).long(), torch.full((1, block), -100)
                    block_B = torch.zeros(1).long()
                input_BL, label_BL = input_BL.to(device), label_BL.to(device)
                with _autocast(settings, device):
                    targets = None if teacher is None else teacher.targets(input_BL, block_B)
                    targets = for_several(targets) if len(active) > 1 else targets
                    for learner in active:
                        # Dropout, where a model has it, draws the same numbers whoever trains beside it.
                        torch.manual_seed(((settings.seed * 1_000_003 + step) * world + rank) * parts_per_step + part)
                        last = part == parts_per_step - 1
                        learner.learn(input_BL, label_BL, targets, scored=scored, last=last)
            row = {}
            for learner in active:
                row = learner.step(scored, lambda step=step: batches.describe(step))
                learner.seconds += (time.monotonic() - began) / len(active)
                learner.checkpoints.settle()
            bar.to(step + 1, _note(row, teacher))
            stopping = any_process(stop.requested)
            due = any_process(time.monotonic() - saved_at >= settings.checkpoint_every)
            for learner in active:
                learner.save_branch()
                ends_first = learner.done == learner.steps < steps
                if stopping or due or ends_first or (learner.is_best and learner.done < learner.steps):
                    learner.save()
            saved_at = time.monotonic() if due else saved_at
            if stopping:
                for learner in learners:
                    learner.close()
                raise Stopped(step + 1, steps, terminated=stop.terminated)
    return [learner.end() for learner in learners]


def _common(runs: Sequence[Run]) -> Train:
    """What the runs share. Raises RecipeError where they differ in it."""
    first = runs[0].settings
    shared = ("tokens_per_step", "micro_batch_tokens", "seed", "precision", "parallel", "checkpoint_every")
    for run in runs[1:]:
        for key in shared:
            if getattr(run.settings, key) != getattr(first, key):
                raise RecipeError(
                    f"{run.title}: {key} = {getattr(run.settings, key)}, but {runs[0].title} beside it has "
                    f"{getattr(first, key)}; students trained side by side must agree in it"
                )
    return first


def _title(runs: Sequence[Run]) -> str:
    return runs[0].title if len(runs) == 1 else f"{runs[0].title} and {len(runs) - 1} more"


def _note(row: dict[str, float], teacher: Teacher | None) -> str:
    note = f"CE {row['ce']:.3f}" if "ce" in row else ""
    note += f" KL {row['kl']:.3f}" if "kl" in row and teacher is not None else ""
    return note + (f" {row['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in row else "")


def _labelled(ids: Tensor, unscored_id: int | None) -> tuple[Tensor, Tensor]:
    """Inputs and labels [B, L] of blocks [B, L + 1]; labels that are not scored are -100."""
    labels = ids[:, 1:]
    if unscored_id is not None:
        labels = labels.masked_fill(labels == unscored_id, -100)
    return ids[:, :-1], labels


def _autocast(settings: Train, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16_wanted(settings.precision, device))


class _Stop:
    requested = False
    terminated = False


@contextlib.contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """Remembers SIGINT and SIGTERM until the step is done; a second SIGINT stops at once."""
    stop = _Stop()

    def ask(number: int, _: Any) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested, stop.terminated = True, number == signal.SIGTERM

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: whoever runs it there handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
