"""Run records: one JSON line a finished run, the only bridge from training to the law."""

import contextlib
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from capgap.errors import DataError
from capgap.files import storage_errors


class RunRecord(BaseModel):
    """What one finished run was and what came of it.

    Scales are parameter counts with shared weights counted once; losses are nats per token on held-out text.

    Attributes:
        run: the run's name, unique in its study.
        kind: pretrain (no teacher, random start), distill, or scratch (the student's shape without teacher).
        student, teacher, start: names of the models; teacher and start are None where the run has none.
        student_scale, teacher_scale, start_scale: their parameter counts.
        tokens: tokens trained on.
        tokens_before: that the larger students on its way were trained on, where it was cut in stages.
        tokens_taken_over: those of `tokens` that another run with fewer of them was trained on for both.
        condition: what sets it apart from other runs of the same models, such as another objective.
        loss: held-out nats per token at the end.
        start_loss: held-out nats per token before the first step (directly after pruning).
        bits_per_byte: the same in bits per byte of text.
        curve: rows of step, tokens, and what was measured there (loss, and in training ce, kl, lr).
        flops: estimated floating-point operations of all `tokens`, teacher included.
        seconds: wall-clock of this run, without the tokens taken over.
    """

    model_config = ConfigDict(extra="forbid")

    run: str
    kind: Literal["pretrain", "distill", "scratch"]
    student: str
    student_scale: int
    teacher: str | None = None
    teacher_scale: int | None = None
    start: str | None = None
    start_scale: int | None = None
    tokens: int
    tokens_before: int = 0
    tokens_taken_over: int = 0
    condition: str = ""
    seed: int
    loss: FiniteFloat
    start_loss: float | None = None
    bits_per_byte: float
    curve: list[dict[str, float]] = []
    flops: float
    seconds: float
    device: str
    recipe: dict[str, Any]
    recipe_hash: str
    data_hash: str
    versions: dict[str, str]

    @property
    def flops_spent(self) -> float:
        """FLOPs of this run alone, without the tokens taken over."""
        return self.flops * (1 - self.tokens_taken_over / self.tokens)


def append(path: Path, record: RunRecord) -> None:
    """Adds one line to a JSONL file; the line is on disk when this returns.

    Writers take turns (the study holds its lock): a cut line that a crash left is removed first.
    """
    line = (record.model_dump_json() + "\n").encode()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        mend(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def mend(path: Path) -> None:
    """Ends or removes a last line without its end, which a crash left: nothing must be glued onto it."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end == len(content):
            return
        try:
            RunRecord.model_validate_json(content[end:])
            file.write(b"\n")
        except ValidationError:
            file.truncate(end)


def read(path: Path) -> list[RunRecord]:
    """All records of a JSONL file.

    A last line without its end, cut off by a crash, is left out. Raises DataError that names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file of run records")
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        if not line.strip():
            continue
        try:
            records.append(RunRecord.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise DataError(f"{path} line {number}: not a run record: {key} {first['msg']}".rstrip()) from None
    with contextlib.suppress(ValidationError):
        if lines[-1].strip():
            records.append(RunRecord.model_validate_json(lines[-1]))
    return records
