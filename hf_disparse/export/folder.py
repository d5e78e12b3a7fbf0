"""A model's folder: what is copied from one to the next, and what config.json says of the weights beside it."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from hf_disparse.config import UserError
from hf_disparse.files import read_json
from hf_disparse.model.adapters import ADAPTER_FOLDER
from hf_disparse.model.loading import COMPANIONS, CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from hf_disparse.model.multitask import MultitaskConfig
from hf_disparse.model.structure import FORM_VERSION, METHOD

_NOT_PUBLISHED = (INDEX_NAME, "phase.json", "trainer_state.json", "analysis.json", "data.json")
_OF_THE_MODEL = (CONFIG_NAME, "README.md", "pruning_config.json", "results.json")


def is_multitask(folder: str | Path) -> bool:
    """Whether a folder holds a `MultitaskModel`."""
    return read_json(Path(folder, CONFIG_NAME)).get("model_type") == MultitaskConfig.model_type


def copy_companions(source: Path, target: Path, tokenizer_only: bool = False) -> None:
    """Copies the published files of a model's folder except the weights: tokenizer, configurations, adapters, card.

    The card of a MultitaskModel is left out, because its bytes and times no longer hold: `write_card` makes a new one.
    """
    skipped = set(_NOT_PUBLISHED)
    if tokenizer_only:
        skipped.update(_OF_THE_MODEL)
    elif is_multitask(source):
        skipped.add("README.md")
    paths = [path for path in source.iterdir() if path.is_file() and path.suffix in COMPANIONS]
    paths += () if tokenizer_only else source.glob(f"{ADAPTER_FOLDER}*/adapter_*")
    for path in paths:
        if path.name not in skipped:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def describe(folder: Path, dtype: torch.dtype | None = None, packed: bool = False) -> None:
    """Adds to config.json what is needed to read the weights beside it."""
    path = folder / CONFIG_NAME
    config = read_json(path)
    if dtype:
        config["dtype"] = str(dtype).removeprefix("torch.")
    form = config.get("quantization_config") or {}
    if not isinstance(form, dict) or form.get("quant_method", METHOD) != METHOD:
        raise UserError(
            f"{path}: a model with a quantization_config of another library cannot be exported: {str(form)[:100]}"
        )
    if packed or form:  # plain transformers reads the others as they are
        form |= {"quant_method": METHOD, "version": FORM_VERSION, "packed": packed}
        config["quantization_config"] = form
        form["sha256"] = digests(folder, config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def digests(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """file -> sha256, of the weights' file and of `config` without its own digests, as JSON with sorted keys."""
    form = {key: value for key, value in config["quantization_config"].items() if key != "sha256"}
    text, weights = json.dumps(config | {"quantization_config": form}, sort_keys=True), hashlib.sha256()
    with open(folder / WEIGHTS_NAME, "rb") as file:
        while chunk := file.read(2**20):
            weights.update(chunk)
    return {CONFIG_NAME: hashlib.sha256(text.encode()).hexdigest(), WEIGHTS_NAME: weights.hexdigest()}
