"""study create, run, resume, status, export, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capgap.cli.law import Beside

if TYPE_CHECKING:
    from capgap.study import StudySpec, Way

app = typer.Typer(no_args_is_help=True, help="Runs grids of trials that survive anything, on one machine or many.")

Folder = Annotated[Path, typer.Argument(help="The study's folder.")]
Storage = Annotated[
    str | None,
    typer.Option(
        envvar="CAPGAP_STORAGE",
        help="postgresql://user@host/database, for many machines; SQLite in the folder without it.",
    ),
]
Workers = Annotated[int, typer.Option(min=1, help="Processes that share this machine's cores and devices.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes of one trial, under torchrun.")]
Heartbeat = Annotated[int, typer.Option(min=1, help="Seconds between two signs of life of a running trial.")]
Grace = Annotated[int, typer.Option(min=2, help="Seconds without one, until it is given to another worker.")]


@app.command("create")
def create(
    study: Annotated[Path, typer.Argument(help="The study, a YAML file.")],
    output: Annotated[Path, typer.Option(help="The study's folder, which all its machines see.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value with dotted keys.")] = None,
    storage: Storage = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost; make nothing.")] = False,
) -> None:
    """Makes a study, and runs nothing. Example: capgap study create recipes/nano-study.yaml --output runs/nano"""
    from capgap.study import Way, create_study

    spec = _spec(study, overrides)
    if dry_run:
        _say_cost(spec, output, 1)
        return
    trials = create_study(spec, output, Way(storage=storage))
    print(f"{len(trials)} trials in {output}; capgap study run {output} runs them")


@app.command("run")
def run(
    study: Annotated[Path, typer.Argument(help="The study, a YAML file; or the folder of one that was created.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value with dotted keys.")] = None,
    output: Annotated[Path | None, typer.Option(help="The study's folder; it goes on in it.")] = None,
    workers: Workers = 1,
    processes: Processes = 1,
    storage: Storage = None,
    heartbeat: Heartbeat = 30,
    grace: Grace = 120,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost; run nothing.")] = False,
) -> None:
    """Runs what is not done yet. Example: capgap study run recipes/nano-study.yaml --output runs/nano --workers 2"""
    from capgap.errors import StudyError
    from capgap.study import Way, read_spec

    if study.is_dir():
        if overrides or output not in (None, study):
            raise StudyError(f"{study}: a study's folder holds what it is; give the YAML file to change it or move it")
        spec, output = read_spec(study), study
    else:
        spec = _spec(study, overrides)
    if output is None:
        raise StudyError(f"{study}: --output is missing; give the folder for the study")
    if dry_run:
        _say_cost(spec, output, workers)
        return
    way = Way(storage, workers, processes, heartbeat, grace)
    _run(spec, output, way)


@app.command("resume")
def resume(
    folder: Folder,
    workers: Workers = 1,
    processes: Processes = 1,
    storage: Storage = None,
    heartbeat: Heartbeat = 30,
    grace: Grace = 120,
) -> None:
    """Goes on with a study, trials that failed included. Example: capgap study resume runs/nano --workers 2"""
    from capgap.study import Way, read_spec

    _run(read_spec(folder), folder, Way(storage, workers, processes, heartbeat, grace), again=True)


@app.command("status")
def status(folder: Folder, storage: Storage = None) -> None:
    """Lists the trials and how far they are. Example: capgap study status runs/nano"""
    from capgap.study import study_status

    found = study_status(folder, storage)
    for name, state, loss in found.trials:
        print(f"{state:13} {name}" + (f"  {loss:.4f} nats per token" if loss is not None else ""))
        if name in found.errors and state in ("fail", "stopped early"):
            print(f"{'':13} {found.errors[name]}")
    print(", ".join(f"{count} {state}" for state, count in sorted(found.counts.items())))


@app.command("next")
def next_(
    folder: Folder,
    budget: Annotated[str, typer.Option(help="What may be spent: FLOPs, such as 2e15, or hours of a worker, 6h.")],
) -> None:
    """Proposes the runs that narrow the law's interval most. Example: capgap study next runs/nano --budget 6h"""
    from capgap.study import Family, flops_of_budget, next_trials, read_records, read_spec

    spec, records = read_spec(folder), read_records(folder)
    advice = next_trials(Family(spec), records, flops_of_budget(budget, records))
    for line in advice.lines():
        print(line)


@app.command("export")
def export(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="The file: .jsonl, .csv or .parquet.")],
    points: Annotated[bool, typer.Option("--points", help="Also the held-out losses measured on the way.")] = False,
) -> None:
    """Writes the results as one table. Example: capgap study export runs/nano --output nano.parquet"""
    from capgap.study import export_records, read_records, read_spec

    read_spec(folder)
    print(f"{export_records(read_records(folder), output, points=points)} rows in {output}")


@app.command("race")
def race(
    records: Annotated[Path, typer.Argument(help="Of full grids: the study's folder, or a JSONL file.")],
    share: Annotated[float, typer.Option(min=0.01, max=1, help="Of a grid's FLOPs that its race may take.")] = 0.4,
    tolerance: Annotated[float, typer.Option(min=0, help="By which a forecast must be worse, as a share.")] = 0.005,
) -> None:
    """Replays races on grids that were run in full. Example: capgap study race studies/nano/records.jsonl"""
    from capgap.cost import format_count
    from capgap.errors import StudyError
    from capgap.records import read
    from capgap.study import Race, replay

    file = records / "records.jsonl" if records.is_dir() else records
    found = replay(read(file), Race(share=share, tolerance=tolerance))
    if not found:
        raise StudyError(f"{records}: no student has all its teachers' records at two budgets, each its own start")
    for one in found:
        seeds = f"seed{'s' * (len(one.seeds) > 1)} {', '.join(map(str, one.seeds))}"
        name = " ".join(filter(None, [one.student, one.condition, seeds]))
        print(
            f"{name}, {format_count(one.tokens[-1])} tokens: {one.teacher} with {one.loss:.4f} nats per token, "
            f"{100 * one.above:.2f} % above the full grid's best ({one.best_teacher}, {one.best_loss:.4f}), "
            f"for {100 * one.share:.1f} % of its FLOPs"
        )


@app.command("report")
def report(
    folder: Folder,
    output: Annotated[
        Path | None, typer.Option(help="The folder for page and figures; in the study's if none.")
    ] = None,
    beside: Beside = None,
) -> None:
    """Writes the HTML page and PNG figures. Example: capgap study report runs/nano"""
    from capgap.report import read_studies, write_report
    from capgap.study import read_spec

    spec = read_spec(folder)
    title = f"Capacity gap study {spec.name or folder.name}"
    print(write_report(read_studies(folder, beside or ()), output or folder / "report", title=title).page)


def _spec(path: Path, overrides: list[str] | None) -> "StudySpec":
    from capgap.recipe import load
    from capgap.study import StudySpec

    return load(path, StudySpec, overrides or [])


def _run(spec: "StudySpec", output: Path, way: "Way", *, again: bool = False) -> None:
    from capgap.study import run_study

    records = run_study(spec, output, way=way, again=again)
    print(f"{len(records)} records in {output / 'records.jsonl'}")


def _say_cost(spec: "StudySpec", output: Path, workers: int) -> None:
    from capgap.study import Family, estimate_study, read_records

    for line in estimate_study(Family(spec), read_records(output)).lines(workers):
        print(line)
