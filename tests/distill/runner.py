"""One small distillation in processes of its own, to be killed: python runner.py FOLDER STEPS [key=value ...].

`stop_at=N` asks itself to stop at step N, as a scheduler would; `kill_at=N` kills the last process there, once.
`late_first=S` keeps the first process back by S seconds whenever it has removed a folder.
"""

import atexit
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from capgap.distill import OnlineTeacher, Run, Stopped, Trained, is_first_process, train, whole_weights
from capgap.recipe import Train
from tiny import tiny_model

BLOCK = 16


class RandomBatches:
    """Ids that are a pure function of the step."""

    def rows(self, step: int, rank: int, world: int) -> torch.Tensor:
        ids = torch.randint(0, 64, (8, BLOCK + 1), generator=torch.Generator().manual_seed(step))
        return ids[rank * 8 // world : (rank + 1) * 8 // world]

    def numbers(self, step: int, rank: int, world: int) -> torch.Tensor:
        return torch.arange(8 * step, 8 * step + 8)[rank * 8 // world : (rank + 1) * 8 // world]

    def describe(self, step: int) -> str:
        return f"the random batch {step}"


class Interrupted(RandomBatches):
    """The same batches; at one step a signal comes."""

    def __init__(self, at: int, number: int, once: Path):
        self.at, self.number, self.once = at, number, once

    def rows(self, step: int, rank: int, world: int) -> torch.Tensor:
        mine = self.number == signal.SIGTERM or rank == world - 1
        if step == self.at and mine and not self.once.exists():
            self.once.write_text("sent")
            os.kill(os.getpid(), self.number)
        return super().rows(step, rank, world)


def settings(steps: int, **more) -> Train:
    return Train(tokens=128 * steps, tokens_per_step=128, **{"lr": 1e-3, "checkpoint_every": 0.05, **more})


def distil(folder: Path, chosen: Train, *, student=None, teacher=None, batches=None) -> tuple[dict, Trained]:
    """The trained weights by name, and what came of it."""
    student = student or tiny_model(seed=1)
    run = Run(student, chosen, folder)
    teacher = OnlineTeacher(teacher or tiny_model(seed=2))
    trained = train(run, batches or RandomBatches(), block=BLOCK, teacher=teacher, quiet=True)
    whole = whole_weights(student)
    return whole or {n: p.detach().clone() for n, p in student.named_parameters()}, trained


def check_threads() -> None:
    """Ends the process with status 9 if threads of torch's groups outlive them: one of those may abort it."""
    tasks = Path("/proc/self/task")  # only Linux has it
    names = [(task / "comm").read_text().strip() for task in tasks.iterdir()] if tasks.is_dir() else []
    if "pt_gloo_runloop" in names:
        print(f"threads are left: {names}", file=sys.stderr, flush=True)
        os._exit(9)


def main(folder: Path, steps: int, more: dict[str, object]) -> None:
    torch.set_num_threads(1)
    atexit.register(check_threads)  # what is registered first is called last
    late = float(str(more.pop("late_first", 0)))
    if late and os.environ.get("RANK") == "0":
        remove = shutil.rmtree

        def remove_and_wait(*args, **kwargs):
            remove(*args, **kwargs)
            time.sleep(late)

        shutil.rmtree = remove_and_wait
    batches = RandomBatches()
    for key, number in (("stop_at", signal.SIGTERM), ("kill_at", signal.SIGKILL)):
        if key in more:
            rank = os.environ.get("RANK", "0")
            batches = Interrupted(int(str(more.pop(key))), number, folder / f"{key}-{rank}")
    try:
        weights, trained = distil(folder / "checkpoints", settings(steps, **more), batches=batches)
    except Stopped as stop:
        print(stop)
        return
    if is_first_process():
        weights.pop("lm_head.weight", None)  # tied
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "final.safetensors")
        (folder / "curve.json").write_text(json.dumps([row["ce"] for row in trained.curve]))


if __name__ == "__main__":
    words = dict(word.split("=") for word in sys.argv[3:])
    main(Path(sys.argv[1]), int(sys.argv[2]), {key: yaml.safe_load(value) for key, value in words.items()})
