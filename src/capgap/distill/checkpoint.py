"""Checkpoints by torch.distributed.checkpoint: each appears whole or not at all, and loads on any number of processes.

`step-N/` holds the shards that the processes wrote, and `state.json`: what was measured, and every shard's hash.
"""

import contextlib
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from capgap.distill.processes import (
    any_process,
    first_process_says,
    gather_in_all,
    is_first_process,
    rank_and_world,
    wait_for_all,
    waiting_group,
)
from capgap.errors import CapgapError, CheckpointError
from capgap.files import hash_file, read_json, remove_leftovers, storage_errors, sync_tree, write_json
from capgap.progress import say

_STATE = "state.json"


class Checkpoints:
    """The checkpoints of one student in one folder.

    Args:
        folder: on storage that all processes see.
        identity: hash of what the run is made of; checkpoints of another are refused.
        keep: how many of the newest are kept; the one with the lowest held-out loss is kept beside them.
        asynchronous: write while training goes on.
    """

    def __init__(self, folder: Path, *, identity: str, keep: int, asynchronous: bool = False):
        self.folder, self.identity, self.keep, self.asynchronous = folder, identity, keep, asynchronous
        self._pending: tuple[Future, Path, dict[str, Any]] | None = None

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict[str, Any]) -> None:
        """Writes `step-N`. All processes call it. `facts` is JSON-like, and has `loss` where that was measured."""
        self.settle(wait=True)
        beside = self.folder / f".step-{step:09d}.tmp"
        tensors = _tensors(model, optimizer)
        alone = rank_and_world()[1] == 1
        with storage_errors(self.folder / f"step-{step:09d}"), _plainly():
            if is_first_process():
                shutil.rmtree(beside, ignore_errors=True)
                beside.mkdir(parents=True)
            # Each process makes the folder where it is not there, which must not come between these two.
            wait_for_all()
            facts = {"step": step, "identity": self.identity, **facts}
            try:
                if self.asynchronous:
                    started = async_save(tensors, checkpoint_id=beside, process_group=waiting_group(), no_dist=alone)
                    future = started.upload_completion if isinstance(started, AsyncSaveResponse) else started
                    self._pending = future, beside, facts
                    return
                save_shards(tensors, checkpoint_id=beside, process_group=waiting_group(), no_dist=alone)
                self._appear(beside, facts)
            except BaseException:
                shutil.rmtree(beside, ignore_errors=True)
                raise

    def settle(self, *, wait: bool = False) -> None:
        """Gives a checkpoint that was written meanwhile its name; `wait` for it, if it is still being written."""
        if self._pending is None:
            return
        future, beside, facts = self._pending
        if not wait and any_process(not future.done()):
            return
        self._pending = None
        with storage_errors(beside), _plainly():
            future.result()
            self._appear(beside, facts)

    def _appear(self, beside: Path, facts: dict[str, Any]) -> None:
        rank = rank_and_world()[0]
        mine = [path for path in beside.iterdir() if path.name.startswith(f"__{rank}_")]
        mine += [beside / ".metadata"] if rank == 0 else []
        hashes: dict[str, str] = {}
        for part in gather_in_all({path.name: hash_file(path) for path in mine}):
            hashes |= part
        if is_first_process():
            write_json(beside / _STATE, {**facts, "sha256": hashes})
            sync_tree(beside)
            place = self.folder / f"step-{facts['step']:09d}"
            shutil.rmtree(place, ignore_errors=True)
            beside.rename(place)
            self._remove_old()

    def _remove_old(self) -> None:
        found = sorted(self.folder.glob("step-*"))
        measured = [(loss, path) for path in found if (loss := read_json(path / _STATE).get("loss")) is not None]
        best = min(measured)[1] if measured else None
        for path in found[: -self.keep]:
            if path != best:
                shutil.rmtree(path)

    def load_newest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Restores the newest sound checkpoint; a damaged one is passed over with a warning. All processes call it.

        Returns: its facts; None where there is no checkpoint.
        Raises: CheckpointError if it belongs to another run, or all are damaged.
        """
        found = first_process_says(self._newest)
        if isinstance(found, str):
            raise CheckpointError(found)
        if found is None:
            return None
        path, facts = found
        tensors = _tensors(model, optimizer)
        with _plainly():
            load_shards(tensors, checkpoint_id=path, process_group=waiting_group(), no_dist=rank_and_world()[1] == 1)
        return facts

    def _newest(self) -> tuple[Path, dict[str, Any]] | str | None:
        """The newest sound checkpoint, None where there is none, or what is wrong."""
        if not self.folder.is_dir():
            return None
        remove_leftovers(self.folder)
        found = sorted(self.folder.glob("step-*"), reverse=True)
        for path in found:
            try:
                facts = read_json(path / _STATE)
                for name, expected in facts["sha256"].items():
                    if not (path / name).is_file() or hash_file(path / name) != expected:
                        raise CheckpointError(
                            f"{path / name}: damaged or cut off (its hash is not the one written down)"
                        )
            except (CapgapError, KeyError, TypeError, AttributeError) as error:
                say(f"warning: {error}; the checkpoint before it is tried")
                continue
            if facts["identity"] != self.identity:
                return (
                    f"{path}: belongs to a run with another recipe, data, start or teacher; "
                    "remove the folder to start over, or give another output"
                )
            return path, facts
        return f"{self.folder}: every checkpoint is damaged; remove the folder to start over" if found else None


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """Without `torchrun` there is one process on purpose, which torch.distributed.checkpoint warns of; and it wraps
    what the operating system refuses in an exception of its own, which is not an Exception."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and AdamW's state by name, the live tensors themselves; loading writes into them."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight/{name}"] = parameter.detach()
        if not parameter.requires_grad:
            continue
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            tensors[f"{key}/{name}"] = cast(Tensor, state[key]).detach()
    return tensors
