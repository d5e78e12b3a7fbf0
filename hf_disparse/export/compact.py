"""Compaction: removes pruned heads, neurons, layers and ranks from the model for good.

A head, neuron or rank component is pruned when its columns of the following matrix are all zero, so that nothing reads it. What
the architecture's own configuration cannot express (fewer heads, neurons that differ by layer) goes into `structure`, from
which `hf_disparse.export.loading` rebuilds the encoder before it loads the weights.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from hf_disparse.config import UserError
from hf_disparse.export.folder import copy_companions, describe
from hf_disparse.fast.speed_up import undo_speed_up
from hf_disparse.files import new_folder
from hf_disparse.model.adapters import has_adapters
from hf_disparse.model.architectures import Layout, encoder_layers, find_sites, first_stays, layout_of
from hf_disparse.model.loading import open_model
from hf_disparse.model.low_rank import low_rank_modules
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.model.structure import Cuts, keep_parts, set_structure, structure_of
from hf_disparse.model.unshared import PRIVATE
from hf_disparse.pruning.parts import Site, sum_by_part
from hf_disparse.pruning.sped_up import refuse_sped_up


def compact(model: PreTrainedModel, optimizer: Optimizer | None = None) -> dict[str, tuple[int, int]]:
    """Removes pruned parts and skipped layers from `model`, in place; its outputs stay the same up to rounding.

    Args:
        optimizer: its state is cut as well, so that training continues as it would have. Masks are not: find new ones
            with `find_masks`.

    Returns:
        kind of part -> (number before, number after).

    Raises:
        UserError: the encoder's layers are not known, or the model has adapters or private layers.
    """
    refuse_sped_up(model, "compact")
    if has_adapters(model):
        raise UserError("compact: a model with PEFT adapters cannot be compacted; compact before adding them")
    if hasattr(model.base_model, PRIVATE):
        raise UserError(
            "compact: an encoder whose tasks have private layers cannot be compacted.\n"
            "Compact before unsharing, or export the tasks one by one."
        )
    encoder, before = model.base_model, count_parts(model.base_model)
    layout = layout_of(encoder)
    cuts = Cuts(optimizer)
    heads = remaining_heads(model)
    if isinstance(model, MultitaskModel):
        drop_layers(model, cuts, heads)
    for kind, sites in find_sites(encoder).items():
        for name, site in sites.items() if kind != "layer" else ():
            keep = _parts_in_use(encoder, site)
            if keep.all():
                continue
            keep_parts(encoder, layout, kind, name, site, keep, cuts)
            if kind == "head":
                indices = heads.get(name, range(site.parts))
                heads[name] = [index for index, stays in zip(indices, keep.tolist(), strict=True) if stays]
    _record_shape(model, layout, heads)
    after = count_parts(encoder)
    return {kind: (before[kind], after[kind]) for kind in before}


def _parts_in_use(encoder: nn.Module, site: Site) -> Tensor:
    """(parts,) bool: which parts have a non-zero column in the matrix that reads them; at least one."""
    [reader] = [module for module, (dim, _) in site.members.items() if dim == 1]
    nonzero = {f"{reader}.weight": encoder.get_submodule(reader).weight.detach() != 0}
    keep = sum_by_part(nonzero, Site(site.parts, {reader: site.members[reader]})) > 0
    keep[0] |= not keep.any()  # one has to stay: attention splits its rows by head
    return keep


def save_compact(
    model: PreTrainedModel | str | Path, folder: str | Path, dtype: torch.dtype | None = None
) -> dict[str, tuple[int, int]]:
    """Writes a compact copy of `model` into the new folder `folder`, whole or not at all; see `compact`.

    Plain transformers reads it if all heads are there and every layer has as many neurons. Otherwise `import hf_disparse`
    first; then `from_pretrained` of the model's class and of the Auto classes reads it.

    Args:
        model: a transformers model, or the folder or Hub id of one.
        dtype: of the floating point weights; default: unchanged.

    Returns:
        kind of part -> (number before, number after).

    Raises:
        UserError: as `compact`; also if `folder` is not new or the model does not load.
    """
    with new_folder(folder) as target:
        given, source = open_model(model)
        model = given if source else undo_speed_up(copy.deepcopy(given))
        if source:
            copy_companions(source, target)
        counts = compact(model)
        if dtype:
            model.to(dtype)
        model.save_pretrained(target, max_shard_size="1TB")
        describe(target, dtype)
    return counts


def count_parts(encoder: nn.Module) -> dict[str, int]:
    """kind -> number of parts in the encoder."""
    counts = {kind: sum(site.parts for site in sites.values()) for kind, sites in find_sites(encoder).items()}
    return counts | {"layer": len(encoder_layers(encoder))}


def remaining_heads(model: PreTrainedModel) -> dict[str, list[int]]:
    """attention module -> the original indices of its remaining heads, if the model has been compacted before."""
    return dict(structure_of(model).get("heads", {}))


def drop_layers(model: MultitaskModel, cuts: Cuts, heads: dict[str, list[int]]) -> None:
    """Removes the skipped layers; renames the keys of `heads` to the new layer numbers."""
    if not model.config.skipped_layers:
        return
    layout = layout_of(model.encoder)
    encoder, gone = model.encoder, set(model.config.skipped_layers)
    if 0 in gone and first_stays(encoder):
        raise UserError(
            f"skipped_layers: the first layer of {type(encoder).__name__} differs from the others and cannot be removed"
        )
    model.skip_layers([])
    layers = encoder.get_submodule(layout.layers)
    stay = [i for i in range(len(layers)) if i not in gone]
    cuts.forget(p for i in gone for p in layers[i].parameters())
    parent, _, last = layout.layers.rpartition(".")
    setattr(encoder.get_submodule(parent), last, nn.ModuleList([layers[i] for i in stay]))
    for new, layer in enumerate(encoder.get_submodule(layout.layers)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = new
    encoder.config.num_hidden_layers = len(stay)
    if getattr(encoder.config, "layer_types", None):
        encoder.config.layer_types = [encoder.config.layer_types[i] for i in stay]
    places = {f"{layout.layers}.{old}.": f"{layout.layers}.{new}." for new, old in enumerate(stay)}
    moved = [(old, new, name) for name in heads for old, new in places.items() if name.startswith(old)]
    renamed = {name.replace(old, new, 1): heads[name] for old, new, name in moved}
    heads.clear()
    heads.update(renamed)


def _record_shape(model: PreTrainedModel, layout: Layout, heads: dict[str, list[int]]) -> None:
    """Writes the new shape into the architecture's own configuration where it can express it, else into `structure`."""
    encoder = model.base_model
    sites, neurons = find_sites(encoder)["neuron"], {}
    widths = {site.parts for site in sites.values()}
    if len(widths) == 1:
        setattr(encoder.config, layout.neurons_key, widths.pop())
    else:
        full = getattr(encoder.config, layout.neurons_key)
        neurons = {name: site.parts for name, site in sites.items() if site.parts != full}
    ranks = {name: module.rank for name, module in low_rank_modules(encoder).items()}
    set_structure(model, {"heads": heads, "neurons": neurons, "ranks": ranks})
