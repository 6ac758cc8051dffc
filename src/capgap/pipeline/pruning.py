"""The stage that prunes: a start is scored once for all of its students, each is cut from it and repaired."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capgap import distill
from capgap.anatomy import Anatomy, Q, Shape, anatomy_of
from capgap.cost import count_parameters
from capgap.data import Batches
from capgap.errors import DataError, RecipeError
from capgap.files import LINEAGE, read_json, write_json
from capgap.models import default_device, hash_model, load_config, load_model, save_model
from capgap.pipeline.stages import Corpus, is_done, lineage_of
from capgap.prune import Keep, Probe, Scores, cut_folder, losses_without, repair, score, select
from capgap.recipe import Prune, Train

# After distillation a repair cost 0.017 nats at a cut of 30 % and gained 0.011 at 50 % and 0.131 at 70 %.
REPAIRED_BELOW = 0.55


def prune_stage(
    start: Path,
    shape: Shape,
    settings: Prune,
    corpus: Corpus,
    folder: Path,
    *,
    scores: Path,
    parallel: Train | None = None,
    quiet: bool = False,
) -> Path:
    """Cuts a student of `shape` out of `start` into `folder`, a plain Hugging Face folder.

    Args:
        scores: the folder of the start's scores, which all students of the start share.
        parallel: how the start lies on the devices, where it is given and several processes call this together: in
            shards for `fsdp` and `hsdp`; with `ddp` the first process must call this alone.
    Returns: `folder`.
    """
    settings = chosen(settings, anatomy_of(load_config(start)), shape)
    work = _Pruning(start, settings, corpus, parallel, quiet)
    found = work.scored(scores)
    dropped = len(found.kv_heads) - shape.layers
    losses = None
    if settings.layers in ("loss", "block_loss") and dropped:
        losses = work.losses(scores, dropped if settings.layers == "block_loss" else 1)
    inputs = {
        "start": hash_model(start),
        "shape": str(shape),
        "prune": {**settings.model_dump(mode="json"), **_seeded(settings)},
        "data": corpus.hash,
    }
    if work.missing(folder, inputs):
        work.cut(select(found, shape, layers=settings.layers, losses=losses), folder, inputs)
    return folder


def chosen(settings: Prune, anatomy: Anatomy, shape: Shape) -> Prune:
    """The settings with `auto` replaced by what came out best, or as good as the best, in studies/pruning."""
    score, repair = settings.score, settings.repair
    if score == "auto":
        score = "activation" if anatomy.shape.experts is None else "expressiveness"
    if repair == "auto":
        kept = count_parameters(anatomy.config_at(shape, range(shape.layers))).total
        repair = "all" if kept <= REPAIRED_BELOW * count_parameters(anatomy.config).total else "none"
    return settings.model_copy(update={"score": score, "repair": repair})


def _seeded(settings: Prune) -> dict[str, int]:
    """The seed, which only random scores read."""
    return {"seed": settings.seed if settings.score == "random" else 0}


class _Pruning:
    """A start and the text that it is measured on."""

    def __init__(self, start: Path, settings: Prune, corpus: Corpus, parallel: Train | None, quiet: bool):
        self.start, self.settings, self.corpus, self.quiet = start, settings, corpus, quiet
        self.parallel = parallel
        several = distill.rank_and_world()[1] > 1
        self.together = several and parallel is not None and parallel.parallel != "ddp"
        if settings.offload and several and not self.together:
            raise RecipeError("prune.offload = true under torchrun needs distill.parallel = fsdp or hsdp")
        self.device = default_device()
        half = distill.bfloat16_wanted(settings.precision, self.device)
        self.dtype = torch.bfloat16 if half else torch.float32

    def missing(self, folder: Path, inputs: dict[str, Any]) -> bool:
        """Whether the folder is yet to be made; the same in all processes that work together."""
        return (
            distill.first_process_says(lambda: not is_done(folder, inputs))
            if self.together
            else not is_done(folder, inputs)
        )

    def write(self, work: Callable[[], None]) -> None:
        """Lets the first of the processes that work together write; the others wait."""
        if not self.together or distill.is_first_process():
            work()
        if self.together:
            distill.wait_for_all()

    def loaded(self) -> tuple[PreTrainedModel, Anatomy]:
        model = load_model(self.start, dtype=self.dtype)
        return model, anatomy_of(model.config)

    def place(self, probe: Probe) -> torch.device:
        """Brings the start to its device or devices."""
        if self.together or self.settings.offload:
            parallel = self.parallel if self.together else None
            distill.shard(probe.model, probe, parallel, self.device, offload=self.settings.offload)
        else:
            probe.to(self.device)
        return self.device

    def blocks(self) -> int:
        """Of the training text."""
        return sum(source.blocks(self.corpus.block) for source in self.corpus.train.sources)

    def text(self, tokens: int, rows: int) -> list[Tensor]:
        """Batches of `rows` blocks of the training text, of so many tokens at most and one batch at least."""
        batches = Batches(self.corpus.train, block=self.corpus.block, blocks_per_step=rows, seed=0)
        blocks = min(tokens // self.corpus.block, self.blocks())
        return [batches.batch(step) for step in range(max(1, blocks // rows))]

    def calibration(self) -> list[Tensor]:
        """What scores and losses are measured on. Raises DataError if the text has not one batch."""
        rows = self.settings.calibration_batch
        if rows > self.blocks():
            raise DataError(
                f"prune.calibration_batch = {rows}, but the training text has only {self.blocks()} blocks of "
                f"{self.corpus.block} tokens"
            )
        return self.text(self.settings.calibration_tokens, rows)

    def inputs(self) -> dict[str, Any]:
        """What decides all that is measured of the start, but for rounding."""
        return {
            "start": hash_model(self.start),
            "data": self.corpus.hash,
            "tokens": self.settings.calibration_tokens,
            "batch": self.settings.calibration_batch,
            "precision": str(self.dtype),
        }

    def scored(self, folder: Path) -> Scores:
        """The start's scores, read, or measured and written."""
        settings, file = self.settings, folder / "scores.safetensors"
        inputs = {**self.inputs(), "score": settings.score, **_seeded(settings)}
        if self.missing(folder, inputs):
            model, anatomy = self.loaded()
            batches = self.calibration()
            more: dict[str, Any] = {"total": len(batches), "quiet": self.quiet, "place": self.place}
            assert settings.score != "auto"
            scores = score(model, anatomy, batches, method=settings.score, seed=settings.seed, **more)

            def write() -> None:
                folder.mkdir(parents=True, exist_ok=True)
                # What says where the old scores came from must not stand beside the new ones.
                (folder / LINEAGE).unlink(missing_ok=True)
                scores.save(file)
                write_json(folder / LINEAGE, lineage_of("score", inputs))

            self.write(write)
        return Scores.load(file)

    def losses(self, scores: Path, block: int) -> Tensor:
        """The losses without so many layers in a row, read, or measured and written."""
        folder = scores / f"without-{block}"
        inputs = {**self.inputs(), "block": block}
        if self.missing(folder, inputs):
            model, anatomy = self.loaded()
            batches = self.calibration()
            more: dict[str, Any] = {"total": len(batches), "quiet": self.quiet, "place": self.place}
            found = losses_without(model, anatomy, batches, block=block, **more)
            lineage = lineage_of("losses without layers", inputs, losses=found.tolist())
            self.write(lambda: write_json(folder / LINEAGE, lineage))
        return torch.tensor(read_json(folder / LINEAGE)["losses"])

    def cut(self, keep: Keep, folder: Path, inputs: dict[str, Any]) -> None:
        """Writes the student, repaired where that is asked for."""
        lineage = lineage_of("prune", inputs, parents={"start": str(self.start)})
        tokenizer = self.corpus.tokenizer

        def cut_to(place: Path) -> None:
            self.write(
                lambda: cut_folder(self.start, keep, place, tokenizer=tokenizer, lineage=lineage, quiet=self.quiet)
            )

        if self.settings.repair == "none":
            cut_to(folder)
            return
        place = folder.with_name(f"{folder.name}-unrepaired")
        try:
            cut_to(place)
            student, dtype = self.repaired(keep, place)
            student.to(dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
            self.write(lambda: save_model(student, folder, tokenizer=tokenizer, lineage=lineage))
        finally:
            if distill.is_first_process():
                shutil.rmtree(place, ignore_errors=True)

    def repaired(self, keep: Keep, place: Path) -> tuple[PreTrainedModel, torch.dtype]:
        """The student that lies in `place`, repaired, in float32; and the precision that it has there."""
        student = load_model(place, dtype="auto")
        dtype = student.dtype
        model, anatomy = self.loaded()
        # More tokens for each input of the widest layer change little (docs/performance.md).
        widest = max(keep.shape.neurons, keep.shape.hidden, anatomy.sizes(keep.shape)[Q])
        tokens = min(self.settings.repair_tokens, 64 * widest)
        rows = max(1, min(tokens, 4096) // self.corpus.block)
        batches = self.text(tokens, min(rows, self.blocks()))
        student = student.float()
        assert self.settings.repair != "auto"
        repair(student, model, anatomy, keep, batches, what=self.settings.repair, place=self.place, quiet=self.quiet)
        return student, dtype
