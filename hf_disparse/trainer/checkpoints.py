"""Checkpoints that are whole or none: sealed when they are written, checked before they are taken; and what is ours in them.

Of several processes each writes its random state and, with FSDP, its part; the one that saves writes the rest, and seals all.
"""

import json
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, Trainer

from hf_disparse.config import UserError, one_line
from hf_disparse.distributed.fsdp import gather, is_sharded
from hf_disparse.distributed.processes import on_main
from hf_disparse.files import sync, writing
from hf_disparse.pruning.masks import MASKS_NAME, load_masks, save_masks
from hf_disparse.trainer.guard import GUARD_NAME

SEAL_NAME = "seal.json"
STATE_NAME, PRUNING_STATE_NAME = "disparse_state.json", "pruning_state.safetensors"
_TRAINER_STATE_NAME = "trainer_state.json"
_PARTS = ("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata")  # of FSDP: written once all processes wrote theirs


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-N` of `folder` that was written to its end and is as it was written, or None."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        if torn(path) is None:
            return str(path)
    return None


def to_resume(asked: str | bool | None, output_dir: str) -> str | bool | None:
    """The checkpoint to resume from, which is whole: `asked`, or if that is True the last one; the same for all processes.

    Raises:
        UserError: it is not whole, or there is none.
    """
    if asked is True:
        found = on_main(last_whole_checkpoint)(output_dir)
        if found is None:
            raise UserError(f"resume_from_checkpoint: there is no whole checkpoint in {output_dir}")
        return found
    if asked and (reason := on_main(torn)(asked)):
        got = f"{asked}: {reason}"
        raise UserError(
            f"resume_from_checkpoint: expected a whole checkpoint, got {got}; True takes the last whole one"
        )
    return asked


def torn(checkpoint: str | Path) -> str | None:
    """What shows that a checkpoint is not whole, None if it is.

    The Trainer writes `trainer_state.json` last and all at once, and `seal` just before that what all other files hold.
    Another Trainer's has no seal: there its files are opened.
    """
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / _TRAINER_STATE_NAME).read_text())
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
    random, in_parts = list(checkpoint.glob("rng_state*.pth")), all((checkpoint / name).is_file() for name in _PARTS)
    if not (weights or in_parts) or not random:
        return f"it has no {'weights' if random else 'random state'}"
    archives = [checkpoint / "scheduler.pt", *random]
    if not in_parts:
        archives.append(next(checkpoint.glob("optimizer.bin"), checkpoint / "optimizer.pt"))  # .bin: of FSDP
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


@contextmanager
def whole_weights(trainer: Trainer) -> Iterator[None]:
    """What is saved meanwhile is whole, also where FSDP's checkpoints are in parts."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    before = None if plugin is None else plugin.state_dict_type
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        if plugin is not None:
            plugin.set_state_dict_type(before)


def save_state(trainer: Trainer, folder: Path) -> None:
    """Writes the state of pruning and of the losses beside that of the optimizer. Called by all processes."""
    pruner = trainer.pruner
    masks = gather(pruner.masks) if pruner.masks and is_sharded(pruner.masks) else pruner.masks
    if not trainer.args.should_save:
        return
    if masks is not None:
        save_masks(masks, folder / MASKS_NAME)
    if pruning := pruner.state():
        save_file(pruning, folder / PRUNING_STATE_NAME)
    if pruner.guard:
        pruner.guard.save(folder / GUARD_NAME)
    state = {
        "backward_passes": trainer.backward_passes,
        "seconds": trainer.seconds,
        "loss_means": trainer.loss_means,
        "measures": pruner.measures,
    }
    (folder / STATE_NAME).write_text(json.dumps(state))


def load_state(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Takes up what `save_state` wrote of pruning, and returns what it wrote of the trainer: nothing if another Trainer wrote."""
    pruner, path = trainer.pruner, folder / MASKS_NAME
    pruner.masks = load_masks(path) if path.is_file() else trainer.given_masks  # not those of a run that died after it
    if trainer.is_multitask and pruner.config and "layer" in pruner.config.granularity:
        trainer.model.skip_layers(AutoConfig.from_pretrained(folder).skipped_layers)
    if (folder / PRUNING_STATE_NAME).is_file():
        pruner.load_state(load_file(folder / PRUNING_STATE_NAME))
    if pruner.guard:
        pruner.guard.load(folder / GUARD_NAME)
    state = json.loads((folder / STATE_NAME).read_text()) if (folder / STATE_NAME).is_file() else {}
    pruner.scorer.measures = state.get("measures", {})
    return state
