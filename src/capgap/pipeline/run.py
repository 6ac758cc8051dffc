"""One recipe, the whole way: plan, prune, distil, evaluate; for one student, or for several side by side."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from capgap.anatomy import Anatomy, Shape, anatomy_of, with_fields
from capgap.cost import count_parameters, format_count
from capgap.data import load_tokenizer
from capgap.distill import first_process_first
from capgap.distill.processes import first_process_says
from capgap.errors import RecipeError
from capgap.models import load_config, resolve_folder
from capgap.pipeline.caching import cache_stage
from capgap.pipeline.pruning import prune_stage
from capgap.pipeline.stages import Corpus, open_corpus, score_model_stage
from capgap.pipeline.teachers import Teachers
from capgap.pipeline.training import Training, train_stage, train_stages
from capgap.plan import resolve
from capgap.progress import say
from capgap.prune import solve_shape
from capgap.recipe import Cut, PretrainRecipe, Recipe
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
class _Stop:
    """A cut: of what shape, in what folder; and on how many tokens it is distilled before it is cut again."""

    place: Path
    shape: Shape
    tokens: int


@dataclass(frozen=True)
class _Planned:
    """A student that is to be made: where, of what shape, cut from what, by way of what."""

    name: str
    place: Path
    shape: Shape
    start_ref: str
    start: Path
    start_scale: int
    scores: Path
    stops: tuple[_Stop, ...]


def run_recipe(recipe: Recipe, *, until: Stage = "evaluate", quiet: bool = False) -> RunResult:
    """Runs a recipe; stages whose output is there from the same inputs are skipped.

    Under `torchrun` all processes share caching, training and, in shards, pruning; the rest is the first's work.

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
    corpus = open_recipe_corpus(recipe, tokenizer, quiet=quiet)
    if until == "pack":
        return RunResult([output / "data"])

    pruned = [_pruned(student, recipe, corpus, teachers, quiet=quiet) for student in students]
    if until == "prune":
        return RunResult([folder for folder, _ in pruned])
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
            tokens_before=tokens_before,
        )
        for student, (initial, tokens_before) in zip(students, pruned, strict=True)
    ]
    records = train_stages(trainings, corpus, quiet=quiet)
    trained = [training.folder / "model" for training in trainings]
    if until == "distil":
        return RunResult(trained, records)
    return RunResult(trained, records, first_process_first(lambda: _teacher_losses(teachers, corpus, output, quiet)))


def _pruned(student: _Planned, recipe: Recipe, corpus: Corpus, teachers: Teachers, *, quiet: bool) -> tuple[Path, int]:
    """The student before its training, cut from its start, or from the last of the larger students on its way; and
    on how many tokens those were trained."""
    start, scores, settings, tokens = student.start, student.scores, recipe.distill, 0

    def cut(shape: Shape, folder: Path) -> Path:
        def work() -> Path:
            more = {"scores": scores, "parallel": settings, "quiet": quiet}
            return prune_stage(start, shape, recipe.prune, corpus, folder, **more)

        return first_process_first(work) if settings.parallel == "ddp" else work()

    for number, stop in enumerate(student.stops, start=1):
        initial = cut(stop.shape, stop.place / "pruned")
        training = Training(
            run=f"{stop.place.parent.parent.name}/via/{number}",
            kind="distill",
            initial=initial,
            # Other batches than those that come after.
            settings=settings.model_copy(update={"tokens": stop.tokens, "seed": settings.seed + number}),
            folder=stop.place / "distilled",
            teachers=teachers,
            student_name=f"{student.name}-via-{number}",
            start_name=student.start_ref,
            start_scale=student.start_scale,
        )
        tokens += train_stage(training, corpus, quiet=quiet).tokens
        start, scores = training.folder / "model", stop.place / "scores"
    return cut(student.shape, student.place / "pruned"), tokens


