"""Every task's scores on disk, so that later decisions need neither data nor backward passes.

Each task has one file, `scores/<task>.safetensors`: float32 under the weights' names and with their shapes (float64 for float64
weights), 4 bytes a prunable weight. Scores are at least 0, so the sign is free: it is minus (even of 0) where the weight was
pruned before the task was scored. Ranks would not do because `sum` and `max` need the scores, and fewer bits would change
decisions.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hf_disparse.config import FORMAT_VERSION, UserError
from hf_disparse.files import open_safetensors

SCORES_FOLDER = "scores"
_DTYPES = {"F32": torch.float32, "F64": torch.float64}


def keep_scores(
    task_scores: Iterable[tuple[str, Mapping[str, Tensor]]], folder: str | Path, masks: Mapping[str, Tensor]
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Writes each task's scores into `folder`, replacing the scores there, and passes them on.

    Args:
        masks: in force while the tasks are scored; a weight without a mask is live.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for place, (task, scores) in enumerate(task_scores):
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in scores.items()}
        stored |= {n: torch.where(masks[n].cpu(), s, -s) for n, s in stored.items() if n in masks}
        metadata = {
            "version": str(FORMAT_VERSION),
            "place": str(place),
        }  # the order of tasks, because sums in another order round differently
        save_file(stored, folder / f"{task}.safetensors", metadata=metadata)
        del stored
        yield task, scores


def scored_tasks(folder: str | Path) -> dict[str, Path]:
    """Returns task -> its file, in the order in which tasks were scored.

    Raises:
        UserError: there is no file, or a file was not written by `keep_scores`.
    """
    places = {}
    for path in sorted(Path(folder, SCORES_FOLDER).glob("*.safetensors")):
        with open_safetensors(path) as file:
            metadata = file.metadata() or {}
        version, place = metadata.get("version"), metadata.get("place", "")
        if version != str(FORMAT_VERSION) or not (place.isascii() and place.isdigit() and len(place) < 10):
            raise UserError(f"{path}: expected scores of format version {FORMAT_VERSION}, got {str(metadata)[:100]}")
        places[path] = int(place)
    if not places:
        raise UserError(
            f"{folder}: there is no {SCORES_FOLDER}/*.safetensors; "
            "expected the folder of a run that kept its scores (pruning.keep_scores: true)"
        )
    return {path.stem: path for path in sorted(places, key=places.get)}


def load_scores(path: str | Path, like: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns one task's scores and the masks in force, on the CPU; checks names and sizes before allocating memory.

    Args:
        like: the scored weights by name, as `prunable_parameters` returns them.

    Raises:
        UserError: the file is truncated, or its scores belong to other weights.
    """
    with open_safetensors(path) as file:
        names = set(file.keys())
        for name in sorted(names ^ set(like)):
            where, other = ("file", "model") if name in names else ("model", "file")
            raise UserError(
                f"{path}: these scores are of another model: only the {where}, not the {other}, has '{name[:100]}'"
            )
        for name, weight in like.items():
            stored = file.get_slice(name)
            if stored.get_dtype() not in _DTYPES or list(stored.get_shape()) != list(weight.shape):
                got = f"{stored.get_dtype()} {tuple(stored.get_shape())}"
                raise UserError(f"{path}: expected float32 {tuple(weight.shape)} for '{name}', got {got}")
        scores = {name: file.get_tensor(name) for name in like}
    for name, tensor in scores.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: expected finite scores, got NaN or infinity in '{name}'")
    masks = {name: ~torch.signbit(tensor) for name, tensor in scores.items()}
    return {name: tensor.abs_() for name, tensor in scores.items()}, masks
