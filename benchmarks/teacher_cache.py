"""How fast a student trains from a teacher cache, beside the teacher itself and beside no teacher at all.

The student and its teacher are those of distill_throughput.py, about 13 and 35 million parameters at a vocabulary of
32,000. A step is what the training loop does in one: rows, the teacher's targets (from the models, or read from the
cache's files), the fused objective, clipping, AdamW. Making the cache is timed in the same rounds; after as many
students as `pays off after` says, that and training from it took less time than running the teacher for each of them.
`4 side by side` is one step of four students with one pass of the teacher; it is compared with four steps of one.
The files are small and stay in the operating system's memory: a disk that is slower than training reads is not
measured. The teacher is random, so that draws from it are as distinct as they can be.

    python benchmarks/teacher_cache.py --rounds 7 --json results.json
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _measure import interleaved, machine, print_table, ratios, spread, write_results
from capgap.distill import CachedTeacher, Divergence, Mix, Objective, OnlineTeacher, Teacher
from capgap.distill.caching import write_cache
from capgap.distill.targets import for_several
from capgap.models import default_device
from distill_throughput import KD_WEIGHT, Setup, adamw, clip_and_step, label, models

STEPS_CACHED = 2
TOGETHER = 4
SIDE_BY_SIDE = f"{TOGETHER} side by side"
KINDS: dict[str, tuple[str, int | None]] = {
    "sampled 64": ("sampled", 64),
    "top-k 64": ("topk", 64),
    "dense": ("dense", None),
}


class Text:
    """The ids of a setting's steps, by block number."""

    def __init__(self, setup: Setup):
        self.rows = torch.cat([setup.ids(step) for step in range(STEPS_CACHED)])

    def numbered(self, number: int) -> np.ndarray:
        return self.rows[number].cpu().numpy()


def make_cache(setup: Setup, teacher: OnlineTeacher, kind: str, k: int | None, folder: Path) -> CachedTeacher:
    """The cache of a few steps."""
    text = Text(setup)
    facts: dict[str, Any] = dict.fromkeys(("teacher", "teacher_config", "tokenizer", "data"), "")
    facts |= {"block": setup.length, "blocks": len(text.rows), "vocabulary": setup.vocabulary, "temperature": 1.0}
    facts |= {"kind": kind, "k": k, "seed": 0 if kind == "sampled" else None}
    write_cache(
        lambda: teacher,
        text,
        folder,
        facts,
        rows=setup.tokens // setup.length,
        autocast=setup.autocast,
        device=torch.device(setup.device),
        quiet=True,
    )
    return CachedTeacher.open(folder, facts)


def stepper(setup: Setup, teacher: Teacher | None, students: int = 1) -> Callable[[], None]:
    """One optimiser step of every student a call, on the steps of the text in turn."""
    learners = []
    for _ in range(students):
        student, _ = models(setup)
        learners.append((Objective(student, Mix(Divergence(), KD_WEIGHT, 1.0, setup.chunk_tokens)), adamw(student)))
    rows = setup.tokens // setup.length
    numbers = torch.arange(rows * STEPS_CACHED).split(rows)
    turn = 0

    def step() -> None:
        nonlocal turn
        ids = setup.ids(turn % STEPS_CACHED)
        with setup.autocast():
            targets = None if teacher is None else teacher.targets(ids[:, :-1], numbers[turn % STEPS_CACHED])
            targets = for_several(targets) if students > 1 else targets
        for objective, optimizer in learners:
            with setup.autocast():
                sums = objective(ids[:, :-1], ids[:, 1:], targets)
            (sums.loss / setup.tokens).backward()
            clip_and_step(objective.student, optimizer)
        turn += 1

    return step


