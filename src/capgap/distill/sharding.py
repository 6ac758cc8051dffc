"""How a student and its teacher lie on the devices: whole on each (DDP), or in shards (FSDP2)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from capgap.distill.objective import Objective
from capgap.distill.processes import join_alone, rank_and_world, release_when_leaving
from capgap.distill.teacher import OnlineTeacher
from capgap.errors import RecipeError
from capgap.recipe import Train


def place_student(objective: Objective, settings: Train, device: torch.device) -> nn.Module:
    """Moves the student to its device or devices; the module to call in training.

    Under DDP that is a wrapper of `objective`, else `objective` itself, its weights sharded where asked for.
    """
    world = rank_and_world()[1]
    if settings.activation_checkpointing:
        objective.student.activation_checkpointing_enable({"use_reentrant": False})
    if world == 1 or settings.parallel == "ddp":
        objective.to(device)
        if settings.compile is True:
            objective.student.base_model.compile()
        return DistributedDataParallel(objective) if world > 1 else objective
    if settings.compile is True:
        for layer in _layers(objective.student):
            layer.compile()
    _shard(objective.student, objective, _mixed(settings, device), _mesh(settings, device), device, OffloadPolicy())
    return objective


def place_teacher(teacher: OnlineTeacher, settings: Train, device: torch.device) -> None:
    """Moves the frozen models to their device or devices, sharded like the student."""
    if rank_and_world()[1] == 1 or settings.parallel == "ddp":
        if settings.teacher_offload:
            raise RecipeError("distill.teacher_offload = true needs distill.parallel = fsdp or hsdp, under torchrun")
        for body in teacher.bodies:
            body.to(device)
        return
    offload = _offload(settings.teacher_offload, device)
    for body in teacher.bodies:
        _shard(body.model, body, _mixed(settings, device), _mesh(settings, device), device, offload)


def shard(
    model: PreTrainedModel, root: nn.Module, settings: Train | None, device: torch.device, *, offload: bool
) -> None:
    """Splits a model over the processes, or keeps it in shards of one process, in the precision that it has.

    Args:
        root: the module that is called, of which `model` is a part.
        settings: `parallel` and `shard_size` are read.
        offload: weights and gradients lie in CPU memory, and are on the device only while they are used.
    """
    _shard(model, root, MixedPrecisionPolicy(), _mesh(settings, device), device, _offload(offload, device))


def set_gradient_sync(model: nn.Module, wanted: bool) -> None:
    """Whether the next backward pass adds up gradients over the processes."""
    if isinstance(model, DistributedDataParallel):
        model.require_backward_grad_sync = wanted
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(wanted)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def _shard(
    model: PreTrainedModel,
    root: nn.Module,
    mixed: MixedPrecisionPolicy,
    mesh: DeviceMesh,
    device: torch.device,
    offload: OffloadPolicy,
) -> None:
    if not isinstance(offload, CPUOffloadPolicy):
        root.to(device)
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=mixed, offload_policy=offload)
    # The root's own weights (embeddings, last norm, head) stay whole from its forward on: the head is read after it.
    fully_shard(root, mesh=mesh, mp_policy=mixed, offload_policy=offload, reshard_after_forward=False)


def _offload(wanted: bool, device: torch.device) -> OffloadPolicy:
    return CPUOffloadPolicy(pin_memory=device.type == "cuda") if wanted else OffloadPolicy()


def _mixed(settings: Train, device: torch.device) -> MixedPrecisionPolicy:
    half = bfloat16_wanted(settings.precision, device) and device.type == "cuda"
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32)


def whole_weights(student: PreTrainedModel) -> dict[str, Tensor] | None:
    """The weights put together again on the first process's CPU; None where they are whole. All processes call it."""
    if not any(isinstance(parameter, DTensor) for parameter in student.parameters()):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(student, options=options)  # pyright: ignore[reportReturnType]


def bfloat16_wanted(precision: str, device: torch.device) -> bool:
    """Whether activations are bfloat16: as asked for, or by `auto` where the device has it."""
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bfloat16" or (precision == "auto" and has_it)


def _mesh(settings: Train | None, device: torch.device) -> DeviceMesh:
    join_alone()
    world = dist.get_world_size()
    sizes, names = (world,), ("shard",)
    if settings is not None and settings.parallel == "hsdp":
        within = settings.shard_size or (torch.cuda.device_count() if device.type == "cuda" else world)
        if world % within:
            raise RecipeError(
                f"distill.shard_size = {within}: {world} processes cannot be split into groups of that many"
            )
        sizes, names = (world // within, within), ("replicate", "shard")
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    release_when_leaving(mesh)
    return mesh
