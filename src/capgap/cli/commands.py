"""plan, pack, pretrain, shapes, prune, cache, distil, eval, run, law, report, demo."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from capgap.cli import law, study
from capgap.errors import LawError, RecipeError

if TYPE_CHECKING:
    from capgap.law import SecondLaw
    from capgap.pipeline import RunResult, Stage

Recipe = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value with dotted keys, over the recipe's own.")]


def register(app: typer.Typer) -> None:
    """Adds the commands; `capgap.cli.app.ORDER` is how they are listed."""
    for name, command in (
        ("plan", plan),
        ("pack", pack),
        ("pretrain", pretrain),
        ("shapes", shapes),
        ("prune", prune),
        ("cache", cache),
        ("distil", distil),
        ("eval", evaluate),
        ("run", run),
    ):
        app.command(name)(command)
    app.add_typer(law.app, name="law")
    app.add_typer(study.app, name="study")
    app.command("report")(report)
    app.command("demo")(demo)


def _count(text: str, option: str) -> int:
    from capgap.recipe import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise RecipeError(f"{option}: {error}") from None


def plan(
    student: Annotated[str, typer.Option(help="The student's parameters, such as 3B.")],
    family: Annotated[str, typer.Option(help="llama-2, llama-3, qwen3, pythia or gpt2.")],
    tokens: Annotated[str | None, typer.Option(help="The tokens you will distil on, such as 100B.")] = None,
    records: Annotated[Path | None, typer.Option(help="Your study's records.jsonl, for a law of your own.")] = None,
) -> None:
    """Names the teacher for a student. Example: capgap plan --student 3B --family llama-2 --tokens 126B"""
    from capgap.plan import make_plan

    scale = _count(student, "--student")
    budget = _count(tokens, "--tokens") if tokens else None
    if records is None:
        Console().print(make_plan(scale, family, tokens=budget))
        return
    own = law.own_laws(records, scale, budget)
    second = _second_law_for(records) if budget else None
    print(f"{records}: {own.told}")
    Console().print(make_plan(scale, family, tokens=budget, law=own.law, roles=own.roles, second=second))


def pack(recipe: Recipe, overrides: Overrides = None) -> None:
    """Tokenises and packs a recipe's text. Example: capgap pack recipes/stories.yaml"""
    _show(_run(recipe, overrides, "pack"))


