"""Cuts a student out of a checkpoint on disk, weight by weight, however large the checkpoint is."""

import json
import os
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from capgap.anatomy import EXPERT, Anatomy, Dimension, Stacked, Weight, anatomy_of, length
from capgap.errors import ModelError
from capgap.files import LINEAGE, atomic_folder, read_json, write_json
from capgap.models import SHARD_BYTES, bare_model, first_line, load_config, quiet_transformers
from capgap.progress import Bar
from capgap.prune.cut import Cutter, Keep, rescaled

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint.

    Attributes:
        file, name: where it lies.
        parameter: the model's parameter that it is, or is a part of.
        layer: None outside the layers.
        row, axes: what its dimensions are.
        expert: of what expert, where each has tensors of its own.
    """

    file: Path
    name: str
    parameter: str
    layer: int | None
    row: Weight
    axes: tuple[Dimension, ...]
    expert: int | None = None


def cut_folder(
    start: Path,
    keep: Keep,
    folder: Path,
    *,
    tokenizer: Any,
    lineage: dict[str, Any],
    shard_bytes: int = SHARD_BYTES,
    quiet: bool = False,
) -> None:
    """Writes the student that `keep` names, cut from the checkpoint in `start`, whole or not at all.

    Weights are read, cut and written one after the other, in the precision and with the names that they have there;
    a file of the student holds what is left of one of the start's. Memory goes to one weight, what is cut of it, and
    the file that is being filled.

    Args:
        tokenizer: what is saved with the model; None for none.
        shard_bytes: a larger file is split.
    Raises: ModelError that names the file and the weight which is missing, damaged, of a wrong shape or not finite;
        ShapeError if the installed transformers refuses the shape.
    """
    start = Path(start)
    config = load_config(start)
    if getattr(config, "quantization_config", None):
        raise ModelError(f"{start / 'config.json'}: has a quantization_config; only unquantised weights can be cut")
    anatomy = anatomy_of(config)
    student = anatomy.config_at(keep.shape, keep.layers)
    there = stored_tensors(start, anatomy)
    kept = [part for part in there if _is_kept(part, keep)]
    cutter = Cutter(anatomy, keep)
    with atomic_folder(folder) as beside, Bar("cutting", len(kept), quiet=quiet) as bar:
        shards = _Shards(beside, shard_bytes)
        file = None
        for number, part in enumerate(kept, start=1):
            if part.file != file:
                shards.flush()
                file = part.file
                _fetch_ahead(file)
            shards.add(_renamed(part, anatomy, keep), _cut(part, anatomy, cutter))
            bar.to(number)
        shards.finish()
        with quiet_transformers():
            student.save_pretrained(beside)
            if tokenizer is not None:
                tokenizer.save_pretrained(beside)
        if (start / "generation_config.json").is_file():
            shutil.copyfile(start / "generation_config.json", beside / "generation_config.json")
        write_json(beside / LINEAGE, lineage)


def stored_tensors(folder: Path, anatomy: Anatomy) -> list[Stored]:
    """The tensors of a checkpoint that the installed transformers reads, file by file; none of them is loaded.

    Raises: ModelError that names the file, and the weight that is missing or of a wrong shape.
    """
    understood = _Names(anatomy)
    sizes = anatomy.sizes()
    found: list[Stored] = []
    for file, tensors in _files(folder).items():
        for name, shape in tensors.items():
            part = understood.place(file, name)
            if part is None:
                continue
            wanted = tuple(length(axis, sizes) for axis in part.axes)
            if shape != wanted:
                raise ModelError(f"{file}: {name} has shape {list(shape)}; config.json asks for {list(wanted)}")
            found.append(part)
    found = _untied(found, understood.tied)
    counts = Counter(part.parameter for part in found)
    for name in understood.names:
        if counts[name] not in understood.parts(name):
            what = "has no weight" if counts[name] == 0 else f"has only {counts[name]} of the parts of"
            raise ModelError(f"{folder}: {what} {name}; the checkpoint is incomplete")
    return found


def _untied(found: list[Stored], tied: dict[str, str]) -> list[Stored]:
    """The tensors, each shared one once. Raises ModelError if two that are tied differ."""
    first = {part.parameter: part for part in found if part.parameter not in tied}
    kept = []
    for part in found:
        if part.parameter in tied:
            parameter = tied[part.parameter]
            if parameter in first:
                other = first[parameter]
                if not torch.equal(_read(part), _read(other)):
                    raise ModelError(
                        f"{part.file}: {part.name} differs from {other.name}, though config.json says that they are "
                        "tied; set tie_word_embeddings = false there, or remove one of them"
                    )
                continue
            part = first[parameter] = replace(part, parameter=parameter)
        kept.append(part)
    return kept


def _files(folder: Path) -> dict[Path, dict[str, tuple[int, ...]]]:
    """Of each file its tensors and their shapes."""
    index = folder / INDEX
    promised: dict[str, str] = read_json(index).get("weight_map", {}) if index.is_file() else {}
    files = sorted({folder / name for name in promised.values()} or folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: holds no *.safetensors; capgap reads weights in safetensors only")
    found: dict[Path, dict[str, tuple[int, ...]]] = {}
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: missing, though {INDEX} names it; fetch it again")
        with _opened(file) as tensors:
            found[file] = {name: tuple(tensors.get_slice(name).get_shape()) for name in sorted(tensors.keys())}
    for name, file in promised.items():
        if name not in found[folder / file]:
            raise ModelError(f"{folder / file}: holds no {name}, though {INDEX} says so; fetch it again")
    return found


class _opened:  # noqa: N801  (used as a context manager, like contextlib's own)
    """A safetensors file. Raises ModelError that names it, if it is damaged."""

    def __init__(self, file: Path):
        self.file = file

    def __enter__(self) -> Any:
        try:
            self.opened = safe_open(self.file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.file}: damaged or cut off ({first_line(error)}); fetch or save it again") from None
        return self.opened.__enter__()

    def __exit__(self, *error: object) -> None:
        self.opened.__exit__(*error)


class _Names:
    """How the installed transformers turns a checkpoint's names into a model's."""

    def __init__(self, anatomy: Anatomy):
        model = bare_model(anatomy.config)
        self.anatomy, self.names = anatomy, dict(model.named_parameters())
        self.tied: dict[str, str] = dict(model.all_tied_weights_keys) if anatomy.config.tie_word_embeddings else {}
        mapping = get_model_conversion_mapping(model)
        self.renamings = [change for change in mapping if isinstance(change, WeightRenaming)]
        self.converters = [change for change in mapping if isinstance(change, WeightConverter)]
        self.prefix = anatomy.table.layers_at.partition(".")[0]

    def place(self, file: Path, name: str) -> Stored | None:
        """What a tensor is; None if transformers does not read it."""
        parameter, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.names)
        if parameter not in self.names and parameter not in self.tied:
            return None
        row, layer, axes = self.anatomy.table.match(parameter)
        if pattern is None:
            return Stored(file, name, parameter, layer, row, axes)
        # One tensor of one expert: a part of what the model stacks along an axis of experts.
        expert = re.search(r"\.experts\.(\d+)\.", name)
        sources = next(found.source_patterns for found in self.converters if pattern in found.source_patterns)
        if axes[0] != EXPERT or expert is None:
            raise ModelError(f"{file}: capgap does not know how {name} becomes {parameter}")
        place = list(sources).index(pattern)
        own: tuple[Dimension, ...] = tuple(
            axis.parts[place] if isinstance(axis, Stacked) else axis for axis in axes[1:]
        )
        return Stored(file, name, parameter, layer, row, own, int(expert[1]))

    def parts(self, parameter: str) -> tuple[int, ...]:
        """As how many tensors a checkpoint may hold a parameter."""
        axes = self.anatomy.table.match(parameter)[2]
        if len(axes) < 3 or axes[0] != EXPERT:
            return (1,)
        experts = self.anatomy.shape.experts or 1
        return (1, experts * max(len(axis.parts) if isinstance(axis, Stacked) else 1 for axis in axes))


def _is_kept(part: Stored, keep: Keep) -> bool:
    if part.layer is None:
        return True
    if part.layer not in keep.layers:
        return False
    layer = keep.layers.index(part.layer)
    return part.expert is None or keep.experts is None or part.expert in keep.experts[layer].tolist()


def _renamed(part: Stored, anatomy: Anatomy, keep: Keep) -> str:
    """The name with the numbers that layer and expert have in the student."""
    if part.layer is None:
        return part.name
    layer = keep.layers.index(part.layer)
    stack = re.escape(anatomy.table.layers_at.rpartition(".")[2])
    name = re.sub(rf"(^|\.)({stack})\.{part.layer}\.", rf"\g<1>\g<2>.{layer}.", part.name, count=1)
    if part.expert is None or keep.experts is None:
        return name
    expert = keep.experts[layer].tolist().index(part.expert)
    return name.replace(f".experts.{part.expert}.", f".experts.{expert}.", 1)


def _read(part: Stored) -> Tensor:
    # Opened anew for each: what was read of a file stays in memory for as long as it is open.
    with _opened(part.file) as tensors:
        try:
            return tensors.get_tensor(part.name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{part.file}: {part.name} cannot be read ({first_line(error)})") from None


def _cut(part: Stored, anatomy: Anatomy, cutter: Cutter) -> Tensor:
    whole = _read(part)
    layer = None if part.layer is None else cutter.keep.layers.index(part.layer)
    cut = cutter.cut(whole, part.axes, layer, part.expert)
    # The sum is not finite if one of them is not, and takes a fraction of isfinite's time.
    if not bool(torch.isfinite(cut.sum(dtype=torch.float32))):
        raise ModelError(f"{part.file}: {part.name} holds NaN or infinite values; the model is unusable")
    return rescaled(cut, part.row, part.axes, anatomy, cutter.keep).contiguous()


def _fetch_ahead(file: Path) -> None:
    """Has the system read the file while others of its weights are cut, where it can be told so."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


