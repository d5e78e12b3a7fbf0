"""Matrices in two factors, and back, with what a file of the model has to say of it. Layer 7."""

from torch import nn
from transformers import PreTrainedModel

from hf_disparse.config import PruningConfig, UserError
from hf_disparse.model.low_rank import low_rank_modules, product, replace, split
from hf_disparse.model.prunable import prunable_parameters
from hf_disparse.model.structure import set_structure, structure_of
from hf_disparse.model.unshared import PRIVATE


def factorise(model: PreTrainedModel, config: PruningConfig | None = None) -> list[str]:
    """Puts two factors in place of the encoder's prunable matrices, in place, at full rank: outputs stay within rounding.

    Before there is an optimizer, which would hold the parameters that go. Factors that are there already stay.

    Args:
        config: whose `target_modules` and `exclude_modules` choose the matrices; by default all in the encoder's layers.

    Returns:
        The names of the modules in `model.base_model` that are new.

    Raises:
        UserError: nothing to factorise, or tasks with layers of their own.
    """
    encoder = model.base_model
    if hasattr(encoder, PRIVATE):
        raise UserError("factorise: expected an encoder that is shared, got one where tasks have layers of their own")
    names = _matrices(model, config)
    for name in names:
        replace(encoder, name, split(encoder.get_submodule(name)))
    record_ranks(model)
    return names


def is_factorised(model: PreTrainedModel, config: PruningConfig | None = None) -> bool:
    """Whether `factorise` would find nothing to do."""
    return not _matrices(model, config)


def multiply_out(model: PreTrainedModel) -> None:
    """The reverse: plain matrices, in place, which take no less than they did before they were factorised."""
    encoder = model.base_model
    for name, module in low_rank_modules(encoder).items():
        replace(encoder, name, product(module))
    record_ranks(model)


def record_ranks(model: PreTrainedModel) -> None:
    """Writes the ranks that there are into the model's configuration, for its files to be read by."""
    ranks = {name: module.rank for name, module in low_rank_modules(model.base_model).items()}
    set_structure(model, structure_of(model) | {"ranks": ranks})


def _matrices(model: nn.Module, config: PruningConfig | None) -> list[str]:
    """The prunable modules of the encoder that are no factors, by their names in it."""
    names = {
        id(module.weight): name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)
    }
    factors = {id(f.weight) for m in low_rank_modules(model.base_model).values() for f in (m.down, m.up)}
    return [names[id(p)] for p in prunable_parameters(model, config).values() if id(p) not in factors]
