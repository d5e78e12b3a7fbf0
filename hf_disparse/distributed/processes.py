"""What processes share in data-parallel training: gradients, masks, and the main process's answers.

Every process has the whole model and a part of each batch, as in DistributedDataParallel. All processes call these functions
at the same point of the program; with a single process they change nothing.
"""

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch.distributed
from torch import Tensor, distributed
from tqdm.auto import tqdm

from hf_disparse.config import UserError, one_line

P, T = ParamSpec("P"), TypeVar("T")


def processes() -> int:
    """Returns the number of processes, 1 before torch.distributed is initialized."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def launched() -> int:
    """Returns the number of processes that a launcher started, even before torch.distributed is initialized."""
    return max(processes(), int(os.environ.get("WORLD_SIZE", "1")))


def is_main() -> bool:
    """Whether this process writes and prints; before torch.distributed is initialized, the launcher's RANK decides."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def mean_over_processes(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Replaces each tensor by its mean over the processes, in place; every process gets the same bits.

    All tensors are sent at once, so that small ones do not wait for one another.
    """
    if processes() > 1:
        for work in [distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
        for tensor in tensors:
            tensor.div_(processes())
    return tensors


def share(tensors: Iterable[Tensor]) -> None:
    """Copies the tensors of rank 0 to all processes, in place."""
    if processes() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor.detach(), src=0)


def add_up(count: int) -> int:
    """Returns the sum of `count` over the processes."""
    counts: list[Any] = [count] * processes()
    if processes() > 1:
        distributed.all_gather_object(counts, count)
    return sum(counts)


def differing_ranks(digest: bytes) -> list[int]:
    """Returns the ranks whose digest differs from that of rank 0, the same list on all processes."""
    if processes() == 1:
        return []
    every: list[Any] = [None] * processes()
    distributed.all_gather_object(every, digest)
    return [rank for rank, theirs in enumerate(every) if theirs != every[0]]


def require_same(masks: Mapping[str, Tensor], step: int) -> None:
    """Refuses masks that differ between processes: their models would drift apart.

    Raises:
        UserError: on every process, with the ranks whose masks differ from those of rank 0.
    """
    if processes() > 1 and (others := differing_ranks(fingerprint(masks))):
        raise UserError(
            f"pruning: expected the same masks on all {processes()} processes at step {step}, but rank "
            f"{', '.join(map(str, others))} decided otherwise than rank 0: its weights or data have changed; "
            "start again from the last checkpoint"
        )


def fingerprint(masks: Mapping[str, Tensor]) -> bytes:
    """Returns a 32-byte digest of the names, the shapes and every bit of the masks."""
    digest = hashlib.blake2b(digest_size=32)
    for name, keep in sorted(masks.items()):
        digest.update(f"{name} {tuple(keep.shape)} ".encode())
        digest.update(np.packbits(keep.cpu().numpy().reshape(-1)))
    return digest.digest()


def on_main(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function so that only the main process runs it, and all processes return its result or raise its error.

    All processes call the decorated function. The result is sent pickled, between our own processes.

    Raises:
        UserError: on the other processes, with the message of whatever the main process raised.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if processes() == 1:
            return function(*args, **kwargs)
        answer: list[Any] = [None, None]
        if is_main():
            try:
                answer[0] = function(*args, **kwargs)
            except Exception as error:
                answer[1] = str(error) if isinstance(error, UserError) else f"rank 0: {type(error).__name__}: {error}"
                distributed.broadcast_object_list(answer)
                raise
        distributed.broadcast_object_list(answer)
        if answer[1] is not None:
            raise UserError(answer[1])
        return answer[0]

    return wrapped


def end() -> None:
    """Leaves the process group once all work is done."""
    if processes() > 1:
        distributed.destroy_process_group()


@contextmanager
def among_processes(remedy: str) -> Iterator[None]:
    """Turns the errors of gloo and NCCL when another process has died, or is silent for `ddp_timeout`, into a UserError."""
    try:
        yield
    except RuntimeError as error:  # DistError is one
        if not isinstance(error, torch.distributed.DistError) and "gloo/transport" not in str(error):
            raise
        raise UserError(
            f"training: another process has stopped responding: {one_line(error)[:150]}\n"
            f"Its own output says why it ended. {remedy}"
        ) from error


def say(line: str) -> None:
    """Prints a line of progress above the bars, on the main process."""
    if is_main():
        tqdm.write(line, file=sys.stderr)
