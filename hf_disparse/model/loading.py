"""Models and tokenizers by name, whatever is wrong with them said in a line. Layer 10."""

from pathlib import Path

from hf_disparse.config import UserError, one_line
from hf_disparse.model.multitask import MultitaskModel


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
