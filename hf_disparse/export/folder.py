"""The folders that models are exported from and to. Layer 7."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from hf_disparse.config import UserError, one_line
from hf_disparse.export.form import FORM_VERSION, METHOD
from hf_disparse.files import open_safetensors, writing
from hf_disparse.model.adapters import ADAPTER_FOLDER
from hf_disparse.model.multitask import MultitaskConfig, MultitaskModel
from hf_disparse.tasks import resolve

WEIGHTS_NAME, CONFIG_NAME, INDEX_NAME = "model.safetensors", "config.json", "model.safetensors.index.json"
_COMPANIONS = (".json", ".txt", ".model", ".md")  # of a model's folder: tokenizer, configurations, card
_NOT_PUBLISHED = (INDEX_NAME, "phase.json", "trainer_state.json", "analysis.json", "data.json")
_OF_THE_MODEL = (CONFIG_NAME, "README.md", "pruning_config.json", "results.json")


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """A folder beside `folder` to write to, which takes its name if all goes well and is gone if not.

    Raises:
        UserError: `folder` holds something.
    """
    folder = Path(folder).resolve()
    with writing(folder, "Mend that or name another folder."):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"output_dir: expected a new or empty folder, got {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:40]}-") as inside:
            target = Path(inside, "new")
            target.mkdir()
            yield target
            os.replace(target, folder)  # the current folder, for one, cannot be replaced


def model_folder(name: str | Path) -> Path:
    """The local folder of a model: of a path, `package:NAME/path`, or a Hub id, which is downloaded."""
    if isinstance(name, nn.Module):
        raise UserError(
            f"model: expected one of transformers', a folder or a Hub id, got a {type(name).__name__}; adapters are added by "
            "MultitaskModel.add_adapter"
        )
    path = Path(resolve(str(name)))
    if not path.is_dir():
        try:
            patterns = ["*.safetensors", *(f"*{suffix}" for suffix in _COMPANIONS)]
            path = Path(snapshot_download(str(name), allow_patterns=patterns, ignore_patterns="*/*"))
            if read_json(path / CONFIG_NAME).get("adapters"):
                snapshot_download(str(name), allow_patterns=[f"{ADAPTER_FOLDER}*/adapter_*"])
        except Exception as error:  # huggingface_hub raises a dozen kinds
            raise UserError(f"{name}: expected the folder or the Hub id of a model, got {one_line(error)}") from error
    if not (path / CONFIG_NAME).is_file():
        raise UserError(f"{name}: expected a model's folder, with {CONFIG_NAME}, got one without")
    return path


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, as the class that saved it."""
    names = read_json(folder / CONFIG_NAME).get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    cls = MultitaskModel if name == "MultitaskModel" else getattr(transformers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        got = str(names)[:100]
        raise UserError(f"{folder}: expected a model of transformers' or a MultitaskModel, got architectures {got}")
    try:
        model, report = cls.from_pretrained(folder, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # transformers and safetensors raise a dozen kinds
        raise UserError(f"{folder}: expected a model that loads, got {one_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys"):
        if report[kind]:  # transformers would fill in random weights and say so in a report
            wrong = ", ".join(sorted(report[kind])[:3])
            raise UserError(
                f"{folder}: expected exactly the weights of a {name}, got {kind.replace('_', ' ')}: {wrong}"
            )
    return model


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in one piece or in shards."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if not (folder / INDEX_NAME).is_file():
        raise UserError(f"{folder}: expected {WEIGHTS_NAME}, got a folder without it (pickled weights are not read)")
    places = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{folder}: expected {INDEX_NAME} to map weights to files, got {str(places)[:100]}")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{folder}: {INDEX_NAME} names the file {name!r}, which is not in that folder")
        with open_safetensors(folder / name) as stored:
            lost = {tensor for tensor, place in places.items() if place == name} - set(stored.keys())
        if lost:
            raise UserError(f"{folder / name}: expected the weight {min(lost)}, as {INDEX_NAME} has it, got none")
    return [folder / name for name in names]


def open_model(model: PreTrainedModel | str | Path) -> tuple[PreTrainedModel, Path | None]:
    """A model and the folder it came from; one that is in memory already is taken as it is, and came from none."""
    if isinstance(model, PreTrainedModel):
        return model, None
    folder = model_folder(model)
    return load(folder), folder


def copy_companions(source: Path, target: Path, tokenizer_only: bool = False) -> None:
    """Copies what a model's folder holds besides weights and is published: tokenizer, configurations, adapters, card.

    But not the card of a MultitaskModel, which tells of bytes and times: `write_card` makes a new one.
    """
    skipped = set(_NOT_PUBLISHED)
    if tokenizer_only:
        skipped.update(_OF_THE_MODEL)
    elif read_json(source / CONFIG_NAME).get("model_type") == MultitaskConfig.model_type:
        skipped.add("README.md")
    paths = [path for path in source.iterdir() if path.is_file() and path.suffix in _COMPANIONS]
    paths += () if tokenizer_only else source.glob(f"{ADAPTER_FOLDER}*/adapter_*")
    for path in paths:
        if path.name not in skipped:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def describe(folder: Path, dtype: torch.dtype | None = None, packed: bool = False) -> None:
    """Completes config.json by what it takes to read the weights beside it."""
    path = folder / CONFIG_NAME
    config = read_json(path)
    if dtype:
        config["dtype"] = str(dtype).removeprefix("torch.")
    form = config.get("quantization_config") or {}
    if not isinstance(form, dict) or form.get("quant_method", METHOD) != METHOD:
        raise UserError(f"{path}: expected no quantization_config but ours, got {str(form)[:100]}")
    if packed or form:  # a model that plain transformers reads stays without
        form |= {"quant_method": METHOD, "version": FORM_VERSION, "packed": packed}
        config["quantization_config"] = form
        form["sha256"] = digests(folder, config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def digests(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """sha256 of the weights' file and of what config.json says but for the digests themselves, its keys sorted."""
    form = {key: value for key, value in config["quantization_config"].items() if key != "sha256"}
    text, weights = json.dumps(config | {"quantization_config": form}, sort_keys=True), hashlib.sha256()
    with open(folder / WEIGHTS_NAME, "rb") as file:
        while chunk := file.read(2**20):
            weights.update(chunk)
    return {CONFIG_NAME: hashlib.sha256(text.encode()).hexdigest(), WEIGHTS_NAME: weights.hexdigest()}


def read_json(path: Path) -> dict[str, Any]:
    """A file of a model's folder."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON, got a file that does not parse: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
