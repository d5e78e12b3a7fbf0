"""Checkpoints that are whole or none: sealed when they are written, checked before they are taken."""

import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Trainer

from hf_disparse.config import one_line
from hf_disparse.faults import writing
from hf_disparse.masks import MASKS_NAME

SEAL_NAME = "seal.json"
_STATE_NAME = "trainer_state.json"


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-N` of `folder` that was written to its end and is as it was written, or None."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        if torn(path) is None:
            return str(path)
    return None


def torn(checkpoint: str | Path) -> str | None:
    """What shows that a checkpoint is not whole, None if it is.

    The Trainer writes `trainer_state.json` last and all at once, and `seal` just before that what all other files hold.
    Another Trainer's has no seal: there its files are opened.
    """
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / _STATE_NAME).read_text())
        if not (checkpoint / SEAL_NAME).is_file():
            return _torn_by_its_looks(checkpoint)
        for name, content in json.loads((checkpoint / SEAL_NAME).read_text()).items():
            if _content(checkpoint / name) != content:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:  # of JSON that is another's, too
        return one_line(error)
    return None


def _torn_by_its_looks(checkpoint: Path) -> str | None:
    weights = [*checkpoint.glob("model*.safetensors"), *checkpoint.glob("adapter_model.safetensors")]
    for index in checkpoint.glob("model.safetensors.index.json"):
        weights += [checkpoint / name for name in set(json.loads(index.read_text())["weight_map"].values())]
    for path in (*weights, *checkpoint.glob("adapter-*/adapter_*.safetensors"), *checkpoint.glob(MASKS_NAME)):
        with safe_open(str(path), framework="pt"):  # checks the header against the size of the file
            pass
    archives = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    if not weights or len(archives) < 3:
        return f"it has no {'random state' if weights else 'weights'}"
    return next((f"{path.name} is not whole" for path in archives if not zipfile.is_zipfile(path)), None)


def seal(folder: Path) -> None:
    """Brings the files of a checkpoint to the disk, and beside them what they hold: name -> [size, CRC-32]."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    content = {str(path.relative_to(folder)): _content(path) for path in files}
    (folder / SEAL_NAME).write_text(json.dumps(content))
    sync(folder)


def _content(path: Path) -> list[int]:
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            checksum = zlib.crc32(chunk, checksum)
        return [file.tell(), checksum]


def sync(folder: Path) -> None:
    """Has the disk hold what was written to a folder, for a machine may lose power, too."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


@contextmanager
def checkpointing(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Around the writing of one checkpoint: nothing of an older one in it, nothing left of it if it fails."""
    mine = trainer.args.should_save
    with writing(folder, "Once that is mended, training resumes from the last whole checkpoint, which stays."):
        try:
            if mine and folder.exists():  # of an earlier training: half old and half new would be neither
                shutil.rmtree(folder)
            trainer.accelerator.wait_for_everyone()
            yield
            if mine:
                sync(folder)
        except BaseException:
            if mine and folder.exists() and torn(folder):  # of no use, and a disk may be full of it
                shutil.rmtree(folder, ignore_errors=True)
            raise
