"""What the benchmarks share: interleaved rounds, ratios with their spread, peak memory, a table, a JSON file."""

import gc
import json
import multiprocessing
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from rich.console import Console
from rich.table import Table

console = Console(width=None if sys.stdout.isatty() else 120)


class Spread(NamedTuple):
    """The middle of repeated measurements and how far they lie apart."""

    median: float
    lower_quartile: float
    upper_quartile: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lowest:.2f} to {self.highest:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    return Spread(statistics.median(values), quartiles[0], quartiles[2], min(values), max(values))


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of above / below taken round by round, so that what slows a whole round cancels."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def interleaved(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    *,
    quiet_within: float,
    clock: Callable[[], float] = time.perf_counter,
    tries: int = 4,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Every round runs all ways once in a new random order; one more round runs before the first and is not kept.

    Args:
        quiet_within: a measurement waits (a minute at most) until other programs have no more than this share of the
            processors, and is taken again, up to `tries` times in all, where they had more during it; the least
            disturbed one is kept, whatever its time. 1 means never.
        clock: time.process_time counts only what this program had of the processors.
    Returns: the seconds of each way in each round, and the others' share in each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    shares: dict[str, list[float]] = {name: [] for name in ways}
    order, draw = list(ways), random.Random(seed)
    for number in range(rounds + 1):
        tell(f"round {number} of {rounds}" if number else "warm-up round")
        draw.shuffle(order)
        for name in order:
            taken: list[tuple[float, float]] = []
            while not taken or (number and len(taken) < tries and min(taken)[0] > quiet_within):
                _wait_for_quiet(quiet_within)
                taken.append(_timed(ways[name], device, clock))
            if number:
                share, best = min(taken)
                seconds[name].append(best)
                shares[name].append(round(share, 3))
    return seconds, shares


def _timed(
    way: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """The share of the processors that other programs had meanwhile, and the seconds by the clock."""
    gc.collect()
    synchronise(device)
    others, wall, started = _others_seconds(), time.perf_counter(), clock()
    way()
    synchronise(device)
    seconds, wall = clock() - started, time.perf_counter() - wall
    # Processor time is counted in hundredths of a second, so that the share of a short run is rough.
    return max(0.0, _others_seconds() - others - 0.02) / (wall * (psutil.cpu_count() or 1)), seconds


def _wait_for_quiet(within: float, at_most: float = 60.0) -> None:
    waited = time.monotonic()
    while time.monotonic() - waited < at_most:
        if _timed(lambda: time.sleep(0.4), torch.device("cpu"))[0] <= within:
            return


def _others_seconds() -> float:
    times, own = psutil.cpu_times(), psutil.Process().cpu_times()
    # What a guest machine takes is within `user` and `nice` too.
    not_busy = sum(getattr(times, name, 0.0) for name in ("idle", "iowait", "guest", "guest_nice"))
    return sum(times) - not_busy - own.user - own.system


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result from a new interpreter, so that no other measurement's memory is counted."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_bytes(action: Callable[[], Any], device: torch.device) -> int | None:
    """What an action takes at its peak above what is held before it; None if it does not fit in this machine.

    On a CPU it holds only in a process whose peak so far is no higher than what it holds now; see in_own_process.
    """
    gc.collect()
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        before = psutil.Process().memory_info().rss
        # An allocation beyond what is free fails here, instead of something else on the machine being killed for it.
        room = before + int(0.95 * psutil.virtual_memory().available)
        resource.setrlimit(resource.RLIMIT_DATA, (room, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        action()
        synchronise(device)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(
            words in str(error) for words in ("can't allocate memory", "out of memory")
        ):
            raise
        return None
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - before
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - before


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were taken on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    return {
        "cpu": cpu,
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, all others to the right."""
    console.print(f"\n{title}")
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write_results(file: Path | None, results: Mapping[str, Any]) -> None:
    """As JSON; with no file it does nothing."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
