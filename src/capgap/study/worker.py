"""Runs a study's trials in worker processes; a study that was stopped or killed goes on where it was."""

import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from capgap.anatomy import Shape
from capgap.cost import count_parameters
from capgap.data import documents, load_tokenizer, train_tokenizer
from capgap.errors import CapgapError, StudyError
from capgap.files import atomic_folder, hash_of, read_json, write_json
from capgap.models import load_config
from capgap.pipeline import Corpus, Teachers, Training, open_corpus, prune_stage, train_stages
from capgap.progress import say
from capgap.records import RunRecord
from capgap.study.grid import StudySpec, Trial, trials_of
from capgap.study.storage import Queue

_SECONDS_BETWEEN_LOOKS = 0.5


@dataclass(frozen=True)
class Status:
    """How far a study is: (name, state, loss or None) of each trial."""

    trials: list[tuple[str, str, float | None]]


def run_study(spec: StudySpec, folder: Path, *, workers: int = 1, quiet: bool = False) -> list[RunRecord]:
    """Runs every trial that is not done, in `workers` processes that share the cores.

    Returns: the records of all finished trials, also in `folder/records.jsonl`.
    Raises: StudyError if trials failed (the others are done first), or the folder holds another study.
    """
    _own(spec, folder)
    queue = Queue(folder)
    _open(spec, folder, quiet=quiet)
    queue.add(trials_of(spec))
    queue.reclaim()
    if queue.unfinished():
        threads = max(1, torch.get_num_threads() // workers)
        context = multiprocessing.get_context("spawn")
        pool = [context.Process(target=work, args=(spec, folder, threads, quiet)) for _ in range(workers)]
        for process in pool:
            process.start()
        _wait(pool)
        if any(process.exitcode for process in pool) and queue.unfinished():
            raise StudyError(f"{folder}: a worker died (exit codes {[p.exitcode for p in pool]}); run again to go on")
    queue.raise_failures()
    return queue.records()


def _wait(pool: list) -> None:
    """Waits for the workers; a Ctrl-C reaches them too, and they are given the time to write their checkpoints."""
    try:
        for process in pool:
            process.join()
    except KeyboardInterrupt:
        for process in pool:
            process.join(30)
            if process.is_alive():
                process.kill()
        raise
    finally:
        for process in pool:
            if process.is_alive():
                process.terminate()


def work(spec: StudySpec, folder: Path, threads: int, quiet: bool) -> None:
    """One worker process."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    work_through(spec, folder, quiet=quiet)


def work_through(spec: StudySpec, folder: Path, *, quiet: bool = False) -> None:
    """Claims and runs trials until none is left."""
    queue = Queue(folder)
    corpus = _open(spec, folder, quiet=True)
    while queue.unfinished():
        claimed = queue.claim(spec.side_by_side)
        if not claimed:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            continue
        try:
            for (number, trial), outcome in _outcomes(spec, claimed, corpus, folder):
                if isinstance(outcome, RunRecord):
                    queue.finish(number, outcome)
                    told = f"{outcome.loss:.4f} nats per token, {outcome.seconds:.0f} s"
                else:
                    queue.fail(number, str(outcome))
                    told = f"failed: {outcome}"
                if not quiet or not isinstance(outcome, RunRecord):
                    done = sum(row.state.is_finished() for row in queue.rows())
                    say(f"[{done}/{len(queue.rows())}] {trial.name}: {told}")
        except KeyboardInterrupt:
            queue.hand_back(number for number, _ in claimed)
            return


Claimed = list[tuple[int, Trial]]


def _outcomes(
    spec: StudySpec, claimed: Claimed, corpus: Corpus, folder: Path
) -> Iterator[tuple[tuple[int, Trial], RunRecord | Exception]]:
    """Each trial with its record, or with why it failed: trials that fail side by side go on alone."""
    try:
        records = run_trials(spec, [trial for _, trial in claimed], corpus, folder)
    except (CapgapError, RuntimeError, ValueError) as error:
        if len(claimed) == 1:
            yield claimed[0], error
        else:
            for one in claimed:
                yield from _outcomes(spec, [one], corpus, folder)
    else:
        yield from zip(claimed, records, strict=True)


def run_trials(spec: StudySpec, trials: Sequence[Trial], corpus: Corpus, folder: Path) -> list[RunRecord]:
    """Runs trials side by side, each in `folder/runs/NAME`; several must share teacher, seed and kind."""
    return train_stages([_training(spec, trial, corpus, folder) for trial in trials], corpus, quiet=True)


def _training(spec: StudySpec, trial: Trial, corpus: Corpus, folder: Path) -> Training:
    place = folder / "runs" / trial.name
    if trial.kind == "pretrain":
        assert trial.member is not None
        member = spec.member_names()[trial.member]
        settings = spec.nano.pretrain.model_copy(update={"lr": member.lr})
        config = spec.nano.config(member, corpus.block)
        return Training(trial.name, "pretrain", config, settings, place, student_name=trial.name)
    assert trial.student is not None
    start_scale = None
    if trial.start is None:
        initial = spec.student_config(trial.student)
    else:
        start = _member_folder(folder, trial.start)
        start_scale = count_parameters(load_config(start)).total
        name = f"{spec.student_name(trial.student)}-from-{trial.start}"
        initial = _pruned(spec, start, spec.student_shape(trial.student), corpus, folder, name)
    teachers = None
    if trial.teacher is not None:
        teachers = Teachers((_member_folder(folder, trial.teacher),), names=(trial.teacher,))
    return Training(
        trial.name,
        trial.kind,
        initial,
        spec.distill.model_copy(update={"seed": trial.seed}),
        place,
        teachers=teachers,
        student_name=spec.student_name(trial.student),
        start_name=trial.start,
        start_scale=start_scale,
    )


def _pruned(spec: StudySpec, start: Path, shape: Shape, corpus: Corpus, folder: Path, name: str) -> Path:
    place = folder / "pruned" / name
    return prune_stage(start, shape, spec.prune, corpus, place, scores=start.parent / "scores", quiet=True)


def _member_folder(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "model"


def _open(spec: StudySpec, folder: Path, *, quiet: bool) -> Corpus:
    tokenizer = _tokenizer(spec, folder)
    return open_corpus(
        spec.data,
        tokenizer,
        folder / "data",
        held_out_tokens=spec.evaluate.tokens,
        train_tokens=spec.train_tokens,
        quiet=quiet,
    )


def _tokenizer(spec: StudySpec, folder: Path) -> PreTrainedTokenizerBase:
    if spec.data.tokenizer:
        return load_tokenizer(spec.data.tokenizer)
    place = folder / "tokenizer"
    if not place.is_dir():
        tokenizer = train_tokenizer(_sample(spec), spec.nano.vocabulary)
        with atomic_folder(place) as beside:
            tokenizer.save_pretrained(beside)
    return load_tokenizer(place)


def _sample(spec: StudySpec, characters: int = 5_000_000) -> Iterator[str]:
    seen = 0
    for source in spec.data.train:
        for document in documents(source):
            yield document.text
            seen += len(document.text)
            if seen >= characters:
                return


def _own(spec: StudySpec, folder: Path) -> None:
    """Marks the folder as this study's. More trials may join it; what its numbers rest on may not change."""
    fixed = spec.model_dump(mode="json", exclude={"roles", "students", "seeds", "grid_students", "side_by_side"})
    path = folder / "study.json"
    if path.is_file():
        if hash_of(read_json(path)["fixed"]) != hash_of(fixed):
            raise StudyError(
                f"{folder}: holds a study with other data, family or settings; give another folder, or remove this one"
            )
        return
    write_json(path, {"fixed": fixed})


def study_status(folder: Path) -> Status:
    """The state of each trial. Raises StudyError if the folder holds no study."""
    if not (folder / "study.db").is_file():
        raise StudyError(f"{folder}: holds no study (no study.db)")
    return Status(
        [
            (row.user_attrs["name"], row.state.name.lower(), row.values[0] if row.values else None)
            for row in Queue(folder).rows()
        ]
    )