def _planned(recipe: Recipe, output: Path, teacher: str, scale: int | None) -> list[_Planned]:
    """The students of a recipe. Raises RecipeError if two have one name."""
    planned: dict[str, _Planned] = {}
    scores: dict[Path, Path] = {}
    for index, student in enumerate(recipe.student):
        start_ref = resolve(student.start, scale) if student.start is not None else teacher
        start = first_process_first(lambda ref=start_ref: resolve_folder(ref))
        config = load_config(start)
        anatomy, whole = anatomy_of(config), count_parameters(config).total
        shapes = []
        for cut in (*student.via, student):
            shapes.append(student_shape(cut, anatomy, whole=whole))
            anatomy = anatomy_of(anatomy.config_at(shapes[-1], range(shapes[-1].layers)))
        *on_the_way, shape = shapes
        parameters = count_parameters(anatomy.config).total
        name = student.name or f"s{format_count(parameters)}"
        if name in planned:
            raise RecipeError(f"student.{index}: there is a student {name} before it; give this one another name")
        place = output if len(recipe.student) == 1 else output / "students" / name
        # One pass of scoring serves all students that are cut from one model.
        scores.setdefault(start, (place if scores else output) / "scores")
        stops = tuple(
            _Stop(place / "via" / str(number), between, stop.tokens or recipe.distill.tokens)
            for number, (stop, between) in enumerate(zip(student.via, on_the_way, strict=True), start=1)
        )
        planned[name] = _Planned(name, place, shape, start_ref, start, whole, scores[start], stops)
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
    corpus = open_recipe_corpus(recipe, tokenizer, quiet=quiet)
    name = f"t{format_count(count_parameters(config).total)}"
    training = Training(output.name, "pretrain", config, recipe.train, output, student_name=name)
    return RunResult([output / "model"], [train_stage(training, corpus, quiet=quiet)])


def open_recipe_corpus(recipe: Recipe | PretrainRecipe, tokenizer: PreTrainedTokenizerBase, *, quiet: bool) -> Corpus:
    """A recipe's text, packed below its output folder."""
    place, tokens = Path(recipe.output) / "data", recipe.evaluate.tokens
    return first_process_first(lambda: open_corpus(recipe.data, tokenizer, place, held_out_tokens=tokens, quiet=quiet))


def student_shape(cut: Cut, anatomy: Anatomy, *, whole: int | None = None) -> Shape:
    """The shape that a recipe's student asks for, cut from a model of this anatomy.

    Args:
        whole: parameters of the model that fractions are of; those of the model that is cut where None.
    """
    full = anatomy.shape
    if cut.experts is not None and full.experts is None:
        raise RecipeError(f"student.experts = {cut.experts}, but the model it is cut from has no experts")
    if cut.scale is None:
        names = ("layers", "hidden", "kv_heads", "neurons", "experts")
        shape = with_fields(full, **{name: getattr(cut, name) for name in names})
        for name in names:
            if (getattr(shape, name) or 0) > (getattr(full, name) or 0):
                raise RecipeError(
                    f"student.{name} = {getattr(shape, name)}, but the model it is cut from has only "
                    f"{getattr(full, name)}"
                )
        anatomy.config_at(shape, range(shape.layers))
        return shape
    return solve_shape(anatomy, target_of(cut, anatomy, whole), **solver_options(cut, anatomy))


def target_of(cut: Cut, anatomy: Anatomy, whole: int | None = None) -> int:
    """The parameters that a scale asks for."""
    assert cut.scale is not None
    whole = whole or count_parameters(anatomy.config).total
    return round(cut.scale * whole) if isinstance(cut.scale, float) else cut.scale


def solver_options(cut: Cut, anatomy: Anatomy) -> dict[str, Any]:
    """What a recipe's student asks of the solver, by its argument names."""
    return {
        "layers": cut.layers,
        "experts": cut.experts,
        "prefer": cut.prefer,
        "limits": cut.limits.given(),
        "multiple": 64 if anatomy.shape.hidden >= 1024 else 1,
    }
