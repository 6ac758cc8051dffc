"""study run, study status."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Runs grids of trials that survive being killed.")


@app.command("run")
def run(
    study: Annotated[Path, typer.Argument(help="The study, a YAML file.")],
    output: Annotated[Path, typer.Option(help="The study's folder; it goes on in it.")],
    workers: Annotated[int, typer.Option(help="Processes that share the cores.")] = 1,
) -> None:
    """Runs what is not done yet. Example: capgap study run recipes/nano-study.yaml --output runs/nano --workers 2"""
    from capgap.recipe import load
    from capgap.study import StudySpec, run_study

    records = run_study(load(study, StudySpec), output, workers=workers)
    print(f"{len(records)} records in {output / 'records.jsonl'}")


@app.command("status")
def status(folder: Annotated[Path, typer.Argument(help="The study's folder.")]) -> None:
    """Lists the trials and how far they are. Example: capgap study status runs/nano"""
    from capgap.study import study_status

    for name, state, loss in study_status(folder).trials:
        print(f"{state:10} {name}" + (f"  {loss:.4f} nats per token" if loss is not None else ""))
