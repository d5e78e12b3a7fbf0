"""Compaction: pruned heads, neurons and layers leave the model for good, and it gets faster. Layer 7.

A part is gone when nothing reads it: a head or a neuron whose columns of the following matrix are all zero. What the
configuration of the architecture cannot say (fewer heads, neurons that differ by layer) goes into `structure`, which
`hf_disparse.export.loading` builds again before it loads.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from hf_disparse.architectures import Layout, find_sites, layout_of
from hf_disparse.config import UserError, one_line
from hf_disparse.export.folder import CONFIG_NAME, copy_companions, describe, model_folder, new_folder, read_json
from hf_disparse.export.form import StoredForm
from hf_disparse.model import MultitaskModel
from hf_disparse.parts import Site, sum_by_part

Structure = dict[
    str, Any
]  # {"heads": {attention: [places before]}, "neurons": {module: number}}, names within the encoder


def compact(model: PreTrainedModel, optimizer: Optimizer | None = None) -> dict[str, tuple[int, int]]:
    """Takes pruned heads, neurons and skipped layers out of `model`, in place; its outputs stay the same within rounding.

    Args:
        optimizer: whose state goes along, so that training goes on as it would have. Masks do not: make new ones by
            `find_masks`.

    Returns:
        kind of part -> (number before, number now).

    Raises:
        UserError: an encoder whose layers are not known.
    """
    encoder, before = model.base_model, count_parts(model.base_model)
    layout = layout_of(encoder)
    cuts = _Cuts(optimizer)
    structure = structure_of(model)
    if isinstance(model, MultitaskModel) and model.config.skipped_layers:
        _drop_layers(model, layout, cuts, structure)
    for kind, places in find_sites(encoder).items():
        for name, site in places.items() if kind != "layer" else ():
            [(reader, _)] = [(module, dim) for module, (dim, _) in site.members.items() if dim == 1]
            weights = {f"{reader}.weight": encoder.get_submodule(reader).weight.detach() != 0}
            keep = sum_by_part(weights, Site(site.parts, {reader: site.members[reader]})) > 0
            keep[0] |= not keep.any()  # attention splits its rows by head: there has to be one
            if not keep.all():
                shrink(encoder, layout, kind, name, site, keep, cuts)
                _note(structure, kind, name, keep)
    _settle(model, layout, structure)
    now = count_parts(encoder)
    return {kind: (before[kind], now[kind]) for kind in before}


def save_compact(
    model: PreTrainedModel | str | Path, folder: str | Path, dtype: torch.dtype | None = None
) -> dict[str, tuple[int, int]]:
    """Writes a compact copy of `model` into the new folder `folder`, whole or not at all; see `compact`.

    Where plain transformers can read it (neurons as many in each layer, all heads there), nothing else is needed; otherwise
    `import hf_disparse` first, and then the `from_pretrained` of the model's class or of the Auto classes.

    Args:
        model: a transformers model, or the folder or Hub id of one.
        dtype: of the floating point weights; default: as they are.

    Returns:
        kind of part -> (number before, number now).
    """
    with new_folder(folder) as target:
        if isinstance(model, PreTrainedModel):
            model = copy.deepcopy(model)
        else:
            source = model_folder(model)
            model = load(source)
            copy_companions(source, target)
        counts = compact(model)
        model.to(dtype or model.dtype).save_pretrained(target, max_shard_size="1TB")
        describe(target, dtype)
    return counts


def load(folder: Path) -> PreTrainedModel:
    """The model of a folder, as the class that saved it."""
    names = read_json(folder / CONFIG_NAME).get("architectures") or []
    cls = MultitaskModel if names == ["MultitaskModel"] else getattr(transformers, str(*names[:1]), None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise UserError(f"{folder}: expected a model of transformers' or a MultitaskModel, got architectures {names}")
    try:
        return cls.from_pretrained(folder)
    except UserError:
        raise
    except Exception as error:  # transformers and safetensors raise a dozen kinds
        raise UserError(f"{folder}: expected a model that loads, got {one_line(error)}") from error


def count_parts(encoder: nn.Module) -> dict[str, int]:
    """kind -> number of parts that are there."""
    counts = {kind: sum(site.parts for site in places.values()) for kind, places in find_sites(encoder).items()}
    return counts | {"layer": len(encoder.get_submodule(layout_of(encoder).layers))}


def structure_of(model: PreTrainedModel) -> Structure:
    """What of the model's shape its architecture's configuration does not say."""
    form = getattr(model.config, "quantization_config", None)
    held = form.structure if isinstance(form, StoredForm) and form.structure else {}
    return {kind: dict(held.get(kind, {})) for kind in ("heads", "neurons")}


def rebuild(encoder: nn.Module, structure: Structure) -> None:
    """Gives an encoder that was just made from its configuration the shape that `structure` has.

    Raises:
        UserError: a structure that does not fit, before any memory is taken.
    """
    layout, sites = layout_of(encoder), find_sites(encoder)
    _require(isinstance(structure, dict) and set(structure) <= {"heads", "neurons"}, structure, "heads and neurons")
    for kind, key in (("head", "heads"), ("neuron", "neurons")):
        entries = structure.get(key, {})
        _require(isinstance(entries, dict), entries, f"a mapping of modules to {key}")
        for name, value in entries.items():
            site = sites[kind].get(name)
            _require(site is not None, name, f"the module of a layer of {type(encoder).__name__}")
            places = range(value) if type(value) is int and 0 < value <= site.parts else value
            good = isinstance(places, (list, range)) and 0 < len(places) <= site.parts
            good = good and all(type(i) is int and 0 <= i < site.parts for i in places)
            _require(good and sorted(set(places)) == list(places), value, f"{key} among {site.parts} for {name}")
            keep = torch.zeros(site.parts, dtype=torch.bool)
            keep[list(places)] = True
            shrink(encoder, layout, kind, name, site, keep, _Cuts(None))


def shrink(encoder: nn.Module, layout: Layout, kind: str, name: str, site: Site, keep: Tensor, cuts: "_Cuts") -> None:
    """Leaves the parts of one site that `keep`, (parts,) bool, says; the attention `name` is told of its heads."""
    for member, (dim, owner) in site.members.items():
        module = encoder.get_submodule(member)
        lines = keep.cpu()[owner].nonzero().squeeze(1)
        cuts.cut(module.weight, dim, lines)
        if dim == 0 and module.bias is not None:
            cuts.cut(module.bias, 0, lines)
        module.out_features, module.in_features = module.weight.shape
    if kind == "head":
        attention, heads = encoder.get_submodule(name), int(keep.sum())
        for key, value in (("num_attention_heads", heads), ("n_heads", heads), ("all_head_size", None)):
            if hasattr(attention, key):
                setattr(attention, key, heads * attention.attention_head_size if value is None else value)
        if layout.bias_by_head:
            attention.register_forward_pre_hook(_BiasOf(keep), with_kwargs=True)


class _BiasOf:
    """Forward pre-hook of an attention that takes a bias for all heads that there once were."""

    def __init__(self, keep: Tensor):
        self.places = keep.cpu().nonzero().squeeze(1)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        args = list(args)
        if len(args) > 2 and args[2] is not None:
            args[2] = args[2][:, self.places.to(args[2].device)]
        elif kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"][:, self.places.to(kwargs["position_bias"].device)]
        return tuple(args), kwargs


class _Cuts:
    """Cuts parameters in place, so that they stay the optimizer's, and the optimizer's state with them."""

    def __init__(self, optimizer: Optimizer | None):
        self.optimizer = optimizer

    def cut(self, parameter: nn.Parameter, dim: int, lines: Tensor) -> None:
        """Keeps these rows (dim 0) or columns (dim 1) of a parameter and of all that is held for it."""
        lines, shape = lines.to(parameter.device), parameter.shape
        state = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape:
                state[key] = value.index_select(dim, lines.to(value.device))
        if parameter.grad is not None:
            parameter.grad = None  # of the old shape; compact between two steps
        parameter.data = parameter.data.index_select(dim, lines)

    def forget(self, gone: Iterator[nn.Parameter]) -> None:
        """Takes parameters out of the optimizer."""
        gone = {id(p) for p in gone}
        for group in self.optimizer.param_groups if self.optimizer else ():
            for p in group["params"]:
                if id(p) in gone:
                    self.optimizer.state.pop(p, None)
            group["params"] = [p for p in group["params"] if id(p) not in gone]


def _drop_layers(model: MultitaskModel, layout: Layout, cuts: _Cuts, structure: Structure) -> None:
    encoder, gone = model.encoder, set(model.config.skipped_layers)
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
    for kind, entries in structure.items():
        moved = ((old, new, name) for name in entries for old, new in places.items() if name.startswith(old))
        structure[kind] = {name.replace(old, new, 1): entries[name] for old, new, name in moved}


def _note(structure: Structure, kind: str, name: str, keep: Tensor) -> None:
    if kind == "head":
        before = structure["heads"].get(name, range(len(keep)))
        structure["heads"][name] = [place for place, stays in zip(before, keep.tolist(), strict=True) if stays]
    else:
        structure["neurons"][name] = int(keep.sum())


def _settle(model: PreTrainedModel, layout: Layout, structure: Structure) -> None:
    """Says as much as it can in the architecture's own configuration, and the rest in `structure`."""
    encoder = model.base_model
    places = find_sites(encoder)["neuron"]
    widths = {site.parts for site in places.values()}
    if len(widths) == 1:
        setattr(encoder.config, layout.neurons_key, widths.pop())
        structure["neurons"] = {}
    else:
        full = getattr(encoder.config, layout.neurons_key)
        structure["neurons"] = {name: site.parts for name, site in places.items() if site.parts != full}
    structure = {kind: entries for kind, entries in structure.items() if entries}
    if structure:
        model.config.quantization_config = StoredForm(structure=structure)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _require(condition: bool, got: Any, expected: str) -> None:
    if not condition:
        raise UserError(f"config.json: quantization_config.structure: expected {expected}, got {str(got)[:100]!r}")
