"""The second law, refit to a study's records."""

from collections.abc import Sequence
from dataclasses import asdict

from capgap.errors import LawError
from capgap.law import (
    ALONE_NEEDED,
    PUBLISHED_SECOND,
    TAUGHT_NEEDED,
    Alone,
    SecondFit,
    Taught,
    fit_second_law,
    scale_text,
)
from capgap.law.busbridge import Distillation, Supervised
from capgap.records import RunRecord


def second_runs(records: Sequence[RunRecord]) -> tuple[list[Alone], list[Taught]]:
    """The runs from random weights without a teacher (`scratch`), and those under one whose own loss is known.

    A teacher's loss is that of the pretrain record of its name, on the same data. Runs under a condition of their own
    are left out. N are all parameters, embeddings included, as records hold no others.
    """
    alone, taught = _taken(records)
    return (
        [Alone(r.student_scale, r.tokens, r.loss) for r in alone],
        [Taught(r.student_scale, r.tokens, r.loss, own) for r, own in taught],
    )


def _taken(records: Sequence[RunRecord]) -> tuple[list[RunRecord], list[tuple[RunRecord, float]]]:
    """Both kinds of runs, those under a teacher with its own loss."""
    random = [r for r in records if r.start is None and not r.condition]
    own = {(r.student, r.data_hash): r.loss for r in random if r.kind == "pretrain"}
    taught = [(r, own.get((r.teacher or "", r.data_hash))) for r in random if r.kind == "distill"]
    return [r for r in random if r.kind == "scratch"], [(r, loss) for r, loss in taught if loss is not None]


def second_law_of(records: Sequence[RunRecord]) -> SecondFit | None:
    """The second law refit to all runs from random weights, of all budgets together; None where there are none.

    Raises: LawError if there are too few, or they are on different data.
    """
    alone, taught = second_runs(records)
    if not alone and not taught:
        return None
    if len(alone) < ALONE_NEEDED or len(taught) < TAUGHT_NEEDED:
        raise LawError(
            f"the second law is not refit: of runs from random weights there are {len(alone)} without a teacher and "
            f"{len(taught)} under one whose own loss is recorded; it needs {ALONE_NEEDED} and {TAUGHT_NEEDED}"
        )
    without, under = _taken(records)
    if len(data := {r.data_hash for r in (*without, *(r for r, _ in under))}) > 1:
        raise LawError(f"the second law is not refit: the runs from random weights are on {len(data)} sets of data")
    return fit_second_law(alone, taught, embeddings=True)


def second_lines(records: Sequence[RunRecord]) -> list[str]:
    """The refit second law beside the published one, in words; why there is none; nothing without such runs."""
    try:
        fit = second_law_of(records)
    except LawError as error:
        return [str(error)]
    if fit is None:
        return []
    law = fit.law
    smallest, largest = map(scale_text, law.fitted.students)
    return [
        (
            f"second law, of students of {smallest} to {largest} parameters (embeddings included) from random weights: "
            f"{law.source}"
        ),
        f"  without a teacher: {_beside(law.supervised, PUBLISHED_SECOND.supervised)}; {_error(fit.error[0])}",
        f"  under a teacher: {_beside(law.distillation, PUBLISHED_SECOND.distillation)}; {_error(fit.error[1])}",
        "  a coefficient that the runs tell little about stays near the published one, in parentheses",
    ]


def _beside(part: Supervised | Distillation, published: Supervised | Distillation) -> str:
    here, there = asdict(part), asdict(published)
    return ", ".join(f"{name} {value:.4g} ({there[name]:.4g})" for name, value in here.items())


def _error(error: float) -> str:
    return f"rms error {error:.4f} nats per token"
