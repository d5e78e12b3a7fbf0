"""Which checkpoint of a run was written to its end, and in which form."""

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import Trainer

from hf_disparse.masks import MASKS_NAME

STATE_NAME = "disparse_state.json"


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-N` of `folder` that was written to its end, or None.

    `trainer_state.json` is written last: where it parses, a killed process had written the others. They are looked at
    all the same, for disks fill and files get cut.
    """
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True):
        if _is_whole(path):
            return str(path)
    return None


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


def _is_whole(checkpoint: Path) -> bool:
    weights = [*checkpoint.glob("model*.safetensors"), *checkpoint.glob("adapter_model.safetensors")]
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        ours = checkpoint / STATE_NAME  # absent from a foreign Trainer's
        processes = json.loads(ours.read_text()).get("processes", 1) if ours.is_file() else 1
        for index in checkpoint.glob("model.safetensors.index.json"):
            weights += [checkpoint / name for name in set(json.loads(index.read_text())["weight_map"].values())]
        for path in (
            *weights,
            *checkpoint.glob("adapter-*/adapter_*.safetensors"),
            *checkpoint.glob(MASKS_NAME),
            *checkpoint.glob("guard/*.safetensors"),
        ):
            with safe_open(str(path), framework="pt"):  # checks the header against the size of the file
                pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    random = list(checkpoint.glob("rng_state*.pth"))  # each process writes its own, when it comes to it
    parts = [checkpoint / "pytorch_model_fsdp_0" / ".metadata", checkpoint / "optimizer_0" / ".metadata"]
    if all(path.is_file() for path in parts):  # of FSDP, in parts: written once all processes have written theirs
        weights, optimizer = parts, []
    else:
        optimizer = [next(checkpoint.glob("optimizer.bin"), checkpoint / "optimizer.pt")]  # .bin: of FSDP, whole
    archives = [*optimizer, checkpoint / "scheduler.pt", *random]
    return bool(weights) and len(random) >= processes and all(zipfile.is_zipfile(path) for path in archives)
