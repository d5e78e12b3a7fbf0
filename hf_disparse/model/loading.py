"""Models and tokenizers from a folder or the Hub; whatever is wrong with them becomes a UserError of one line.

`load_pretrained` is any class's `from_pretrained`. `load_model` reads a MultitaskModel that a run wrote. `open_model` takes what
a user exports or pushes: it finds out the class itself and refuses weights that are missing or unexpected.
"""

from pathlib import Path

import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from hf_disparse.config import UserError, one_line
from hf_disparse.files import open_safetensors, read_json, resolve
from hf_disparse.model.adapters import ADAPTER_FOLDER
from hf_disparse.model.multitask import MultitaskModel

WEIGHTS_NAME, CONFIG_NAME, INDEX_NAME = "model.safetensors", "config.json", "model.safetensors.index.json"
COMPANIONS = (".json", ".txt", ".model", ".md")  # of a model's folder: tokenizer, configurations, card


def load_model(folder: str | Path, where: str = "output_dir") -> MultitaskModel:
    """Loads a MultitaskModel that a run wrote; errors begin with `where`."""
    return load_pretrained(where, MultitaskModel, str(folder))


def load_pretrained(where: str, cls, name: str, method: str = "from_pretrained", *arguments, **options):
    """Calls `cls.from_pretrained(name)`, or another `method`; raises UserError, beginning with `where`, if that fails."""
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise UserError(f"{where}: there is no folder {name}; expected a Hub id or a folder")
    try:
        return getattr(cls, method)(name, *arguments, **options)
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the Hub raise a dozen kinds here
        raise UserError(f"{where}: cannot load {name}: {type(error).__name__}: {one_line(error)}") from error


def open_model(model: PreTrainedModel | str | Path) -> tuple[PreTrainedModel, Path | None]:
    """Returns a model and the folder it was loaded from; a model in memory is returned as it is, with None."""
    if isinstance(model, PreTrainedModel):
        return model, None
    folder = model_folder(model)
    return load_as_saved(folder), folder


def model_folder(name: str | Path) -> Path:
    """Returns the local folder of a model given by its path, `package:NAME/path` or Hub id, which is downloaded."""
    if isinstance(name, nn.Module):
        raise UserError(
            f"model: expected one of transformers', a folder or a Hub id, got a {type(name).__name__}; adapters are added by "
            "MultitaskModel.add_adapter"
        )
    path = Path(resolve(str(name)))
    if not path.is_dir():
        try:
            patterns = ["*.safetensors", *(f"*{suffix}" for suffix in COMPANIONS)]
            path = Path(snapshot_download(str(name), allow_patterns=patterns, ignore_patterns="*/*"))
            if read_json(path / CONFIG_NAME).get("adapters"):
                snapshot_download(str(name), allow_patterns=[f"{ADAPTER_FOLDER}*/adapter_*"])
        except Exception as error:  # huggingface_hub raises a dozen kinds
            raise UserError(f"{name}: neither a folder nor a model on the Hub: {one_line(error)}") from error
    if not (path / CONFIG_NAME).is_file():
        raise UserError(f"{name}: not the folder of a model, because it has no {CONFIG_NAME}")
    return path


def load_as_saved(folder: Path) -> PreTrainedModel:
    """Loads a model as the class that saved it, with exactly the weights of that class."""
    names = read_json(folder / CONFIG_NAME).get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    cls = MultitaskModel if name == "MultitaskModel" else getattr(transformers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        got = str(names)[:100]
        raise UserError(f"{folder}: expected a MultitaskModel or one of transformers' models, got architectures {got}")
    try:
        model, report = cls.from_pretrained(folder, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # transformers and safetensors raise a dozen kinds
        raise UserError(f"{folder}: cannot load the model: {one_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys"):
        if report[kind]:  # transformers would only report them and initialise missing weights at random
            wrong = ", ".join(sorted(report[kind])[:3])
            raise UserError(
                f"{folder}: expected exactly the weights of a {name}, got {kind.replace('_', ' ')}: {wrong}"
            )
    return model


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or several shards."""
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if not (folder / INDEX_NAME).is_file():
        raise UserError(f"{folder}: there is no {WEIGHTS_NAME}; pickled weights are not supported")
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
            raise UserError(f"{folder / name}: the weight {min(lost)} is missing, which {INDEX_NAME} says it holds")
    return [folder / name for name in names]
