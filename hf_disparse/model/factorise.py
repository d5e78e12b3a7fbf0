"""Turns a model's matrices into two factors and back, and records the ranks in its configuration."""

from torch import nn
from transformers import PreTrainedModel

from hf_disparse.config import PruningConfig, UserError
from hf_disparse.model.low_rank import low_rank_modules, to_linear, to_low_rank
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.model.structure import set_structure, structure_of
from hf_disparse.model.unshared import PRIVATE


def factorise(model: PreTrainedModel, config: PruningConfig | None = None) -> list[str]:
    """Replaces the encoder's prunable matrices by two full-rank factors, in place; outputs stay the same up to rounding.

    Call it before creating an optimizer, which would hold on to the old parameters. Existing factors stay.

    Args:
        config: its `target_modules` and `exclude_modules` choose the matrices; by default all in the encoder's layers.

    Returns:
        The names of the new modules in `model.base_model`.

    Raises:
        UserError: there is nothing to factorise, or tasks have layers of their own.
    """
    encoder = model.base_model
    if hasattr(encoder, PRIVATE):
        raise UserError("factorise: some tasks have layers of their own; factorise before calling unshare")
    names = _matrices(model, config)
    for name in names:
        encoder.set_submodule(name, to_low_rank(encoder.get_submodule(name)))
    record_ranks(model)
    return names


def is_factorised(model: PreTrainedModel, config: PruningConfig | None = None) -> bool:
    """Whether `factorise` would change nothing."""
    return not _matrices(model, config)


def multiply_out(model: PreTrainedModel) -> None:
    """Undoes `factorise`, in place: plain matrices, at the dense size however low their rank is."""
    encoder = model.base_model
    for name, module in low_rank_modules(encoder).items():
        encoder.set_submodule(name, to_linear(module))
    record_ranks(model)


def record_ranks(model: PreTrainedModel) -> None:
    """Writes the current ranks into the model's configuration, which loading needs."""
    ranks = {name: module.rank for name, module in low_rank_modules(model.base_model).items()}
    set_structure(model, structure_of(model) | {"ranks": ranks})


def _matrices(model: nn.Module, config: PruningConfig | None) -> list[str]:
    """Names, within the encoder, of the prunable modules that are not factors already."""
    names = {
        id(module.weight): name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)
    }
    factors = {id(f.weight) for m in low_rank_modules(model.base_model).values() for f in (m.down, m.up)}
    return [names[id(p)] for p in prunable_parameters(model, config).values() if id(p) not in factors]
