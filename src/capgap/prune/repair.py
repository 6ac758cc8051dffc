"""Repairs a student right after the cut: layer by layer, its weights are fitted to what its parent computed."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capgap.anatomy import EXPERT, HIDDEN, Anatomy, Weight
from capgap.progress import Bar
from capgap.prune.cut import Cutter, Keep
from capgap.prune.probe import Place, Probe, on_its_device

Repair = Literal["none", "norms", "outputs", "all"]
# Of the mean of the Gram matrix's diagonal: what draws a fit back to the weights that were cut.
RIDGE = 0.01


@torch.no_grad()
def repair(
    student: PreTrainedModel,
    parent: PreTrainedModel,
    anatomy: Anatomy,
    keep: Keep,
    batches: Sequence[Tensor],
    *,
    what: Repair = "all",
    place: Place = on_its_device,
    quiet: bool = False,
) -> None:
    """Fits the student's weights, in place, to what its parent computes on some text.

    Layer by layer, and within a layer in the order in which its modules run, each is fitted on the input that it has
    in the student, all before it repaired. A norm's weight is multiplied by one number. A linear layer has the least
    squares solution, drawn towards the weights it has: one that reads the hidden state towards its parent's output;
    one that writes to it such that the hidden state becomes the parent's, which also makes up for layers that are
    gone (where a norm follows what is written, towards its parent's output only). A bias, where there is one, is
    fitted with the weights. Experts and routers stay as they were cut.

    Args:
        student: cut from `parent`, whose anatomy is given, as `keep` says; in float32.
        batches: ids [B, L + 1] each, all of one shape.
        place: brings the parent to its device, or in shards to the devices of several processes, each of which
            repairs the same student with the same batches.
        what: `norms`; `outputs`, the layers that write to the hidden state; `all`, these and those that read it.
    Source: least squares on what a layer writes: Frantar & Alistarh 2022, arXiv:2208.11580, for a fixed mask.
    """
    if what == "none":
        return
    probe, probe_of_student = Probe(parent.eval()), Probe(student.eval())
    device = place(probe)
    probe_of_student.to(device)
    inputs = [ids.to(device) for ids in batches]
    above = _Stack(probe, anatomy, keep.layers[0], inputs)
    below = _Stack(probe_of_student, anatomy, 0, inputs)
    groups = _groups(below, anatomy)
    with Bar("repairing", len(keep.layers), quiet=quiet) as bar:
        for layer, source in enumerate(keep.layers):
            following = keep.layers[layer + 1] if layer + 1 < len(keep.layers) else anatomy.shape.layers
            _repair_layer(_Pair(above, below, anatomy, keep, layer, source, following), groups, what)
            bar.to(layer + 1)
    if what in ("norms", "all"):
        _rescale_final_norm(probe_of_student, probe, anatomy, keep, inputs)


class _Stack:
    """A model's layers, to be run one by one, with the hidden states that the next layer reads, for each batch."""

    def __init__(self, probe: Probe, anatomy: Anatomy, first: int, inputs: Sequence[Tensor]):
        self.modules, self.at = dict(probe.model.named_modules()), anatomy.table.layers_at
        count = sum(name.rpartition(".")[0] == self.at for name in self.modules)
        self.layers = [self.modules[f"{self.at}.{i}"] for i in range(count)]
        self.given: dict[int, tuple[tuple, dict[str, Any]]] = {}
        self.states: list[Tensor] = []

        def take(number: int) -> Callable[..., None]:
            def hook(_m: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                state, rest = (args[0], args[1:]) if args else (kwargs["hidden_states"], ())
                self.given[number] = rest, {k: v for k, v in kwargs.items() if k != "hidden_states"}
                if number == first:
                    self.states.append(state)

            return hook

        hooks = [layer.register_forward_pre_hook(take(i), with_kwargs=True) for i, layer in enumerate(self.layers)]
        for ids in inputs:
            probe(ids, loss=False)
        for hook in hooks:
            hook.remove()

    def run(self, layer: int, state: Tensor) -> Tensor:
        """The hidden state [B, L, H] after a layer."""
        rest, named = self.given[layer]
        out = self.layers[layer](state, *rest, **named)
        return out[0] if isinstance(out, tuple) else out

    def through(self, start: int, end: int) -> list[Tensor]:
        """The states after the layers from `start` up to `end`."""
        states = self.states
        for layer in range(start, end):
            states = [self.run(layer, state) for state in states]
        return states

    @contextlib.contextmanager
    def watching(self, layer: int, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Gives what fills, as the layer runs, with input and output of its modules of these names, float32 [T, ·]."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def take(name: str) -> Callable[..., None]:
            def hook(_m: nn.Module, args: tuple, out: Tensor) -> None:
                # A copy: Falcon adds to the output in place.
                seen[name] = (args[0].flatten(0, -2).float(), out.flatten(0, -2).float().clone())

            return hook

        hooks = [self.modules[f"{self.at}.{layer}.{name}"].register_forward_hook(take(name)) for name in names]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()


class _Group:
    """Modules of a layer that read one input and are fitted together: one norm, or linear layers."""

    def __init__(self, rows: Sequence[Weight], bias: bool):
        self.rows, self.bias = rows, bias
        self.kind = "norms" if len(rows[0].axes) == 1 else "outputs" if _writes(rows[0]) else "inputs"


def _writes(row: Weight) -> bool:
    return len(row.axes) == 2 and row.axes[1 if row.transposed else 0] == HIDDEN


def _groups(stack: _Stack, anatomy: Anatomy) -> list[_Group]:
    """What of a layer can be fitted, in the order in which it runs, those that read the same together."""
    found: list[tuple[tuple[int, bool, bool], list[Weight]]] = []
    held = []  # so that no input's place in memory is taken by another

    def take(row: Weight) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple) -> None:
            held.append(args[0])
            key = (id(args[0]), getattr(module, "bias", None) is not None, len(row.axes) == 1)
            if found and found[-1][0] == key and not key[2]:
                found[-1][1].append(row)
            else:
                found.append((key, [row]))

        return hook

    hooks = []
    for row in anatomy.table.layer:
        module = stack.modules.get(f"{stack.at}.0.{row.name}")
        if module is not None and not row.bare and EXPERT not in row.axes and HIDDEN in row.axes:
            hooks.append(module.register_forward_pre_hook(take(row)))
    stack.run(0, stack.states[0])
    for hook in hooks:
        hook.remove()
    return [_Group(rows, bias) for (_, bias, _), rows in found]


class _Pair:
    """A layer of the student, the parent's that it was cut from, and the one that the next of the student's was."""

    def __init__(
        self, above: _Stack, below: _Stack, anatomy: Anatomy, keep: Keep, layer: int, source: int, following: int
    ):
        self.above, self.below, self.anatomy, self.keep = above, below, anatomy, keep
        self.layer, self.source, self.following = layer, source, following
        self.cutter = Cutter(anatomy, keep)

    def kept(self, output_TN: Tensor, row: Weight) -> Tensor:
        """Of the output of a parent's module what the student has."""
        index = self.cutter.index(row.axes[-1] if row.transposed else row.axes[0], self.layer)
        return output_TN if index is None else output_TN.index_select(-1, index.to(output_TN.device))

    def hidden(self, state: Tensor) -> Tensor:
        """Of a parent's hidden state [B, L, H] what the student has, [T, h]."""
        return state.flatten(0, -2).float().index_select(-1, self.keep.hidden.to(state.device))


def _repair_layer(pair: _Pair, groups: Sequence[_Group], what: Repair) -> None:
    table, above, below = pair.anatomy.table, pair.above, pair.below
    # What is written goes into the hidden state as it is, unless a norm comes after it.
    normed = any(row.axes == (HIDDEN,) and row.name not in table.masks[HIDDEN] for row in table.layer)
    writers = [group.rows[0] for group in groups if group.kind == "outputs"]
    has_experts = any(EXPERT in row.axes for row in table.layer)
    after = above.through(pair.source, pair.following)
    for group in groups:
        if what not in ("all", group.kind):
            continue
        if group.kind == "outputs" and not normed:
            place = writers.index(group.rows[0])
            last = place == len(writers) - 1 and not has_experts
            _fit_to_hidden(pair, group, writers[:place], after if last else None)
        else:
            _fit(pair, group)
    above.states = after
    below.states = below.through(pair.layer, pair.layer + 1)


def _fit(pair: _Pair, group: _Group) -> None:
    """Fits modules to what their parents' give."""
    names = [row.name for row in group.rows]
    sums = _Sums(group)
    with pair.above.watching(pair.source, names) as wanted, pair.below.watching(pair.layer, names) as found:
        for parent_state, state in zip(pair.above.states, pair.below.states, strict=True):
            pair.above.run(pair.source, parent_state)
            pair.below.run(pair.layer, state)
            off = [pair.kept(wanted[row.name][1], row) - found[row.name][1] for row in group.rows]
            sums.add(found[names[0]], torch.cat(off, -1))
    sums.apply(pair)


def _fit_to_hidden(pair: _Pair, group: _Group, before: Sequence[Weight], after: list[Tensor] | None) -> None:
    """Fits what writes to the hidden state such that the state becomes the parent's.

    Args:
        before: what writes to it earlier in the layer.
        after: the parent's states that the next layer reads, where nothing writes to them later in the layer.
    """
    row = group.rows[0]
    names = [*(earlier.name for earlier in before), row.name]
    sums = _Sums(group)
    with pair.above.watching(pair.source, names) as wanted, pair.below.watching(pair.layer, names) as found:
        for parent_state, state, later in zip(
            pair.above.states, pair.below.states, after or pair.above.states, strict=True
        ):
            target = pair.hidden(later)
            if after is None:
                pair.above.run(pair.source, parent_state)
                target = target + sum(pair.kept(wanted[name][1], row) for name in names)
            pair.below.run(pair.layer, state)
            sums.add(found[row.name], target - state.flatten(0, -2).float() - sum(found[name][1] for name in names))
    sums.apply(pair)


class _Sums:
    """The sums over tokens that a fit needs."""

    def __init__(self, group: _Group):
        self.group = group
        self.gram: Tensor | None = None
        self.cross = torch.zeros(())

    def add(self, seen: tuple[Tensor, Tensor], off_TN: Tensor) -> None:
        """Adds tokens, by the first module's input and output, and what is missing from all modules' outputs."""
        x_TK = seen[1] if self.group.kind == "norms" else seen[0]
        if self.group.kind == "norms":
            x_TK, off_TN = x_TK.reshape(-1, 1), off_TN.reshape(-1, 1)
        elif self.group.bias:
            x_TK = torch.cat([x_TK, x_TK.new_ones(len(x_TK), 1)], -1)
        gram, cross = x_TK.T @ x_TK, x_TK.T @ off_TN
        self.gram, self.cross = (gram, cross) if self.gram is None else (self.gram + gram, self.cross + cross)

    def apply(self, pair: _Pair) -> None:
        """Changes the student's weights."""
        assert self.gram is not None
        gram, cross = self.gram.double(), self.cross.double()
        norm = self.group.kind == "norms"
        if not norm:
            gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        change = torch.linalg.solve(gram, cross).float()
        modules: list[Any] = [pair.below.modules[f"{pair.below.at}.{pair.layer}.{row.name}"] for row in self.group.rows]
        if norm:
            _rescale(modules[0], 1 + float(change), pair.anatomy)
            return
        bias = change[-1] if self.group.bias else None
        weights = change[:-1] if self.group.bias else change
        at = 0
        for row, module in zip(self.group.rows, modules, strict=True):
            size = module.weight.shape[1 if row.transposed else 0]
            part = weights[:, at : at + size]
            module.weight.add_(part if row.transposed else part.T)
            if bias is not None:
                module.bias.add_(bias[at : at + size])
            at += size


def _rescale(norm: Any, factor: float, anatomy: Anatomy) -> None:
    """Multiplies what a norm gives."""
    offset = anatomy.table.norm_offset
    norm.weight.copy_((norm.weight + offset) * factor - offset)
    if getattr(norm, "bias", None) is not None:
        norm.bias.mul_(factor)


def _rescale_final_norm(student: Probe, parent: Probe, anatomy: Anatomy, keep: Keep, inputs: Sequence[Tensor]) -> None:
    cross, square = 0.0, 0.0
    for ids in inputs:
        given = student(ids, loss=False).float()
        wanted = parent(ids, loss=False).float().index_select(-1, keep.hidden.to(given.device))
        cross, square = cross + float((wanted * given).sum()), square + float(given.square().sum())
    _rescale(dict(student.model.named_modules())[anatomy.table.final_norm], cross / square, anatomy)
