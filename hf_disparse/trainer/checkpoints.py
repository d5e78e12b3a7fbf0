"""Checkpoints that are complete or refused: sealed when written, checked before a resume; and the state of pruning in them.

Every process writes its random state and, with FSDP, its shard; the one that saves writes the rest and seals all files.
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
_PARTS = ("pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata")  # FSDP writes these last


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """Returns the newest `checkpoint-N` in `folder` that is complete and unchanged since it was written, or None."""
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        if torn(path) is None:
            return str(path)
    return None


def to_resume(asked: str | bool | None, output_dir: str) -> str | bool | None:
    """Returns the whole checkpoint to resume from, the same on all processes: `asked`, or the last one if that is True.

    Raises:
        UserError: it is not whole, or there is none.
    """
    if asked is True:
        found = on_main(last_whole_checkpoint)(output_dir)
        if found is None:
            raise UserError(f"resume_from_checkpoint: there is no whole checkpoint in {output_dir}")
        return found
    if asked and (reason := on_main(torn)(asked)):
        raise UserError(f"resume_from_checkpoint: {asked} is not whole: {reason}; True takes the last whole checkpoint")
    return asked


def torn(checkpoint: str | Path) -> str | None:
    """Returns what is wrong with a checkpoint, None if it is whole.

    The Trainer writes `trainer_state.json` last, in one go; just before that, `seal` records what all other files hold. A
    checkpoint of another Trainer has no seal, so its files are opened.
    """
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / _TRAINER_STATE_NAME).read_text())
        if not (checkpoint / SEAL_NAME).is_file():
            return _torn_without_seal(checkpoint)
        for name, content in json.loads((checkpoint / SEAL_NAME).read_text()).items():
            if _content(checkpoint / name) != content:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:  # also for JSON of another kind
        return one_line(error)
    return None


def _torn_without_seal(checkpoint: Path) -> str | None:
    """As `torn`, from the headers of the files that a resume needs."""
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
        archives.append(next(checkpoint.glob("optimizer.bin"), checkpoint / "optimizer.pt"))  # FSDP writes .bin
    return next((f"{path.name} is not whole" for path in archives if not zipfile.is_zipfile(path)), None)


def seal(folder: Path) -> None:
    """Flushes the files of a checkpoint to disk, with a record of what they hold: name -> [size, CRC-32]."""
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
    """Wraps the writing of one checkpoint: deletes an older one first, and what is incomplete if writing fails."""
    mine = trainer.args.should_save
    with writing(folder, "Once this is fixed, training resumes from the last whole checkpoint."):
        try:
            if mine and folder.exists():  # left by an earlier training, and must not be mixed with this one
                shutil.rmtree(folder)
            trainer.accelerator.wait_for_everyone()
            yield
            if mine:
                sync(folder)
        except BaseException:
            if mine and folder.exists() and torn(folder):  # useless, and it may fill the disk
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def whole_weights(trainer: Trainer) -> Iterator[None]:
    """Within this context, FSDP saves full weights even if its checkpoints are sharded."""
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
    """Writes the state of pruning and of the losses beside the optimizer's. Called by all processes."""
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
    """Restores the state of pruning and returns the trainer's, as `save_state` wrote them; empty for another Trainer's."""
    pruner, path = trainer.pruner, folder / MASKS_NAME
    pruner.masks = load_masks(path) if path.is_file() else trainer.given_masks  # a failed try may have left later ones
    if trainer.is_multitask and pruner.config and "layer" in pruner.config.granularity:
        trainer.model.skip_layers(AutoConfig.from_pretrained(folder).skipped_layers)
    if (folder / PRUNING_STATE_NAME).is_file():
        pruner.load_state(load_file(folder / PRUNING_STATE_NAME))
    if pruner.guard:
        pruner.guard.load(folder / GUARD_NAME)
    state = json.loads((folder / STATE_NAME).read_text()) if (folder / STATE_NAME).is_file() else {}
    pruner.scorer.measures = state.get("measures", {})
    return state
