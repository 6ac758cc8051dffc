"""What a model loses without some of its layers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capgap.anatomy import Anatomy
from capgap.errors import DataError
from capgap.progress import Bar
from capgap.prune.probe import Place, Probe, on_its_device


@torch.no_grad()
def losses_without(
    model: PreTrainedModel,
    anatomy: Anatomy,
    batches: Iterable[Tensor],
    *,
    block: int = 1,
    place: Place = on_its_device,
    total: int | None = None,
    quiet: bool = False,
) -> Tensor:
    """The loss without layer 0 to `block - 1`, without layer 1 to `block`, and so on: [layers - block + 1], in nats.

    Args:
        batches: ids [B, L + 1] each.
        block: how many layers in a row are left out.
        place, total: as for `score`.
    Source: layers by the loss without them: Kim et al. 2024, arXiv:2402.02834; Sreenivas et al. 2024,
        arXiv:2408.11796, for blocks.
    """
    probe = Probe(model.eval())
    device = place(probe)
    modules = dict(model.named_modules())
    layers = [modules[f"{anatomy.table.layers_at}.{i}"] for i in range(anatomy.shape.layers)]
    losses, count = torch.zeros(len(layers) - block + 1), 0
    with Bar("leaving out layers", None if total is None else total * len(losses), quiet=quiet) as bar:
        for count, ids in enumerate(batches, start=1):
            for first in range(len(losses)):
                hooks = [layer.register_forward_hook(_pass_on, with_kwargs=True) for layer in layers[first:][:block]]
                losses[first] += probe(ids.to(device), loss=True).cpu()
                for hook in hooks:
                    hook.remove()
                bar.to((count - 1) * len(losses) + first + 1)
    if count == 0:
        raise DataError("no calibration text: the losses need at least one block")
    return losses / count


def _pass_on(_m: nn.Module, args: tuple, kwargs: dict[str, Tensor], out: Any) -> Any:
    """A layer's input in the place of its output."""
    state = args[0] if args else kwargs["hidden_states"]
    return (state, *out[1:]) if isinstance(out, tuple) else state
