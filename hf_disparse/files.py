"""What a machine does to a run, said in two lines: disks that fill up, files torn, processes that are gone. Layer 1."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed
from safetensors import SafetensorError, safe_open

from hf_disparse.config import UserError, one_line

_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "iostream")  # in what it says of a disk, as a RuntimeError


@contextmanager
def writing(folder: str | Path, remedy: str = "Once that is mended, the same command goes on.") -> Iterator[None]:
    """Turns what the system refuses while a folder is written into a UserError that ends with `remedy`."""
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = one_line(error)
        if isinstance(error, RuntimeError):
            if not any(word in reason for word in _TORCH_SAVE):
                raise
            reason = f"torch.save broke off ({reason})"
        if isinstance(error, OSError) and error.strerror:  # without the number
            reason = error.strerror + (f": {error.filename}" if error.filename else "")
        raise UserError(f"output_dir: cannot write to {folder}: {reason}{_free(Path(folder))}.\n{remedy}") from error


def _free(folder: Path) -> str:
    """The room there is, for torch does not say that it lacked any."""
    try:
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
    except OSError:
        return ""
    return f" ({free / 1e6:,.1f} MB are free there)"


@contextmanager
def open_safetensors(path: str | Path) -> Iterator[Any]:
    """A safetensors file, open, its header checked against its size; one that is not whole is the user's to mend."""
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        got = f"a file that does not parse ({one_line(error)})"
        raise UserError(f"{path}: expected whole safetensors, got {got}; write or download it again") from None


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
