"""Which shape for a student of a given size: the best few, by their loss after the cut, and by short distillation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from capgap.anatomy import Anatomy, Shape, anatomy_of
from capgap.cost import count_parameters, flops_per_token
from capgap.data import load_tokenizer
from capgap.distill import first_process_first
from capgap.errors import RecipeError
from capgap.models import load_config, resolve_folder
from capgap.pipeline.pruning import prune_stage
from capgap.pipeline.run import open_recipe_corpus, solver_options, target_of
from capgap.pipeline.stages import Corpus, score_model_stage
from capgap.pipeline.teachers import Teachers
from capgap.pipeline.training import Training, train_stages
from capgap.plan import resolve
from capgap.prune import list_shapes
from capgap.recipe import Recipe


@dataclass(frozen=True)
class ShapeRow:
    """A shape that a student may have.

    Attributes:
        parameters: shared ones once.
        flops: of training, for each token.
        cache_bytes: keys and values of one token, in 16 bits.
        cut_loss: held-out nats per token after the cut, repaired as the recipe says.
        tried_loss: after short distillation; None where it was not tried.
    """

    shape: Shape
    parameters: int
    flops: float
    cache_bytes: int
    cut_loss: float
    tried_loss: float | None = None

    @property
    def recipe(self) -> str:
        """The student of this shape as a recipe writes it."""
        fields = {"layers": self.shape.layers, "hidden": self.shape.hidden, "kv_heads": self.shape.kv_heads}
        fields |= {"neurons": self.shape.neurons}
        fields |= {} if self.shape.experts is None else {"experts": self.shape.experts}
        return "{" + ", ".join(f"{name}: {value}" for name, value in fields.items()) + "}"


def compare_shapes(
    recipe: Recipe, *, count: int = 6, tries: int = 0, tokens: int | None = None, quiet: bool = False
) -> list[ShapeRow]:
    """Cuts a recipe's student into shapes of its size with different numbers of layers, and scores each.

    What was done is found again in `shapes` in the recipe's output folder.

    Args:
        count: how many shapes at most.
        tries: how many of them, the best after the cut, are distilled side by side on `tokens` tokens.
        tokens: a tenth of the recipe's where None.
    Returns: the shapes, best first: those tried by their loss after distillation, then the others by the cut's.
    Raises: RecipeError if the recipe has several students, or one of a fixed shape.
    """
    if len(recipe.student) > 1 or recipe.student[0].scale is None:
        raise RecipeError("shapes are compared for one student, by its scale: student: {scale: 0.5x}")
    student, output = recipe.student[0], Path(recipe.output)
    wanted = student.scale if isinstance(student.scale, int) else None
    names = [resolve(teacher.model, wanted) for teacher in recipe.teachers()]
    folders = first_process_first(lambda: tuple(resolve_folder(name) for name in names))
    teachers = Teachers(folders, tuple(teacher.weight for teacher in recipe.teachers()), tuple(names))
    start_ref = None if student.start is None else resolve(student.start, wanted)
    start = folders[0] if start_ref is None else first_process_first(lambda: resolve_folder(start_ref))
    anatomy = anatomy_of(load_config(start))
    corpus = open_recipe_corpus(recipe, load_tokenizer(recipe.data.tokenizer or folders[0]), quiet=quiet)
    shapes = list_shapes(anatomy, target_of(student, anatomy), count=count, **solver_options(student, anatomy))
    rows = []
    for shape in shapes:
        place = _place(output, shape)

        def cut(shape: Shape = shape, place: Path = place) -> Path:
            more: dict[str, Any] = {"scores": output / "scores", "parallel": recipe.distill, "quiet": quiet}
            return prune_stage(start, shape, recipe.prune, corpus, place / "pruned", **more)

        def loss(place: Path = place) -> float:
            return score_model_stage(place / "pruned", corpus, place / "score", quiet=quiet)

        first_process_first(cut) if recipe.distill.parallel == "ddp" else cut()
        rows.append(_row(anatomy, shape, corpus, first_process_first(loss)))
    rows.sort(key=lambda row: row.cut_loss)
    if tries:
        tried = _tried(rows[:tries], recipe, teachers, corpus, tokens or recipe.distill.tokens // 10, quiet=quiet)
        rows = [*sorted(tried, key=lambda row: row.tried_loss or 0.0), *rows[tries:]]
    return rows


def _place(output: Path, shape: Shape) -> Path:
    numbers = [shape.layers, shape.hidden, shape.kv_heads, shape.neurons, *([shape.experts] if shape.experts else [])]
    return output / "shapes" / "-".join(map(str, numbers))


def _row(anatomy: Anatomy, shape: Shape, corpus: Corpus, loss: float) -> ShapeRow:
    config = anatomy.config_at(shape, range(shape.layers))
    cache_bytes = 2 * 2 * shape.layers * shape.kv_heads * anatomy.head_dim
    flops = flops_per_token(config, corpus.block).training
    return ShapeRow(shape, count_parameters(config).total, flops, cache_bytes, loss)


def _tried(
    rows: Sequence[ShapeRow], recipe: Recipe, teachers: Teachers, corpus: Corpus, tokens: int, *, quiet: bool
) -> list[ShapeRow]:
    """The rows with their losses after short distillation, the teacher's forward pass shared."""
    settings = recipe.distill.model_copy(update={"tokens": max(tokens, recipe.distill.tokens_per_step)})
    places = [_place(Path(recipe.output), row.shape) for row in rows]
    trainings = [
        Training(f"shapes/{place.name}", "distill", place / "pruned", settings, place / "tried", teachers=teachers)
        for place in places
    ]
    records = train_stages(trainings, corpus, quiet=quiet)
    return [replace(row, tried_loss=record.loss) for row, record in zip(rows, records, strict=True)]