def shapes(
    recipe: Recipe,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option(min=1, help="How many shapes to cut and score.")] = 6,
    tries: Annotated[int, typer.Option("--try", min=0, help="How many of the best to distil for a while.")] = 0,
    tokens: Annotated[str | None, typer.Option(help="On how many tokens; a tenth of the recipe's.")] = None,
) -> None:
    """Compares shapes of a student's size. Example: capgap shapes recipes/stories.yaml --try 2 --tokens 100k"""
    from rich.table import Table

    from capgap.cost import format_bytes, format_count
    from capgap.distill import is_first_process
    from capgap.pipeline import compare_shapes
    from capgap.recipe import Recipe as RecipeModel
    from capgap.recipe import load

    given = _count(tokens, "--tokens") if tokens else None
    found = compare_shapes(load(recipe, RecipeModel, overrides or []), count=count, tries=tries, tokens=given)
    if not is_first_process():
        return
    table = Table()
    for heading in ("layers", "hidden", "KV heads", "neurons", "size", "FLOPs", "cache", "cut", "tried"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found:
        sizes = (row.shape.layers, row.shape.hidden, row.shape.kv_heads, row.shape.neurons)
        costs = (format_count(row.parameters), f"{row.flops:.2e}", format_bytes(row.cache_bytes))
        losses = ("" if loss is None else f"{loss:.3f}" for loss in (row.cut_loss, row.tried_loss))
        table.add_row(*map(str, sizes), *costs, *losses)
    Console().print(table)
    print("FLOPs: of training, a token. cache: keys and values, a token, in 16 bits.")
    print("cut, tried: held-out nats per token, after the cut and after the short distillation.")
    print(f"the best in a recipe: student: {found[0].recipe}")


def prune(recipe: Recipe, overrides: Overrides = None) -> None:
    """Cuts a recipe's student; only larger ones on its way are trained.

    Example: capgap prune recipes/stories.yaml student.scale=0.5x
    """
    _show(_run(recipe, overrides, "prune"))


def cache(recipe: Recipe, overrides: Overrides = None) -> None:
    """Stores what the teacher says of the text. Example: capgap cache recipes/stories.yaml cache.kind=sampled"""
    _show(_run(recipe, overrides, "cache"))


def distil(recipe: Recipe, overrides: Overrides = None) -> None:
    """Trains a pruned student under its teacher. Example: capgap distil recipes/stories.yaml distill.lr=1e-3"""
    _show(_run(recipe, overrides, "distil"))


def run(recipe: Recipe, overrides: Overrides = None) -> None:
    """All of it: plan, pack, prune, distil, evaluate. Example: capgap run recipes/stories.yaml distill.tokens=200k"""
    _show(_run(recipe, overrides, "evaluate"))


def pretrain(recipe: Recipe, overrides: Overrides = None) -> None:
    """Trains a model without a teacher. Example: capgap pretrain recipes/pretrain-stories.yaml train.lr=2e-3"""
    from capgap.pipeline import run_pretrain
    from capgap.recipe import PretrainRecipe, load

    _show(run_pretrain(load(recipe, PretrainRecipe, overrides or [])))


def _show(result: "RunResult") -> None:
    from capgap.distill import is_first_process

    if not is_first_process():
        return
    for place, record in itertools.zip_longest(result.folders, result.records):
        print(place)
        if record is not None:
            print(
                f"held out: {record.loss:.4f} nats per token, {record.bits_per_byte:.4f} bits per byte, after "
                f"{record.tokens:,} tokens (before training {record.start_loss:.4f})"
            )
    for name, loss in result.teacher_losses.items():
        print(f"the teacher{'' if len(result.teacher_losses) == 1 else f' {name}'}: {loss:.4f}")


def _run(recipe: Path, overrides: list[str] | None, until: "Stage") -> "RunResult":
    from capgap.pipeline import run_recipe
    from capgap.recipe import Recipe as RecipeModel
    from capgap.recipe import load

    return run_recipe(load(recipe, RecipeModel, overrides or []), until=until)


def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder or Hub name.")],
    text: Annotated[str, typer.Option(help="Held-out text files, a pattern.")],
    block: Annotated[int, typer.Option(help="Context length, in tokens.")] = 512,
    separator: Annotated[str | None, typer.Option(help="The token between documents.")] = None,
) -> None:
    """Scores a model on held-out text. Example: capgap eval runs/stories/distilled/model --text 'held-out/*.txt'"""
    import tempfile

    from capgap import evaluate as evaluation
    from capgap.data import load_tokenizer
    from capgap.data import pack as pack_text
    from capgap.models import load_model, resolve_folder
    from capgap.recipe import Source

    folder = resolve_folder(model)
    loaded = load_model(folder)
    with tempfile.TemporaryDirectory() as place:
        packed = pack_text(
            [Source(text=text)],
            load_tokenizer(folder),
            Path(place) / "packed",
            block=block,
            separator=separator,
            quiet=True,
        )
        score = evaluation.evaluate(loaded, packed, block=block, quiet=False)
    print(
        f"{score.loss:.4f} nats per token, perplexity {score.perplexity:.3f}, {score.bits_per_byte:.4f} bits per "
        f"byte, {score.tokens:,} tokens"
    )


def _second_law_for(records: Path) -> "SecondLaw | None":
    """The second law of the runs from random weights, if there are enough; else says why not."""
    from capgap.records import read
    from capgap.report import second_law_of

    try:
        fit = second_law_of(read(records))
    except LawError as error:
        print(f"{records}: {error}")
        return None
    return fit.law if fit else None


def report(
    records: Annotated[Path, typer.Argument(help="A study's records.jsonl.")],
    output: Annotated[Path, typer.Option(help="The folder for the page and the figures.")] = Path("report"),
    beside: law.Beside = None,
) -> None:
    """Writes the HTML page and PNG figures. Example: capgap report capgap-demo/records.jsonl --output report"""
    from capgap.report import read_studies, write_report

    print(write_report(read_studies(records, beside or ()), output, title="Capacity gap study").page)


def demo(
    output: Annotated[Path, typer.Option(help="The folder it goes on in, if stopped.")] = Path("capgap-demo"),
    full: Annotated[bool, typer.Option("--full", help="Up to an hour: more scales, tokens and seeds.")] = False,
    tokens: Annotated[str | None, typer.Option(help="Tokens of each run, for a shorter look.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that share the cores.")] = 2,
) -> None:
    """Measures the law on the standard library's source. Example: capgap demo --full --output my-demo"""
    from capgap.demo import run_demo
    from capgap.records import read
    from capgap.report import closing_table

    result = run_demo(output, full=full, tokens=_count(tokens, "--tokens") if tokens else None, workers=workers)
    console = Console()
    console.print(closing_table(read(output / "records.jsonl"), result.report.law))
    for line in result.findings:
        console.print(line)
    console.print(f"report: {result.report.page}")
