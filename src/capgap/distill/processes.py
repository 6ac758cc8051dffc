"""The processes of one run: one alone, or one for each device under `torchrun`."""

import atexit
import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from capgap.models import default_device

# Packing or scoring by the first process may take days; the others wait.
_PATIENCE = timedelta(days=30)
_waiting_group: Any = None
_meshes: list[DeviceMesh] = []

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are; joins them on the first call under `torchrun`."""
    global _waiting_group
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(default_device())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store, rank, world = next(iter(rendezvous("env://")))
        dist.init_process_group(backend, store=_of_this_start(store), rank=rank, world_size=world)
        atexit.register(_leave)
        _waiting_group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return dist.get_rank(), dist.get_world_size()


def join_alone() -> None:
    """Makes a group of this process alone, where there is none; offloading to CPU memory needs one."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        atexit.register(_leave)


def _of_this_start(store: Store) -> Store:
    """The store without what processes wrote before `torchrun --max-restarts` started them anew.

    torchrun keeps one store for all starts, where new processes would read the addresses of the dead
    (github.com/pytorch/pytorch/issues/135712). Each node counts its own starts, so on several nodes the
    count names no common start; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 makes torchrun take a new store.
    """
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        return store
    return PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def release_when_leaving(mesh: DeviceMesh) -> None:
    """Lets go of the mesh's groups as the process ends; DTensor's caches hold the mesh itself to the last."""
    _meshes.append(mesh)


def _leave() -> None:
    """Ends the groups' threads while the interpreter still runs.

    One that still has to give back the tensors of a finished operation aborts a process that is already finalizing
    (github.com/pytorch/pytorch/issues/190489). A group's threads end with the last reference to it, which may lie in
    a cycle of a sharded model's.
    """
    global _waiting_group
    _waiting_group = None
    if dist.is_initialized():
        dist.destroy_process_group()
    for mesh in _meshes:
        getattr(mesh, "_pg_registry", {}).clear()
    _meshes.clear()
    gc.collect()


def is_first_process() -> bool:
    """Whether this process is the one that writes, under `torchrun` or without it."""
    return rank_and_world()[0] == 0


def wait_for_all() -> None:
    """Returns when every process of the run has come here."""
    if rank_and_world()[1] > 1:
        dist.barrier(_waiting_group)


def first_process_first(work: Callable[[], T]) -> T:
    """Calls `work` in the first process, then in the others, which find on disk what it made."""
    if is_first_process():
        result = work()
        wait_for_all()
        return result
    wait_for_all()
    return work()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    if rank_and_world()[1] == 1:
        return flag
    shared = torch.tensor(float(flag))
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return bool(shared.item())


def sum_over_processes(*values: float) -> list[float]:
    """Each value, summed over all processes in double precision."""
    if rank_and_world()[1] == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(shared)
    return shared.tolist()


def waiting_group() -> Any:
    """The CPU group whose operations may take days; None without `torchrun`."""
    rank_and_world()
    return _waiting_group


def gather_in_all(value: T) -> list[T]:
    """Every process's value, in the order of ranks, in all processes. The values are pickled."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    found: list[Any] = [None] * world
    dist.all_gather_object(found, value, group=_waiting_group)
    return found


def first_process_says(ask: Callable[[], T]) -> T:
    """What `ask` returns in the first process, in all processes."""
    if rank_and_world()[1] == 1:
        return ask()
    box = [ask() if is_first_process() else None]
    dist.broadcast_object_list(box, src=0, group=_waiting_group)
    return cast(T, box[0])
