"""FSDP2: every process has a part of each weight, of its scores and of its mask. Layer 4; knows torch only.

A method decides on the main process alone, on whole scores in main memory, one task's at a time; the others hand in their parts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_disparse.distributed.processes import is_main

Stream = Iterable[tuple[str, Mapping[str, Tensor]]]


def is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are in parts."""
    return any(isinstance(tensor, DTensor) for tensor in tensors.values())


def local(tensor: Tensor) -> Tensor:
    """The part that this process has, which shares memory with `tensor`; all of a whole one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reshard(model: nn.Module) -> None:
    """Has the weights in parts: an evaluation leaves some of them whole, which are other objects."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, one after another into the main process's main memory; nothing on the others. Called by all."""
    whole = {}
    for name, tensor in tensors.items():
        full = tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
        if is_main():
            whole[name] = full.cpu()
    return whole


def place(mask: Tensor | None, like: Tensor) -> Tensor:
    """A mask where its weight is, in parts if that is. Called by all; of a sharded weight the main process's mask counts."""
    if not isinstance(like, DTensor):
        return mask.to(like.device)
    if isinstance(mask, DTensor):
        return mask
    whole = torch.empty(like.shape, dtype=torch.bool) if mask is None else mask
    whole = whole.to(like.device, torch.uint8)  # which all backends send
    return distribute_tensor(whole, like.device_mesh, like.placements).bool()


def decide_on_main(
    update: Callable[[Mapping[str, Tensor], Callable[..., Stream]], Mapping[str, Tensor] | None],
    stream: Callable[..., Stream],
    masks: Mapping[str, Tensor],
    like: Mapping[str, Tensor],
) -> dict[str, Tensor] | None:
    """What `update(whole masks, score)` decides on the main process, sent to all; None if it leaves the masks.

    Args:
        update: called on the main process only; `score(*arguments)` gives it whole scores.
        stream: (*arguments) -> (task, scores in parts), made by all processes.
        masks: those in force, in parts.
        like: the weights, by the names of the masks.
    """
    whole = gather(masks)
    if is_main():

        def score(*arguments) -> Iterator[tuple[str, dict[str, Tensor]]]:
            _told(arguments)
            for task, scores in stream(*arguments):
                yield task, gather(scores)

        decided = update(whole, score)
        _told(None if decided is None else True)
        if decided is None:
            return None
        return {name: place(decided[name], weight) for name, weight in like.items()}
    while isinstance(arguments := _told(None), tuple):
        for _, scores in stream(*arguments):
            gather(scores)
    return None if arguments is None else {name: place(None, weight) for name, weight in like.items()}


def _told(what: Any) -> Any:
    """What the main process says."""
    said = [what]
    distributed.broadcast_object_list(said)
    return said[0]
