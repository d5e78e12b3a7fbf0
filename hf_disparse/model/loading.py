"""Models and tokenizers by name, whatever is wrong with them said in a line. Layer 10."""

from pathlib import Path

import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from hf_disparse.config import UserError, one_line
from hf_disparse.files import open_safetensors, read_json
from hf_disparse.model.adapters import ADAPTER_FOLDER
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.tasks import resolve


def load_model(folder: str | Path, where: str = "output_dir") -> MultitaskModel:
    """The model of a folder, such as a phase has finished; `where` is what to call it in an error."""
    return load_pretrained(where, MultitaskModel, str(folder))


def load_pretrained(where: str, cls, name: str, method: str = "from_pretrained", *arguments, **options):
    """`cls.from_pretrained(name)`, or another method of it; a model that is not there or does not load is the user's to mend."""
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise UserError(f"{where}: expected a Hub id or a folder, but there is no folder {name}")
    try:
        return getattr(cls, method)(name, *arguments, **options)
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers, safetensors and the Hub raise a dozen kinds here
        got = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{where}: expected a model that loads from {name}, got {got}") from error


WEIGHTS_NAME, CONFIG_NAME, INDEX_NAME = "model.safetensors", "config.json", "model.safetensors.index.json"


COMPANIONS = (".json", ".txt", ".model", ".md")  # of a model's folder: tokenizer, configurations, card


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
            patterns = ["*.safetensors", *(f"*{suffix}" for suffix in COMPANIONS)]
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
