"""Decisions under FSDP2, where every process holds a part of each weight, of its scores and of its mask.

The method decides on the main process alone, on whole scores in main memory, one task at a time; the others send their parts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_disparse.distributed.processes import is_main

Scoring = Callable[
    ..., Iterable[tuple[str, Mapping[str, Tensor]]]
]  # (*arguments) -> (task, its scores), one task at a time


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are sharded."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def local(tensor: Tensor) -> Tensor:
    """Returns this process's part of a sharded tensor, which shares its memory; any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Shards the weights again: an evaluation leaves some of them whole, as other objects."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gathers whole tensors into the main process's main memory, one after another; called by all, and {} on the others."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        if is_main():
            whole[name] = full.cpu()
    return whole


def place(mask: Tensor | None, like: Tensor) -> Tensor:
    """Moves a mask to its weight, sharded if that is. Called by all; for a sharded weight, the main process's mask is used."""
    if not isinstance(like, DTensor):
        return mask.to(like.device)
    if isinstance(mask, DTensor):
        return mask
    whole = torch.empty(like.shape, dtype=torch.bool) if mask is None else mask
    whole = whole.to(like.device, torch.uint8)  # all backends can send it
    return distribute_tensor(whole, like.device_mesh, like.placements).bool()


def decide_on_main(
    update: Callable[[Mapping[str, Tensor], Scoring], Mapping[str, Tensor] | None],
    stream: Scoring,
    masks: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
) -> dict[str, Tensor] | None:
    """Sends what `update(whole masks, score)` decides on the main process to all; None if it keeps the masks.

    Args:
        update: called on the main process only; `score(*arguments)` yields (task, whole scores) to it.
        stream: (*arguments) -> iterator of (task, sharded scores), run by all processes.
        masks: the sharded masks in force.
        like: the weights, by the names of the masks.
    """
    whole = gather(masks)
    if is_main():

        def score(*arguments) -> Iterator[tuple[str, dict[str, Tensor]]]:
            _broadcast(arguments)
            for task, scores in stream(*arguments):
                yield task, gather(scores)

        decided = update(whole, score)
        _broadcast(None if decided is None else True)
        if decided is None:
            return None
        return {name: place(decided[name], weight) for name, weight in like.items()}
    while isinstance(arguments := _broadcast(None), tuple):
        for _, scores in stream(*arguments):
            gather(scores)
    return None if arguments is None else {name: place(None, weight) for name, weight in like.items()}


def _broadcast(what: Any) -> Any:
    """Returns what the main process passes to it, on all processes."""
    said = [what]
    distributed.broadcast_object_list(said)
    return said[0]
