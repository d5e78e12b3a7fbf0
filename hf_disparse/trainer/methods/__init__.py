"""The pruning methods by their name in a PruningConfig, one file each."""

from hf_disparse.config import PruningConfig
from hf_disparse.trainer.methods.base import Method, Update
from hf_disparse.trainer.methods.saliency import Saliency

METHODS: dict[str, type[Method]] = {"saliency": Saliency}


def new_method(config: PruningConfig) -> Method:
    """The method that `config` is of, before any training."""
    return METHODS[config.method](config)


__all__ = ["METHODS", "Method", "Saliency", "Update", "new_method"]
