"""One student in training: its objective, optimiser, checkpoints and curve."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from capgap.distill.checkpoint import Checkpoints
from capgap.distill.divergences import Divergence
from capgap.distill.fused import Mix
from capgap.distill.hidden import HiddenLoss
from capgap.distill.meter import Meter
from capgap.distill.objective import Objective
from capgap.distill.processes import is_first_process, sum_over_processes
from capgap.distill.schedule import Schedule
from capgap.distill.sharding import place_student, set_gradient_sync
from capgap.distill.targets import Targets
from capgap.errors import CheckpointError, TrainingError
from capgap.files import hash_of
from capgap.progress import say
from capgap.recipe import Train
from capgap.trackers import open_trackers


class Scored(Protocol):
    """A held-out score; `capgap.evaluate.Score` is one."""

    @property
    def loss(self) -> float: ...


Nats = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Run:
    """One student to train.

    Attributes:
        student: trained in place.
        settings: of the loop.
        folder: for its checkpoints; training goes on from the newest one there. Trackers write beside it.
        inputs: JSON-like, whatever identifies student, teacher and data; a checkpoint of other inputs is refused.
        evaluate: gives the held-out score from a function of input and label ids to summed nats; called before the
            first step and settings.evaluations times, evenly spread, the last at the end.
        title: its name on the bar.
        hidden: the loss between layers of student and teacher, if one is wanted; settings.hidden_weight weighs it.
        flops_per_token: of student and teacher, for the utilisation.
        branch: a folder for the state at `Schedule.branches_at`, from which a run of more tokens can go on.
        trunk: the `branch` of a run of fewer tokens; where there is one, its steps are not done again.
    """

    student: PreTrainedModel
    settings: Train
    folder: Path
    inputs: Any = None
    evaluate: Callable[[Nats], Scored] | None = None
    title: str = "training"
    hidden: HiddenLoss | None = None
    flops_per_token: float | None = None
    branch: Path | None = None
    trunk: Path | None = None


@dataclass(frozen=True)
class Trained:
    """What came of training.

    Attributes:
        curve: rows of step, tokens and what was measured there.
        seconds: wall-clock, without the steps taken over; tokens: trained on.
        tokens_taken_over: of those, the ones that a shorter run was trained on for both.
        skipped: steps left out as their gradients were not finite.
        start_loss: held-out nats per token before the first step; score: the held-out score at the end.
    """

    curve: list[dict[str, float]]
    seconds: float
    tokens: int
    tokens_taken_over: int
    skipped: int
    start_loss: float | None
    score: Any


class Learner:
    """A Run at work. The loop calls `learn` for each part of a batch, then `step`."""

    def __init__(self, run: Run, *, block: int, device: torch.device, world: int):
        settings = run.settings
        self.run, self.world, self._block = run, world, block
        self.schedule = Schedule.of(settings, block)
        self.steps = steps = self.schedule.steps
        divergence = Divergence(settings.divergence, settings.mix)
        compiled = device.type == "cuda" if settings.compile == "auto" else settings.compile
        mix = Mix(divergence, settings.kd_weight, settings.temperature, settings.chunk_tokens, compiled)
        run.student.train()
        self.objective = Objective(run.student, mix, run.hidden, settings.hidden_weight)
        self.model = place_student(self.objective, settings, device)
        self.optimizer = _optimizer(self.objective, settings)
        identity = hash_of({"settings": settings.identity(), "block": block, "inputs": run.inputs})
        self.checkpoints = Checkpoints(
            run.folder, identity=identity, keep=settings.keep_checkpoints, asynchronous=settings.async_checkpoints
        )
        facts = self.checkpoints.load_newest(self.objective, self.optimizer) or self._from_trunk()
        self.done: int = facts.get("step", 0)
        self.taken_over: int = facts.get("taken_over", 0)
        self.curve: list[dict[str, float]] = facts.get("curve", [])
        self.seconds: float = facts.get("seconds", 0.0)
        self.skipped: int = facts.get("skipped", 0)
        self.skipped_in_a_row: int = facts.get("skipped_in_a_row", 0)
        self.start_loss: float | None = facts.get("start_loss")
        self.score: Any = None
        self._evaluate_at = {round(steps * (i + 1) / settings.evaluations) for i in range(settings.evaluations)}
        self._meter = Meter(run.flops_per_token, device, world)
        self._sums: list[Tensor] = []
        self.tracker = open_trackers(
            settings.trackers if is_first_process() else (),
            run.folder.parent / "trackers",
            run=run.title,
            settings=settings.model_dump(mode="json"),
            start_step=self.done,
        )
        if self.done == 0 and run.evaluate is not None:
            self.start_loss = self._evaluate().loss
        self.save_branch()

    def _from_trunk(self) -> dict[str, Any]:
        """The state at which a shorter run left this one's way, if there is one."""
        trunk = None if self.run.trunk is None else self._branch(self.run.trunk)
        facts = trunk.load_newest(self.objective, self.optimizer) if trunk else None
        if facts is None:
            return {}
        if facts["step"] > (self.schedule.branches_at or 0):
            raise CheckpointError(
                f"{self.run.trunk}: a run of {facts['step']} equal steps, but this one shares only "
                f"{self.schedule.branches_at or 0}; it must be the longer of the two"
            )
        return {**facts, "taken_over": facts["step"], "seconds": 0.0}

    def _branch(self, folder: Path) -> Checkpoints:
        identity = hash_of({"trunk": self.schedule.trunk, "block": self._block, "inputs": self.run.inputs})
        return Checkpoints(folder, identity=identity, keep=1)

    def learn(self, input_BL: Tensor, label_BL: Tensor, targets: Targets | None, *, scored: float, last: bool) -> None:
        """Adds one part's gradients.

        Args:
            scored: tokens of the whole step, of all processes, that the loss is divided by.
            last: of this step's parts, so that gradients are summed over the processes.
        """
        set_gradient_sync(self.model, last)
        loss, ce, kl = self.model(input_BL, label_BL, targets)
        # DDP and FSDP average over processes; the sum is wanted, divided once by all tokens.
        (loss * (self.world / scored)).backward()
        self._sums.append(torch.stack([ce, kl]))

    def step(self, scored: float, where: Callable[[], str]) -> dict[str, float]:
        """Ends a step: clips, updates, measures; skips it where loss or gradient is not finite.

        Args:
            where: says what the batch was made of, for an error.
        Returns: the row of this step.
        Raises: TrainingError if too many steps in a row had to be skipped.
        """
        settings, number = self.run.settings, self.done
        lr = self.schedule.lr(number)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        ce, kl = sum_over_processes(*torch.stack(self._sums).sum(0).tolist())
        ce, kl = ce / scored, kl / scored
        self._sums.clear()
        norm = _clip(self.objective, settings.clip)
        if all(map(math.isfinite, (ce, kl, norm))):
            self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self._skip(number, f"CE {ce}, KL {kl}, gradient norm {norm}", where)
        self.optimizer.zero_grad(set_to_none=True)
        self.done = number + 1
        self._meter.add(self.schedule.step_tokens)
        row = {
            "step": self.done,
            "tokens": self.done * self.schedule.step_tokens,
            "ce": ce,
            "kl": kl,
            "lr": lr,
            "gradient_norm": norm,
        }
        if self.done in self._evaluate_at and self.run.evaluate is not None:
            row["loss"] = self._evaluate().loss
        if self.done % settings.log_every == 0 or "loss" in row or self.done == self.steps:
            row |= self._meter.row()
            # JSON has no word for what is not finite.
            row = {key: value for key, value in row.items() if math.isfinite(value)}
            self.curve.append(row)
            self.tracker.log(self.done, row)
        return row

    @property
    def is_best(self) -> bool:
        """Whether the step just done was evaluated, and better than every one before."""
        loss = self._loss_now
        return loss is not None and loss == min(row["loss"] for row in self.curve if "loss" in row)

    @property
    def _loss_now(self) -> float | None:
        """The held-out loss of the step just done, if it was evaluated."""
        last = self.curve[-1] if self.curve else {}
        return last.get("loss") if last.get("step") == self.done else None

    def save(self) -> None:
        """Writes a checkpoint of the steps done."""
        self.checkpoints.save(self.done, self.objective, self.optimizer, self._facts())

    def save_branch(self) -> None:
        """Keeps the state for longer runs, if one is wanted and this is the step where their ways part."""
        if self.run.branch is not None and self.done == self.schedule.branches_at:
            self._branch(self.run.branch).save(self.done, self.objective, self.optimizer, self._facts())

    def _facts(self) -> dict[str, Any]:
        return {
            "curve": self.curve,
            "taken_over": self.taken_over,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "start_loss": self.start_loss,
            "loss": self._loss_now,
        }

    def close(self) -> None:
        """Waits for what is still being written."""
        self.checkpoints.settle(wait=True)
        self.tracker.close()

    def end(self) -> Trained:
        """The student is trained; its checkpoints stay."""
        self.close()
        if self.score is None and self.run.evaluate is not None:
            self._evaluate()  # it went on from a checkpoint of the last step
        self.run.student.eval()
        step_tokens = self.schedule.step_tokens
        return Trained(
            self.curve,
            self.seconds,
            self.steps * step_tokens,
            self.taken_over * step_tokens,
            self.skipped,
            self.start_loss,
            self.score,
        )

    def _evaluate(self) -> Scored:
        assert self.run.evaluate is not None
        self.run.student.eval()
        self.score = self.run.evaluate(self.objective.nats)
        self.run.student.train()
        return self.score

    def _skip(self, number: int, what: str, where: Callable[[], str]) -> None:
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row <= self.run.settings.max_skipped:
            say(f"{self.run.title}: step {number} is skipped, not finite: {what}")
            return
        good = max((path.name for path in self.run.folder.glob("step-*")), default="none yet")
        raise TrainingError(
            f"step {number}: not finite, as in the {self.skipped_in_a_row - 1} steps before: {what}; the batch is of "
            f"{where()}; last good checkpoint in {self.run.folder}: {good}; try a lower distill.lr than "
            f"{self.run.settings.lr} or a longer distill.warmup"
        )


def _optimizer(objective: nn.Module, settings: Train) -> torch.optim.AdamW:
    parameters = [p for p in objective.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def _clip(module: nn.Module, limit: float) -> float:
    norm = nn.utils.clip_grad_norm_(module.parameters(), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
