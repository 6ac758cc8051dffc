"""Progress of long work: a bar on a terminal, plain lines in a log."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0

console = Console(stderr=True, highlight=False)
_shared_every: float | None = None


@contextlib.contextmanager
def sharing_the_screen(every: float = 60.0) -> Iterator[None]:
    """Meanwhile no bars: this process is one of several, or has many things to do, and says a line so often (s)."""
    global _shared_every
    before, _shared_every = _shared_every, every
    try:
        yield
    finally:
        _shared_every = before


def say(line: str, *, every_process: bool = False) -> None:
    """Prints one plain line of progress to standard error; under `torchrun` only the first process does."""
    if every_process or _speaks():
        print(line, file=sys.stderr, flush=True)


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


class Bar:
    """A context that shows how far some work has come.

    On a terminal it is a bar. Elsewhere it is a line every ten seconds and one at the end; within `sharing_the_screen`
    only the lines on the way.

    Args:
        title: what is being done.
        total: how much there is to do, in any unit; None where that is not known.
        quiet: show nothing.
    """

    def __init__(self, title: str, total: float | None, *, quiet: bool = False):
        self.title, self.total, self.quiet = title, total, quiet or not _speaks()
        self.done, self.note = 0.0, ""
        self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "Bar":
        if not self.quiet and console.is_terminal and _shared_every is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=console)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, note="")
        return self

    def to(self, done: float, note: str = "") -> None:
        """Says that `done` of the total is done, with a note such as the loss."""
        self.done, self.note = done, note
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
        elif not self.quiet:
            every = SECONDS_BETWEEN_LINES if _shared_every is None else _shared_every
            if time.monotonic() - self._last_line >= every:
                self._line()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None):
        if self._bar is not None:
            self._bar.stop()
        elif not self.quiet and kind is None and _shared_every is None:
            self._line()

    def _line(self) -> None:
        self._last_line = time.monotonic()
        share = f"{self.done / self.total:4.0%}" if self.total else f"{self.done:,.0f}"
        say(f"{self.title}: {share} {self.note}".rstrip())