class _Shards:
    """The student's files, filled one after the other."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.held: dict[str, Tensor] = {}
        self.files: list[tuple[Path, list[str]]] = []
        self.bytes = self.parameters = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.held and sum(t.nbytes for t in self.held.values()) + tensor.nbytes > self.limit:
            self.flush()
        self.held[name] = tensor
        self.bytes, self.parameters = self.bytes + tensor.nbytes, self.parameters + tensor.numel()

    def flush(self) -> None:
        """Writes what was added since the last time."""
        if not self.held:
            return
        file = self.folder / f"{len(self.files)}.safetensors"
        save_file(self.held, file, metadata={"format": "pt"})
        self.files.append((file, list(self.held)))
        self.held = {}

    def finish(self) -> None:
        """Writes the rest, gives the files their names, and writes the index if there is more than one."""
        self.flush()
        if len(self.files) == 1:
            self.files[0][0].rename(self.folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, (file, names) in enumerate(self.files, start=1):
            named = f"model-{number:05}-of-{len(self.files):05}.safetensors"
            file.rename(self.folder / named)
            weight_map |= dict.fromkeys(names, named)
        total = {"total_parameters": self.parameters, "total_size": self.bytes}
        (self.folder / INDEX).write_text(
            json.dumps({"metadata": total, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n",
            encoding="utf-8",
        )