def measure(setup: Setup, rounds: int, steps: int, quiet_within: float, place: Path) -> dict[str, Any]:
    """Seconds a step of each way, how much faster than online, and what the caches take."""
    online = OnlineTeacher(models(setup)[1])
    caches = {name: make_cache(setup, online, *KINDS[name], place / f"{label(setup)} {name}") for name in KINDS}
    teachers: dict[str, Teacher | None] = {"online": online, "no teacher": None, **caches}

    def repeated(way: Callable[[], None]) -> Callable[[], Any]:
        return lambda: [way() for _ in range(steps)]

    def making(name: str) -> Callable[[], Any]:
        def make() -> None:
            with tempfile.TemporaryDirectory(dir=place) as again:
                make_cache(setup, online, *KINDS[name], Path(again))

        return make

    timed, disturbed = interleaved(
        {
            **{name: repeated(stepper(setup, teacher)) for name, teacher in teachers.items()},
            SIDE_BY_SIDE: repeated(stepper(setup, online, TOGETHER)),
            **{f"making {name}": making(name) for name in KINDS},
        },
        rounds,
        torch.device(setup.device),
        quiet_within=quiet_within,
        tell=lambda text: print(f"  {label(setup)}: {text}", file=sys.stderr, flush=True),
    )
    seconds = {name: [value / steps for value in timed[name]] for name in teachers}
    seconds[SIDE_BY_SIDE] = [value / steps / TOGETHER for value in timed[SIDE_BY_SIDE]]
    faster = {name: ratios(seconds["online"], seconds[name]) for name in seconds if name != "online"}
    facts: dict[str, Any] = {}
    for name, cache in caches.items():
        made = [value / STEPS_CACHED for value in timed[f"making {name}"]]
        saved = spread(seconds["online"]).median - spread(seconds[name]).median
        pays_off = spread(made).median / saved if saved > 0 else None
        facts[name] = {"bytes_per_token": cache.bytes_per_token, "seconds_to_make": made, "pays_off_after": pays_off}
    return {"seconds": seconds, "others_share": disturbed, "faster_than_online": faster, "caches": facts}


def report(setup: Setup, result: dict[str, Any]) -> None:
    columns = ["way", "s a step", "tokens a second", "times online", "bytes a token", "s to make", "pays off after"]
    rows = []
    for name, seconds in result["seconds"].items():
        middle, cache = spread(seconds).median, result["caches"].get(name)
        after = cache and cache["pays_off_after"]
        rows.append(
            [
                name,
                f"{middle:.3f}",
                f"{setup.tokens / middle:,.0f}",
                "" if name == "online" else str(result["faster_than_online"][name]),
                f"{cache['bytes_per_token']:,.0f}" if cache else "",
                f"{spread(cache['seconds_to_make']).median:.3f}" if cache else "",
                f"{after:.1f} students" if after else "",
            ]
        )
    print_table(f"{label(setup)}, {setup.tokens:,} tokens a step in rows of {setup.length}", columns, rows)


def settings(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[32_000])
    parser.add_argument("--precision", nargs="+", choices=["bf16", "float32"], default=["float32"])
    parser.add_argument("--tokens", type=int, default=2048, help="of a step")
    parser.add_argument("--length", type=int, default=256, help="of a row")
    parser.add_argument("--layers", type=int, default=9, help="of the student; the teacher's follow")
    parser.add_argument("--rounds", type=int, default=5, help="kept; one more runs first")
    parser.add_argument("--steps", type=int, default=2, help="of a way in a round")
    parser.add_argument("--quiet-within", type=float, default=0.1, help="share of the processors left to others")
    parser.add_argument("--quick", action="store_true", help="small: whether it runs, not how fast")
    parser.add_argument("--json", type=Path, help="write all measurements here")
    args = parser.parse_args(argv)
    if args.quick:
        args.vocabulary, args.tokens, args.length, args.layers, args.rounds, args.steps = [4096], 256, 64, 3, 2, 1
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints tables, writes the JSON file that was asked for."""
    args = settings(argv)
    device = default_device()
    shape = (args.tokens, args.length, None, False, args.layers, device.type)
    first = Setup(args.vocabulary[0], args.precision[0], *shape)  # pyright: ignore[reportArgumentType]
    results = []
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="teacher-cache-")))
        for vocabulary in args.vocabulary:
            for precision in args.precision:
                setup = replace(first, vocabulary=vocabulary, precision=precision)
                result = measure(setup, args.rounds, args.steps, args.quiet_within, place)
                report(setup, result)
                results.append({"setup": vars(setup), **result})
    write_results(args.json, {"machine": machine(device), "results": results})


if __name__ == "__main__":
    main()
