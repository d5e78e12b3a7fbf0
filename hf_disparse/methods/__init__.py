"""The pruning methods, one file each: its equations first, then what it does in training."""

from importlib import import_module

from hf_disparse.config import PruningConfig
from hf_disparse.methods.base import Method, Update


def method_class(config: PruningConfig | type[PruningConfig]) -> type[Method]:
    """Returns the class that prunes by `config`: `METHOD` in the file of this folder that has the method's name."""
    return import_module(f"{__name__}.{config.method}").METHOD


def new_method(config: PruningConfig) -> Method:
    """Returns the method of `config`, before any training."""
    return method_class(config)(config)


__all__ = ["Method", "Update", "method_class", "new_method"]
