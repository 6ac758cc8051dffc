"""A checkpoint that is cut on disk, beside a plain copy of the same files: bytes read a second, and peak memory.

The checkpoint is made for it: a Llama of 3.2 billion random weights in bfloat16, in files of at most 1 GB, cut to 1.2
billion. Both read it from the disk (what the system kept of it in memory is dropped before), write to the same disk,
and end when the disk has all of it. Needs 12 GB of free disk below --folder.

    python benchmarks/cut_checkpoint.py --folder /tmp --rounds 3
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from _measure import machine, print_table, ratios, write_results
from capgap.anatomy import anatomy_of
from capgap.files import sync_tree
from capgap.models import bare_model, default_device, load_config
from capgap.prune import Scores, cut_folder, select, solve_shape

SHARD_BYTES = 10**9
# 28 layers of hidden size 3,072: 3.2 billion; tests of the script itself make it smaller.
FULL = {"num_hidden_layers": 28, "hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 128_256}
QUICK = {"num_hidden_layers": 4, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 16_000}


def make_checkpoint(folder: Path, sizes: dict[str, int]) -> None:
    """Random weights, a file at a time."""
    config = LlamaConfig(
        **sizes,  # pyright: ignore[reportArgumentType]
        num_attention_heads=sizes["hidden_size"] // 128,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir()
    config.save_pretrained(folder)
    some = torch.randn(1 << 24).bfloat16() / 50
    held: dict[str, torch.Tensor] = {}
    files = 0
    for name, parameter in [*bare_model(config).named_parameters(), ("", None)]:
        size = 0 if parameter is None else 2 * parameter.numel()
        if held and (parameter is None or sum(t.nbytes for t in held.values()) + size > SHARD_BYTES):
            save_file(held, folder / f"model-{files:05}.safetensors", metadata={"format": "pt"})
            held, files = {}, files + 1
        if parameter is not None:
            held[name] = some.repeat(-(-parameter.numel() // len(some)))[: parameter.numel()].view(parameter.shape)
    sync_tree(folder)


def forget(folder: Path) -> None:
    """Has the system drop what it keeps of the files in memory."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def highest_memory() -> int:
    """The most memory that this program had, in bytes, pages of mapped files included; getrusage's is the parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


def cut(start: Path, target: Path, parameters: int) -> None:
    """The work that is measured, in a process of its own; prints seconds and peak memory, of it and of its imports."""
    anatomy = anatomy_of(load_config(start))
    have = anatomy.shape
    shape = solve_shape(anatomy, parameters, multiple=64)
    torch.manual_seed(0)
    scores = Scores(
        torch.rand(have.hidden), torch.rand(have.layers, have.kv_heads), torch.rand(have.layers, have.neurons)
    )
    before = highest_memory()
    began = time.perf_counter()
    cut_folder(start, select(scores, shape), target, tokenizer=None, lineage={}, quiet=True)
    took = time.perf_counter() - began
    print(took, highest_memory(), before)


def copy(start: Path, target: Path) -> float:
    """Seconds that a plain copy takes until the disk has it."""
    began = time.perf_counter()
    shutil.copytree(start, target)
    sync_tree(target)
    return time.perf_counter() - began


class Found(NamedTuple):
    """Bytes of the checkpoint and of what is cut, bytes read a second in each round, and memory of each cut."""

    read: int
    written: int
    rates: dict[str, list[float]]
    memory: list[dict[str, float]]


def measure(folder: Path, rounds: int, sizes: dict[str, int], parameters: int) -> Found:
    """Copies and cuts in turn."""
    start, target = folder / "start", folder / "target"
    make_checkpoint(start, sizes)
    size, written = sum(file.stat().st_size for file in start.glob("*.safetensors")), 0
    rates: dict[str, list[float]] = {"copy": [], "cut": []}
    memory = []
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        forget(start)
        rates["copy"].append(size / copy(start, target))
        shutil.rmtree(target)
        forget(start)
        done = subprocess.run(
            [sys.executable, __file__, "--cut", start, target, str(parameters)], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        seconds, peak, before = map(float, done.stdout.split())
        rates["cut"].append(size / seconds)
        memory.append({"peak": peak, "before": before})
        written = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        shutil.rmtree(target)
    return Found(size, written, rates, memory)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints a table, writes the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files go")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a small checkpoint: whether it runs")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--cut", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cut:
        cut(Path(args.cut[0]), Path(args.cut[1]), int(args.cut[2]))
        return
    sizes, parameters, rounds = (QUICK, 40_000_000, 1) if args.quick else (FULL, 1_200_000_000, args.rounds)
    with tempfile.TemporaryDirectory(prefix="cut-", dir=args.folder) as place:
        found = measure(Path(place), rounds, sizes, parameters)
    rows = [[name, *(f"{rate / 1e6:,.0f}" for rate in found.rates[name])] for name in ("copy", "cut")]
    title = f"MB read a second; {found.read / 1e9:.1f} GB read, {found.written / 1e9:.1f} GB of the cut written"
    print_table(title, ["", *(f"round {number + 1}" for number in range(rounds))], rows)
    print(f"cut / copy: {ratios(found.rates['cut'], found.rates['copy'])}")
    peak = max(found.memory, key=lambda row: row["peak"])
    print(f"peak memory: {peak['peak'] / 1e9:.2f} GB, of that {peak['before'] / 1e9:.2f} GB before the first weight")
    write_results(args.json, {"machine": machine(default_device()), **found._asdict()})


if __name__ == "__main__":
    main()
