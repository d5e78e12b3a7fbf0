"""Encoders whose layers differ in shape: fewer heads, fewer neurons, matrices in two factors.

An architecture's configuration cannot describe such an encoder, so config.json also holds its *structure*: {"heads":
{attention: [indices of the remaining heads]}, "neurons": {module: number}, "ranks": {module in two factors: rank}}, with
names relative to the encoder. It stands under `quantization_config`, transformers' key for weights that are stored in another
form than they are used in, because transformers looks nowhere else before it loads weights. `hf_disparse.export` writes and
reads it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_disparse.config import UserError
from hf_disparse.model.architectures import Layout, find_sites, layout_of
from hf_disparse.model.low_rank import low_rank_like
from hf_disparse.pruning.parts import Site

Structure = dict[str, Any]
METHOD, FORM_VERSION = "hf_disparse", 1


def rebuild(encoder: nn.Module, structure: Structure) -> None:
    """Gives an encoder freshly made from its configuration the shape that `structure` describes.

    Raises:
        UserError: the structure does not fit; checked before memory is allocated.
    """
    known = {"heads", "neurons", "ranks"}
    _require(isinstance(structure, dict) and set(structure) <= known, "heads, neurons and ranks", structure)
    _factorise(encoder, structure.get("ranks", {}))
    layout, sites = layout_of(encoder), find_sites(encoder)
    for kind, key in (("head", "heads"), ("neuron", "neurons")):
        entries = structure.get(key, {})
        _require(isinstance(entries, dict), f"a mapping of modules to {key}", entries)
        for name, value in entries.items():
            site = sites[kind].get(name)
            _require(site is not None, f"the module of a layer of {type(encoder).__name__}", name)
            remaining = range(value) if type(value) is int and 0 < value <= site.parts else value
            _require(_are_parts(remaining, site.parts), f"{key} among {site.parts} for {name}", value)
            keep = torch.zeros(site.parts, dtype=torch.bool)
            keep[list(remaining)] = True
            keep_parts(encoder, layout, kind, name, site, keep, Cuts(None))


def _are_parts(indices: Any, parts: int) -> bool:
    """Whether these are ascending indices of at least one of so many parts."""
    if not isinstance(indices, (list, range)) or not 0 < len(indices) <= parts:
        return False
    return all(type(i) is int and 0 <= i < parts for i in indices) and sorted(set(indices)) == list(indices)


def _factorise(encoder: nn.Module, ranks: Any) -> None:
    """Replaces Linear modules by factors of these ranks, once all are checked: takes at most twice the memory."""
    _require(isinstance(ranks, dict), "a mapping of modules to ranks", ranks)
    modules = dict(encoder.named_modules())
    for name, rank in ranks.items():
        linear = modules.get(name)
        _require(name and isinstance(linear, nn.Linear), f"a Linear module of {type(encoder).__name__}", name)
        most = min(linear.weight.shape)
        _require(type(rank) is int and 0 < rank <= most, f"a rank in 1..{most} for {name}", rank)
    for name, rank in ranks.items():
        encoder.set_submodule(name, low_rank_like(modules[name], rank))


def keep_parts(
    encoder: nn.Module, layout: Layout, kind: str, name: str, site: Site, keep: Tensor, cuts: "Cuts"
) -> None:
    """Cuts one site down to the parts in `keep`, (parts,) bool; an attention `name` gets its new number of heads."""
    for member, (dim, owner) in site.members.items():
        module = encoder.get_submodule(member)
        lines = keep.cpu()[owner].nonzero().squeeze(1)
        cuts.cut(module.weight, dim, lines)
        if dim == 0 and module.bias is not None:
            cuts.cut(module.bias, 0, lines)
        module.out_features, module.in_features = module.weight.shape
    if kind == "head":
        attention, heads = encoder.get_submodule(name), int(keep.sum())
        for key in ("num_attention_heads", "n_heads"):
            if hasattr(attention, key):
                setattr(attention, key, heads)
        if hasattr(attention, "all_head_size"):
            attention.all_head_size = heads * attention.attention_head_size
        if layout.bias_by_head:
            attention.register_forward_pre_hook(_BiasOf(keep), with_kwargs=True)


class _BiasOf:
    """Forward pre-hook that selects the bias of the remaining heads from a bias made for all original heads."""

    fast_path = "heads"  # a sped-up encoder selects by `places`, too

    def __init__(self, keep: Tensor):
        self.places = keep.cpu().nonzero().squeeze(1)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        args = list(args)
        if len(args) > 2 and args[2] is not None:
            args[2] = args[2][:, self.places.to(args[2].device)]
        elif kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"][:, self.places.to(kwargs["position_bias"].device)]
        return tuple(args), kwargs


class Cuts:
    """Cuts parameters in place, so that the optimizer keeps them, together with the optimizer's state."""

    def __init__(self, optimizer: Optimizer | None):
        self.optimizer = optimizer

    def cut(self, parameter: nn.Parameter, dim: int, lines: Tensor) -> None:
        """Keeps these rows (dim 0) or columns (dim 1) of a parameter and of its optimizer state."""
        lines, shape = lines.to(parameter.device), parameter.shape
        state = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape:
                state[key] = value.index_select(dim, lines.to(value.device))
            elif isinstance(value, Tensor) and value.numel() > 1:
                got = f"{type(self.optimizer).__name__} with '{key}' {tuple(value.shape)} for {tuple(shape)}"
                raise UserError(
                    f"compact: expected an optimizer that holds a number per weight, as AdamW does, got {got}"
                )
        if parameter.grad is not None:
            parameter.grad = None  # has the old shape; call compact between two steps
        parameter.data = parameter.data.index_select(dim, lines)

    def forget(self, gone: Iterator[nn.Parameter]) -> None:
        """Removes parameters from the optimizer."""
        gone = {id(p) for p in gone}
        for group in self.optimizer.param_groups if self.optimizer else ():
            for p in group["params"]:
                if id(p) in gone:
                    self.optimizer.state.pop(p, None)
            group["params"] = [p for p in group["params"] if id(p) not in gone]


