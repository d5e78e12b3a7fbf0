"""Which weights and parts of a model are pruned."""

from collections.abc import Sequence
from functools import partial

import regex
from torch import nn

from hf_disparse.config import PruningConfig, UserError
from hf_disparse.model.adapters import has_adapters
from hf_disparse.model.architectures import encoder_layers, find_sites
from hf_disparse.model.low_rank import low_rank_modules
from hf_disparse.model.unshared import shared_name
from hf_disparse.pruning.decision import Masks
from hf_disparse.pruning.granularity import granularity_of
from hf_disparse.pruning.parts import Sites
from hf_disparse.pruning.sped_up import refuse_sped_up


def prunable_parameters(model: nn.Module, config: PruningConfig | None = None) -> dict[str, nn.Parameter]:
    """Returns the weights that pruning may zero, by their name in `model`: 2-D weights of Linear modules of the encoder.

    By default these are the weights of its layers, that is, below a ModuleList of the encoder, not embeddings, norms, biases,
    poolers or heads. `config.target_modules` chooses among all Linear modules of the encoder instead, and
    `config.exclude_modules` leaves some out. Works on a `MultitaskModel` and on any transformers model with an encoder
    (`model.base_model`). A matrix in two factors (see `hf_disparse.model.low_rank`) is matched by the name of the matrix
    and gives both factors.

    Raises:
        UserError: nothing matches.
    """
    refuse_sped_up(model, "pruning")
    if has_adapters(model):
        raise UserError("pruning: expected a model without adapters, got one with PEFT's; prune before adding them")
    encoder = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is encoder)
    lists = [name + "." for name, module in encoder.named_modules() if isinstance(module, nn.ModuleList)]
    target, exclude = (config.target_modules, config.exclude_modules) if config else (None, None)
    found, full, seen, factorised = {}, "", set(), low_rank_modules(encoder)
    for name, module in encoder.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        place = f"{prefix}.{name}" if prefix else name
        full = shared_name(encoder, name)  # a task's own layer is matched by the name of the layer it was copied from
        full = f"{prefix}.{full}" if prefix else full
        if name.rpartition(".")[0] in factorised:
            full = full.rpartition(".")[0]  # a factor is matched by the name of its matrix
        wanted = name.startswith(tuple(lists)) if target is None else _matches(full, target)
        if wanted and not (exclude is not None and _matches(full, exclude)):
            if id(module.weight) not in seen:  # a weight shared by two modules appears under its first name
                found[f"{place}.weight"] = module.weight
            seen.add(id(module.weight))
    if not found:
        wish = f"target_modules={target!r}, exclude_modules={exclude!r}"
        raise UserError(f"pruning: no Linear module of the encoder matches {wish}; the names look like '{full}'")
    return found


def _matches(name: str, patterns: str | Sequence[str]) -> bool:
    """Applies PEFT's rule: a string is a regular expression for the whole name, a list holds names or their endings."""
    if isinstance(patterns, str):
        try:
            return regex.fullmatch(patterns, name, timeout=1) is not None
        except TimeoutError:
            got = f"{patterns[:100]!r}, which is not done with '{name}' after a second"
            raise UserError(f"pruning: expected a regular expression that ends, got {got}") from None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns)


def prunable_sites(model: nn.Module, config: PruningConfig) -> Sites:
    """Returns the sites of the parts that `config` prunes, empty for weights; names are those of `model`'s modules."""
    encoder = model.base_model
    prefix = next(name for name, module in model.named_modules() if module is encoder)
    find = partial(find_sites, encoder, f"{prefix}." if prefix else "")
    return granularity_of(config).sites(prunable_parameters(model, config), find)


def skip_gone_layers(model: nn.Module, config: PruningConfig | None, masks: Masks) -> None:
    """Makes a MultitaskModel skip the layers of which the masks keep no weight, if `config` prunes layers."""
    if config and "layer" in config.granularity:
        model.skip_layers(sorted({*model.config.skipped_layers, *_gone_layers(model, masks)}))


def _gone_layers(model: nn.Module, masks: Masks) -> list[int]:
    """The indices of the layers of which the masks keep no weight."""
    layers = encoder_layers(model.base_model)
    keeps = {id(p): bool(masks[name].any()) for name, p in model.named_parameters() if name in masks}
    by_layer = [[keeps[id(p)] for p in layer.parameters() if id(p) in keeps] for layer in layers]
    return [i for i, kept in enumerate(by_layer) if kept and not any(kept)]
