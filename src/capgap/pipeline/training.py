"""The stage that trains: one student, or several of one teacher side by side."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from capgap import distill, evaluate
from capgap.cost import count_parameters, flops_per_token
from capgap.data import Batches
from capgap.errors import DataError, RecipeError
from capgap.files import hash_of, read_json, write_json
from capgap.models import check_head, default_device, hash_model, load_model, new_model, save_model
from capgap.pipeline.stages import Corpus, is_done, lineage_of, versions
from capgap.pipeline.teachers import Teachers
from capgap.recipe import Train
from capgap.records import RunRecord

BRANCH = "branch"


@dataclass(frozen=True)
class Training:
    """One run of the loop.

    Attributes:
        run: its name.
        kind: pretrain, distill, or scratch.
        initial: the folder of the model to go on from, or the config of one with random weights.
        folder: where checkpoints, record and the trained model go.
        teachers: None without a teacher.
        cache: folder of what the teachers said; their weights are then not read.
        student_name, start_name: for the record.
        start_scale: parameters of the model that the student was cut from.
        tokens_before: that the larger students on its way were trained on.
        condition: what sets it apart from other runs of the same models, for the record.
        branched: whether runs of more tokens will go on from this one's `folder/branch`.
        trunk: the folder of a run of fewer tokens and otherwise equal, to go on from; see `distill.Run.trunk`.
    """

    run: str
    kind: Literal["pretrain", "distill", "scratch"]
    initial: Path | PretrainedConfig
    settings: Train
    folder: Path
    teachers: Teachers | None = None
    cache: Path | None = None
    student_name: str = "student"
    start_name: str | None = None
    start_scale: int | None = None
    tokens_before: int = 0
    condition: str = ""
    branched: bool = False
    trunk: Path | None = None


def train_stage(training: Training, corpus: Corpus, *, quiet: bool = False) -> RunRecord:
    """Trains one student; see `train_stages`."""
    return train_stages([training], corpus, quiet=quiet)[0]


def train_stages(trainings: Sequence[Training], corpus: Corpus, *, quiet: bool = False) -> list[RunRecord]:
    """Trains students side by side, each as if alone, the teacher's forward pass shared.

    Each is evaluated and saved to its `folder/model`, goes on from its checkpoint, and is skipped where it is done.

    Args:
        trainings: of the same teachers and cache.
    Returns: the records, also in each `folder/record.json`.
    Raises: ModelError if teacher and student do not share a tokenizer and a vocabulary; RecipeError if the
        trainings do not fit together.
    """
    teachers, cache = trainings[0].teachers, trainings[0].cache
    if any((t.teachers, t.cache) != (teachers, cache) for t in trainings):
        raise RecipeError("students trained side by side must have the same teachers and the same cache")
    settings = trainings[0].settings
    cached = teachers.open_cache(cache, corpus, settings) if teachers and cache else None
    inputs = [_inputs(training, corpus, cached) for training in trainings]
    todo = [(t, i) for t, i in zip(trainings, inputs, strict=True) if not _is_trained(t, i)]
    if todo:
        if teachers:
            teachers.check(corpus)
        online = teachers.load() if teachers and cached is None else []
        teacher = cached
        if teachers and cached is None:
            layers = any(training.settings.hidden_loss for training, _ in todo)
            teacher = distill.OnlineTeacher(*online, weights=teachers.weights, layers=layers)
        runs = [_run(training, corpus, given, online) for training, given in todo]
        blocks = distill.Schedule.of(settings, corpus.block).blocks_per_step
        batches = Batches(corpus.train, block=corpus.block, blocks_per_step=blocks, seed=settings.seed)
        came_of_it = distill.train_together(
            runs, batches, block=corpus.block, unscored_id=corpus.unscored_id, teacher=teacher, quiet=quiet
        )
        for (training, given), run, trained in zip(todo, runs, came_of_it, strict=True):
            _keep(training, corpus, given, run, trained)
        distill.wait_for_all()
    return [RunRecord.model_validate(read_json(training.folder / "record.json")) for training in trainings]


def _inputs(training: Training, corpus: Corpus, cached: distill.CachedTeacher | None) -> dict[str, Any]:
    """All that decides the trained weights, but for rounding."""
    initial, teachers = training.initial, training.teachers
    said = None if cached is None else {"teacher": cached.facts["teacher"], "cache": cached.hash}
    return {
        "initial": hash_model(initial) if isinstance(initial, Path) else initial.to_dict(),
        **(said or {"teacher": teachers.hash if teachers else None}),
        "data": corpus.hash,
        "settings": training.settings.identity(),
        **({"unscored": corpus.unscored_id} if corpus.unscored_id is not None else {}),
    }


def _is_trained(training: Training, inputs: dict[str, Any]) -> bool:
    return is_done(training.folder / "model", inputs) and (training.folder / "record.json").is_file()


def _run(training: Training, corpus: Corpus, inputs: dict[str, Any], online: Sequence[PreTrainedModel]) -> distill.Run:
    """The student, loaded, and how it is trained and scored."""
    initial, settings = training.initial, training.settings
    student = load_model(initial) if isinstance(initial, Path) else new_model(initial, seed=settings.seed)
    check_head(student)
    if student.config.vocab_size < corpus.train.vocab_size:
        raise DataError(
            f"the text is packed with a vocabulary of {corpus.train.vocab_size} tokens, "
            f"the model knows {student.config.vocab_size}"
        )
    if settings.hidden_loss is not None and len(online) != 1:
        raise RecipeError(f"distill.hidden_loss = {settings.hidden_loss}: needs one teacher online, not a cache")
    hidden = distill.HiddenLoss(student, online[0], settings.hidden_loss) if settings.hidden_loss else None
    rank, world = distill.rank_and_world()
    flops = flops_per_token(student.config, corpus.block).training
    if online and training.teachers:
        flops += training.teachers.forward_flops(corpus.block)

    def score(nats: evaluate.Nats) -> evaluate.Score:
        return evaluate.evaluate_nats(
            nats,
            corpus.held_out,
            device=default_device(),
            block=corpus.block,
            rank=rank,
            world=world,
            total=distill.sum_over_processes,
        )

    return distill.Run(
        student,
        settings,
        training.folder / "checkpoints",
        inputs={key: value for key, value in inputs.items() if key != "settings"},
        evaluate=score,
        title=training.run,
        hidden=hidden,
        flops_per_token=flops,
        branch=training.folder / BRANCH if training.branched else None,
        trunk=training.trunk / BRANCH if training.trunk else None,
    )


def _keep(
    training: Training, corpus: Corpus, inputs: dict[str, Any], run: distill.Run, trained: distill.Trained
) -> None:
    """Writes the trained model, then its record."""
    teachers, settings, folder = training.teachers, training.settings, training.folder
    record = RunRecord(
        run=training.run,
        kind=training.kind,
        student=training.student_name,
        student_scale=count_parameters(run.student.config).total,
        teacher=teachers.name if teachers else None,
        teacher_scale=teachers.scale if teachers else None,
        start=training.start_name,
        start_scale=training.start_scale,
        tokens=trained.tokens,
        tokens_before=training.tokens_before,
        tokens_taken_over=trained.tokens_taken_over,
        condition=training.condition,
        seed=settings.seed,
        loss=trained.score.loss,
        start_loss=trained.start_loss,
        bits_per_byte=trained.score.bits_per_byte,
        curve=trained.curve,
        flops=(run.flops_per_token or 0.0) * trained.tokens,
        seconds=trained.seconds,
        device=_device(),
        recipe=settings.model_dump(mode="json"),
        recipe_hash=hash_of(inputs),
        data_hash=corpus.hash,
        versions=versions(),
    )
    weights = distill.whole_weights(run.student)
    if not distill.is_first_process():
        return
    taught_by = None if teachers is None else [str(path) for path in teachers.folders]
    save_model(
        run.student,
        folder / "model",
        weights=weights,
        tokenizer=corpus.tokenizer,
        lineage=lineage_of(
            training.kind,
            inputs,
            parents={"teachers": taught_by, "initial": str(training.initial)[:200]},
            seed=settings.seed,
            loss=record.loss,
        ),
    )
    write_json(folder / "record.json", record.model_dump(mode="json"))


def _device() -> str:
    device = default_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    return f"{device.type} {name}, {torch.get_num_threads()} threads"