def _require(condition: bool, expected: str, got: Any) -> None:
    if not condition:
        raise UserError(f"config.json: quantization_config.structure: expected {expected}, got {str(got)[:100]!r}")


@register_quantization_config(METHOD)
class StoredForm(QuantizationConfigMixin):
    """How the weights of a checkpoint are stored: the `quantization_config` of its config.json.

    Args:
        packed: whether matrices are stored as their non-zeros and a bitmask.
        structure: the shape of a compact or factorised encoder, see the top of this file.
        sha256: file -> digest of the exported weights and configuration.
    """

    def __init__(
        self,
        quant_method: str = METHOD,
        version: int = FORM_VERSION,
        packed: bool = False,
        structure: dict | None = None,
        sha256: dict | None = None,
        **newer: Any,
    ):
        if version != FORM_VERSION or newer:
            raise UserError(
                f"config.json: expected format version {FORM_VERSION} of hf_disparse, got {str(version)[:40]} with "
                f"{', '.join(newer)[:100] or 'no further fields'}; a newer hf_disparse reads it"
            )
        self.quant_method = METHOD
        self.version, self.packed, self.structure, self.sha256 = version, packed, structure, sha256
        self.dequantize = True  # what is loaded is an ordinary model

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not at their defaults."""
        return {key: value for key, value in super().to_dict().items() if value and key != "dequantize"}


def structure_of(model: Any) -> dict[str, Any]:
    """The structure in a model's configuration; empty if its architecture describes it fully."""
    form = getattr(model.config, "quantization_config", None)
    return dict(form.structure) if isinstance(form, StoredForm) and form.structure else {}


def set_structure(model: Any, structure: dict[str, Any]) -> None:
    """Writes a structure into a model's configuration, without its empty entries."""
    structure = {key: entries for key, entries in structure.items() if entries}
    if structure:
        model.config.quantization_config = StoredForm(structure=structure)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
