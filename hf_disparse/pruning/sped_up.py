"""What pruning has to know of models that `speed_up` has changed: they have no dense matrices to prune."""

from torch import nn

from hf_disparse.config import UserError

WAY_BACK = "call hf_disparse.undo_speed_up(model) first"


class SpedUp:
    """Marks the Linear modules that `speed_up` makes."""


def is_sped_up(model: nn.Module) -> bool:
    """Whether `speed_up` has changed this model."""
    return any(isinstance(module, SpedUp) for module in model.modules())


def refuse_sped_up(model: nn.Module, where: str) -> None:
    """Raises UserError if the model is sped up: what `where` names works on dense matrices."""
    if is_sped_up(model):
        raise UserError(f"{where}: the model is sped up; {WAY_BACK}")
