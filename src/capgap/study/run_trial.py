"""What one trial does: pretrain a member, or cut a student and train it."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from capgap import distill
from capgap.data import documents, load_tokenizer, train_tokenizer
from capgap.errors import StudyError
from capgap.files import atomic_folder, read_json
from capgap.pipeline import Corpus, Teachers, Training, open_corpus, prune_stage, train_stages
from capgap.records import RunRecord
from capgap.study.family import Family
from capgap.study.spec import StudySpec
from capgap.study.trials import Trial, pruning_of, training_of

RUNS = "runs"
ERROR = "error: "
WORKER = "CAPGAP_WORKER"
"""Environment variable: the process for which a trial's ranks work; they end when it is gone."""


def open_study_corpus(spec: StudySpec, folder: Path, *, quiet: bool) -> Corpus:
    """The study's packed text, made by one process of all where it is not there yet."""

    def opened() -> Corpus:
        with FileLock(folder / ".data.lock"):
            tokenizer = _tokenizer(spec, folder)
            more = {"held_out_tokens": spec.evaluate.tokens, "train_tokens": spec.train_tokens, "quiet": quiet}
            return open_corpus(spec.data, tokenizer, folder / "data", **more)

    return distill.first_process_first(opened)


def _tokenizer(spec: StudySpec, folder: Path) -> PreTrainedTokenizerBase:
    if spec.data.tokenizer:
        return load_tokenizer(spec.data.tokenizer)
    place = folder / "tokenizer"
    if not place.is_dir():
        assert spec.nano is not None
        made = train_tokenizer(_sample(spec), spec.nano.vocabulary)
        with atomic_folder(place) as beside:
            made.save_pretrained(beside)
    return load_tokenizer(place)


def _sample(spec: StudySpec, characters: int = 5_000_000) -> Iterator[str]:
    seen = 0
    for source in spec.data.train:
        for document in documents(source):
            yield document.text
            seen += len(document.text)
            if seen >= characters:
                return


def run_trials(
    family: Family, trials: Sequence[Trial], corpus: Corpus, folder: Path, *, quiet: bool = False
) -> list[RunRecord]:
    """Runs trials side by side, each in `folder/runs/NAME`; several must share teacher, seed and kind."""
    trainings = [_training(family, trial, corpus, folder, quiet=quiet) for trial in trials]
    records = train_stages(trainings, corpus, quiet=quiet)
    for trial in trials if distill.is_first_process() else ():  # what is done needs no checkpoints; the branch stays
        shutil.rmtree(folder / RUNS / trial.name / "checkpoints", ignore_errors=True)
    return records


def _training(family: Family, trial: Trial, corpus: Corpus, folder: Path, *, quiet: bool) -> Training:
    place, settings = folder / RUNS / trial.name, training_of(family, trial)
    if trial.kind == "pretrain":
        assert trial.member is not None
        model = family.models[trial.member]
        assert family.spec.nano is not None
        assert model.member is not None
        settings = family.spec.nano.pretrain.model_copy(update={"lr": model.member.lr})
        return Training(trial.name, "pretrain", model.config, settings, place, student_name=trial.name)
    assert trial.student is not None
    start = family.models[trial.start] if trial.start else None
    teacher = family.models[trial.teacher] if trial.teacher else None
    initial = family.config(trial.student) if start is None else _cut(family, trial, corpus, folder, quiet=quiet)
    return Training(
        trial.name,
        trial.kind,
        initial,
        settings,
        place,
        teachers=Teachers((teacher.folder(folder),), names=(teacher.name,)) if teacher else None,
        student_name=family.student_names[trial.student],
        start_name=trial.start,
        start_scale=start.scale if start else None,
        condition=trial.condition,
        branched=settings.schedule == "wsd",
        trunk=folder / RUNS / trial.trunk if trial.trunk else None,
    )


def _cut(family: Family, trial: Trial, corpus: Corpus, folder: Path, *, quiet: bool) -> Path:
    """The student cut out of its start; all trials of both share it, and all students of a start share its scores."""
    assert trial.student is not None
    assert trial.start is not None
    start, settings = family.models[trial.start], pruning_of(family, trial)
    name = f"{family.student_names[trial.student]}-from-{start.name}"
    scores = start.name
    if trial.prune:
        name, scores = f"{name}-{trial.condition}", f"{scores}-{trial.condition}"
    training = training_of(family, trial)
    shape, place = family.shape(trial.student, start), folder / "pruned" / name
    more = {"scores": folder / "scores" / scores, "parallel": training, "quiet": quiet}

    def work() -> Path:
        return prune_stage(start.folder(folder), shape, settings, corpus, place, **more)

    def alone() -> Path:
        (folder / "scores").mkdir(exist_ok=True)
        with FileLock(folder / "scores" / f".{scores}.lock"):
            return work()

    return distill.first_process_first(alone) if training.parallel == "ddp" else work()


def run_on_devices(trials: Sequence[Trial], folder: Path, processes: int) -> list[RunRecord]:
    """Runs trials as `run_trials` does, in so many processes under torchrun, one for each device of this node.

    Raises: StudyError with the last lines of what was said, if it fails.
    """
    words = json.dumps([trial.model_dump() for trial in trials])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "capgap.study.on_devices", str(folder), words]
    log = folder / RUNS / f"{trials[0].name}.log"
    log.parent.mkdir(exist_ok=True)
    words_to_it = {**os.environ, WORKER: str(os.getpid())}
    with log.open("w", encoding="utf-8") as said:
        # In a session of its own, so that a Ctrl-C reaches it once, from here.
        process = subprocess.Popen(command, stdout=said, stderr=said, env=words_to_it, start_new_session=True)
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(120)
            process.kill()
            raise
    if status:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        why = [line.removeprefix(ERROR) for line in lines if line.startswith(ERROR)][:1] or lines[-1:]
        raise StudyError(f"torchrun ended with status {status}: {''.join(why)}; all of it is in {log}")
    return [RunRecord.model_validate(read_json(folder / RUNS / t.name / "record.json")) for t in trials]
