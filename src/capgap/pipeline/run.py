"""One recipe, the whole way: plan, prune, distil, evaluate; for one student, or for several side by side."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from capgap.anatomy import Anatomy, Shape, anatomy_of, with_fields
from capgap.cost import count_parameters, format_count
from capgap.data import load_tokenizer
from capgap.distill import first_process_first
from capgap.distill.processes import first_process_says
from capgap.errors import RecipeError
from capgap.models import load_config, resolve_folder
from capgap.pipeline.caching import cache_stage
from capgap.pipeline.stages import Corpus, cut_stage, open_corpus, score_model_stage, score_stage
from capgap.pipeline.teachers import Teachers
from capgap.pipeline.training import Training, train_stage, train_stages
from capgap.plan import resolve
from capgap.progress import say
from capgap.prune import solve_shape
from capgap.recipe import PretrainRecipe, Recipe, Student
from capgap.records import RunRecord

Stage = Literal["pack", "prune", "cache", "distil", "evaluate"]


@dataclass(frozen=True)
class RunResult:
    """What a run made.

    Attributes:
        folders: what the last stage wrote: packed text or the teacher cache, or of each student the pruned or the
            trained one.
        records: of each student's training; empty where the run ended before it.
        teacher_losses: the teachers' held-out nats per token, by name; empty where they were not asked for.
    """

    folders: list[Path]
    records: list[RunRecord] = field(default_factory=list)
    teacher_losses: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Planned:
    """A student that is to be made: where, of what shape, cut from what."""

    name: str
    place: Path
    shape: Shape
    start_ref: str
    start: Path
    start_scale: int
    scores: Path


def run_recipe(recipe: Recipe, *, until: Stage = "evaluate", quiet: bool = False) -> RunResult:
    """Runs a recipe; stages whose output is there from the same inputs are skipped.

    Under `torchrun` all processes share caching and training; the other stages are the first process's work.

    Args:
        until: the last stage to run.
    """
    if until == "cache" and recipe.cache is None:
        raise RecipeError("the recipe has no section cache; add `cache: {}`, or cache.kind=sampled to the command")
    output = Path(recipe.output)
    scale = recipe.student[0].scale
    wanted = scale if isinstance(scale, int) else None
    names = [resolve(teacher.model, wanted) for teacher in recipe.teachers()]
    folders = first_process_first(lambda: [resolve_folder(name) for name in names])
    teachers = Teachers(tuple(folders), tuple(teacher.weight for teacher in recipe.teachers()), tuple(names))
    students = _planned(recipe, output, names[0], wanted)
    for student in students:
        say(f"plan: teacher {teachers.name}, start {student.start_ref}, student {student.name} of {student.shape}")

    tokenizer = load_tokenizer(recipe.data.tokenizer or folders[0])
    corpus = _open(recipe, tokenizer, quiet=quiet)
    if until == "pack":
        return RunResult([output / "data"])

    def prune() -> list[Path]:
        cut = []
        for student in students:
            scores = score_stage(student.start, corpus, recipe.prune, student.scores, quiet=quiet)
            place = student.place / "pruned"
            cut.append(cut_stage(student.start, scores, student.shape, recipe.prune, corpus, place))
        return cut

    pruned = first_process_first(prune)
    if until == "prune":
        return RunResult(pruned)
    cache = None
    if recipe.cache is not None:
        cache = Path(recipe.cache.folder or output / "cache")
        cached = cache_stage(teachers, corpus, recipe.cache, recipe.distill, cache, quiet=quiet)
        if until == "cache":
            first_process_says(cached.verify)
            return RunResult([cache])
    trainings = [
        Training(
            run=output.name if len(students) == 1 else f"{output.name}/{student.name}",
            kind="distill",
            initial=initial,
            settings=recipe.distill,
            folder=student.place / "distilled",
            teachers=teachers,
            cache=cache,
            student_name=student.name,
            start_name=student.start_ref,
            start_scale=student.start_scale,
        )
        for student, initial in zip(students, pruned, strict=True)
    ]
    records = train_stages(trainings, corpus, quiet=quiet)
    trained = [training.folder / "model" for training in trainings]
    if until == "distil":
        return RunResult(trained, records)
    return RunResult(trained, records, first_process_first(lambda: _teacher_losses(teachers, corpus, output, quiet)))


def _planned(recipe: Recipe, output: Path, teacher: str, scale: int | None) -> list[_Planned]:
    """The students of a recipe. Raises RecipeError if two have one name."""
    planned: dict[str, _Planned] = {}
    first_start = None
    for index, student in enumerate(recipe.student):
        start_ref = resolve(student.start, scale) if student.start is not None else teacher
        start = first_process_first(lambda ref=start_ref: resolve_folder(ref))
        first_start = first_start or start
        config = load_config(start)
        anatomy = anatomy_of(config)
        shape = student_shape(student, anatomy)
        parameters = count_parameters(anatomy.config_at(shape, range(shape.layers))).total
        name = student.name or f"s{format_count(parameters)}"
        if name in planned:
            raise RecipeError(f"student.{index}: there is a student {name} before it; give this one another name")
        place = output if len(recipe.student) == 1 else output / "students" / name
        # One pass of scoring serves all students that are cut from one model.
        scores = (output if start == first_start else place) / "scores"
        start_scale = count_parameters(config).total
        planned[name] = _Planned(name, place, shape, start_ref, start, start_scale, scores)
    return list(planned.values())


def _teacher_losses(teachers: Teachers, corpus: Corpus, output: Path, quiet: bool) -> dict[str, float]:
    places = [output / f"teacher-score{f'-{n}' if n else ''}" for n in range(len(teachers.folders))]
    return {
        name: score_model_stage(folder, corpus, place, quiet=quiet)
        for name, folder, place in zip(teachers.names, teachers.folders, places, strict=True)
    }


def run_pretrain(recipe: PretrainRecipe, *, quiet: bool = False) -> RunResult:
    """Trains a model of the recipe's shape from random weights; goes on from its checkpoint, skipped where done."""
    output = Path(recipe.output)
    config = load_config(recipe.model)
    tokenizer = load_tokenizer(recipe.data.tokenizer or resolve_folder(recipe.model))
    corpus = _open(recipe, tokenizer, quiet=quiet)
    name = f"t{format_count(count_parameters(config).total)}"
    training = Training(output.name, "pretrain", config, recipe.train, output, student_name=name)
    return RunResult([output / "model"], [train_stage(training, corpus, quiet=quiet)])


