"""`capgap`: the commands in the order in which they are used, and how errors are shown."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from capgap.errors import CapgapError
from capgap.progress import say


class _Commands(TyperGroup):
    """Lists the commands in the order in which they are used; typer would put `study`, a group, last."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(ORDER)

    def invoke(self, ctx: Any) -> Any:
        """Runs a command; typer would end an interruption without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            # A `capgap.distill.Stopped` has something to say, and may be what a scheduler asked for.
            say(str(stop) or "stopped; the same command goes on from here")
            sys.exit(0 if getattr(stop, "terminated", False) else 130)


ORDER = (
    "plan",
    "pack",
    "pretrain",
    "shapes",
    "prune",
    "cache",
    "distil",
    "eval",
    "run",
    "law",
    "study",
    "report",
    "demo",
)

app = typer.Typer(
    name="capgap",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Which teacher for the student you want? Plan, prune, distil, evaluate, and measure the law of capacity "
    "gap. First look: [bold]capgap demo[/bold]. Real models: [bold]capgap plan[/bold], then "
    "[bold]capgap run RECIPE.yaml[/bold].",
)


def main() -> None:
    """Runs a command; a CapgapError is one message and exit status 2, an interruption 130."""
    from capgap.cli import commands

    if not app.registered_commands:
        commands.register(app)
    try:
        app(standalone_mode=True)
    except CapgapError as error:
        say(f"error: {error}", every_process=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
