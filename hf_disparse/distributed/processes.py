"""What several processes share: one gradient, one mask, one decision of what to do next. Layer 4; knows torch only.

Every process has the whole model and a part of each batch, as in DistributedDataParallel. All of this is nothing in one process.
A function here is called by all processes, at the same point of the same program.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch.distributed
from torch import Tensor, distributed
from tqdm.auto import tqdm

from hf_disparse.config import UserError, one_line

T = TypeVar("T")


def processes() -> int:
    """How many there are, 1 before torch.distributed has begun."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def launched() -> int:
    """How many a launcher has started, if torch.distributed has begun or not."""
    return max(processes(), int(os.environ.get("WORLD_SIZE", "1")))


def is_main() -> bool:
    """Whether this process is the one that writes and prints; a launcher's word counts before torch.distributed has begun."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def average(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The means over the processes, in place; the same bits on all of them. Shapes stay.

    All of a list travel at once, so that small ones do not wait for one another.
    """
    if processes() > 1:
        for work in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
        for tensor in tensors:
            tensor.div_(processes())
    return tensors


def share(tensors: Iterable[Tensor]) -> None:
    """Gives all processes the bits of rank 0, in place."""
    if processes() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)


def add_up(count: int) -> int:
    """The sum of the processes' counts."""
    counts: list[Any] = [count] * processes()
    if processes() > 1:
        distributed.all_gather_object(counts, count)
    return sum(counts)


def differing(digest: bytes) -> list[int]:
    """The ranks whose digest is not that of rank 0, the same list on all processes."""
    if processes() == 1:
        return []
    every: list[Any] = [None] * processes()
    distributed.all_gather_object(every, digest)
    return [rank for rank, theirs in enumerate(every) if theirs != every[0]]


def require_same(masks: Mapping[str, Tensor], step: int) -> None:
    """Refuses masks that are not the same on all processes, whose models would drift apart from here on.

    Raises:
        UserError: on every process, with the ranks whose masks are not those of rank 0.
    """
    if processes() > 1 and (others := differing(fingerprint(masks))):
        raise UserError(
            f"pruning: expected the same masks on all {processes()} processes at step {step}, but rank "
            f"{', '.join(map(str, others))} decided otherwise than rank 0: something changed the weights or the data there; "
            "start again from the last checkpoint"
        )


def fingerprint(masks: Mapping[str, Tensor]) -> bytes:
    """32 bytes that the names, the shapes and every bit of the masks decide."""
    digest = hashlib.blake2b(digest_size=32)
    for name, keep in sorted(masks.items()):
        digest.update(f"{name} {tuple(keep.shape)} ".encode())
        digest.update(np.packbits(keep.cpu().numpy().reshape(-1)))
    return digest.digest()


def from_main(function: Callable[[], T]) -> T:
    """What `function` returns on the main process, the only one that calls it; an error there is raised on all.

    What it returns travels pickled between our own processes.
    """
    if processes() == 1:
        return function()
    answer: list[Any] = [None, None]
    if is_main():
        try:
            answer[0] = function()
        except Exception as error:
            answer[1] = str(error) if isinstance(error, UserError) else f"rank 0: {type(error).__name__}: {error}"
            distributed.broadcast_object_list(answer)
            raise
    distributed.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def end() -> None:
    """Once all is done: lets go of the other processes."""
    if processes() > 1:
        distributed.destroy_process_group()


@contextmanager
def among_processes(remedy: str) -> Iterator[None]:
    """Turns what gloo and NCCL say where another process is gone, or keeps silent for `ddp_timeout`, into a UserError."""
    try:
        yield
    except RuntimeError as error:  # DistError is one
        if not isinstance(error, torch.distributed.DistError) and "gloo/transport" not in str(error):
            raise
        raise UserError(
            f"training: expected an answer from the other processes, got none: {one_line(error)[:150]}\n"
            f"One of them has ended, and its own output says why. {remedy}"
        ) from error


def say(line: str) -> None:
    """A line beside the progress bars: what is going on now."""
    if is_main():
        tqdm.write(line, file=sys.stderr)