def _open(recipe: Recipe | PretrainRecipe, tokenizer: PreTrainedTokenizerBase, *, quiet: bool) -> Corpus:
    place, tokens = Path(recipe.output) / "data", recipe.evaluate.tokens
    return first_process_first(lambda: open_corpus(recipe.data, tokenizer, place, held_out_tokens=tokens, quiet=quiet))


def student_shape(student: Student, anatomy: Anatomy) -> Shape:
    """The shape that a recipe's student asks for, cut from a model of this anatomy."""
    full = anatomy.shape
    if student.experts is not None and full.experts is None:
        raise RecipeError(f"student.experts = {student.experts}, but the model it is cut from has no experts")
    if student.scale is None:
        names = ("layers", "hidden", "kv_heads", "neurons", "experts")
        shape = with_fields(full, **{name: getattr(student, name) for name in names})
        for name in names:
            if (getattr(shape, name) or 0) > (getattr(full, name) or 0):
                raise RecipeError(
                    f"student.{name} = {getattr(shape, name)}, but the model it is cut from has only "
                    f"{getattr(full, name)}"
                )
        anatomy.config_at(shape, range(shape.layers))
        return shape
    total = count_parameters(anatomy.config).total
    target = round(student.scale * total) if isinstance(student.scale, float) else student.scale
    multiple = 64 if full.hidden >= 1024 else 1
    return solve_shape(anatomy, target, layers=student.layers, experts=student.experts, multiple=multiple)
