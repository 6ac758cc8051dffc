"""How many steps a training has, and the learning rate of each."""

import math
from dataclasses import dataclass

from capgap.errors import RecipeError
from capgap.recipe import Train


@dataclass(frozen=True)
class Schedule:
    """The steps of a training and their learning rates: linear warm-up, then cosine or stable-then-linear-decay.

    Attributes:
        blocks_per_step, steps: whole; step_tokens: tokens of one step.
        warmup: steps over which the learning rate rises.
        decay: steps at the end over which that of `wsd` falls.
    """

    settings: Train
    blocks_per_step: int
    steps: int
    step_tokens: int
    warmup: int
    decay: int

    @classmethod
    def of(cls, settings: Train, block: int) -> "Schedule":
        """Of these settings with blocks of `block` tokens.

        Raises: RecipeError if a step is shorter than a block, or the warm-up longer than the training.
        """
        blocks = settings.tokens_per_step // block
        if blocks < 1:
            raise RecipeError(
                f"distill.tokens_per_step = {settings.tokens_per_step} is less than data.block = {block}; "
                f"a step holds at least one block"
            )
        step_tokens = blocks * block
        steps = max(1, settings.tokens // step_tokens)
        warmup = settings.warmup * steps if settings.warmup < 1 else settings.warmup / step_tokens
        if round(warmup) > steps:
            raise RecipeError(
                f"distill.warmup = {settings.warmup:,.0f} tokens is more than distill.tokens = {settings.tokens:,}; "
                "take a shorter warm-up, or a share of the steps such as 0.01"
            )
        return cls(settings, blocks, steps, step_tokens, round(warmup), max(1, round(settings.decay * steps)))

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        settings = self.settings
        if step < self.warmup:
            return settings.lr * (step + 1) / self.warmup
        if settings.schedule == "cosine":
            share = 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))
        else:
            share = min(1.0, (self.steps - step) / self.decay)
        return settings.lr * (settings.final_lr + (1 - settings.final_lr) * share)

    @property
    def branches_at(self) -> int | None:
        """The last step that a longer training shares: the end of the constant part of `wsd`; None where there is none.

        Up to there a run of more tokens does the same, so it can go on from the state of this one.
        """
        stable_until = self.steps - self.decay
        return stable_until if self.settings.schedule == "wsd" and stable_until >= max(1, self.warmup) else None

    @property
    def trunk(self) -> dict[str, object]:
        """What trainings that share their steps up to `branches_at` have in common."""
        ends = {"tokens", "warmup", "decay", "final_lr", "evaluations"}
        shared = {key: value for key, value in self.settings.identity().items() if key not in ends}
        return {**shared, "warmup": self.warmup, "step_tokens": self.step_tokens}
