"""The pruning methods by their name in a PruningConfig, one file each."""

from hf_disparse.config import PruningConfig
from hf_disparse.methods.base import Method, Update
from hf_disparse.methods.dynamic import Dynamic
from hf_disparse.methods.flop import Flop
from hf_disparse.methods.group_lasso import GroupLasso
from hf_disparse.methods.l0 import L0
from hf_disparse.methods.movement import Movement
from hf_disparse.methods.platon import Platon
from hf_disparse.methods.rank import Rank
from hf_disparse.methods.saliency import Saliency

METHODS: dict[str, type[Method]] = {
    "saliency": Saliency,
    "dynamic": Dynamic,
    "group_lasso": GroupLasso,
    "rank": Rank,
    "flop": Flop,
    "movement": Movement,
    "platon": Platon,
    "l0": L0,
}


def new_method(config: PruningConfig) -> Method:
    """The method that `config` is of, before any training."""
    return METHODS[config.method](config)


__all__ = [
    "L0",
    "METHODS",
    "Flop",
    "Movement",
    "Platon",
    "Rank",
    "Saliency",
    "Update",
    "new_method",
]
