"""How sparse a model is, by denominator."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from hf_disparse.model.low_rank import low_rank_modules
from hf_disparse.pruning.masks import count_nonzeros, count_pruned
from hf_disparse.pruning.sped_up import refuse_sped_up


def masked_share(model: nn.Module, masks: Mapping[str, Tensor]) -> float:
    """Returns the pruned fraction of the masked weights by their masks; factors count as in `sparsity_report`."""
    parameters, (pruned, size) = dict(model.named_parameters()), count_pruned(masks)
    total = dense_size(model, [parameters[name] for name in masks])
    return (total - size + pruned) / total


def sparsity_report(model: nn.Module, encoder: nn.Module, prunable: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the fraction of exact zeros, whatever the masks, by denominator: `prunable` weights, all parameters of the `encoder`, all of the `model`.

    For a factorised matrix, the fraction of its dense size that is saved; negative while the factors are larger.

    Raises:
        UserError: the model is sped up.
    """

    refuse_sped_up(model, "sparsity_report")

    def fraction(tensors) -> float:
        tensors = list(tensors)
        total = dense_size(model, tensors)
        return (total - count_nonzeros(dict(enumerate(tensors)))) / total if total else 0.0

    groups = {"prunable": prunable.values(), "encoder": encoder.parameters(), "model": model.parameters()}
    return {name: fraction(tensors) for name, tensors in groups.items()}


def dense_size(model: nn.Module, parameters: Iterable[Tensor]) -> int:
    """How many `parameters` of `model` are, a matrix in two factors counting as it was dense: in * out."""
    sizes = {}
    for module in low_rank_modules(model).values():
        sizes |= {id(module.down.weight): module.in_features * module.out_features, id(module.up.weight): 0}
    return sum(sizes.get(id(p), p.numel()) for p in parameters)
