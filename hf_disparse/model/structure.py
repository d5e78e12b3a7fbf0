"""Encoders whose layers differ in shape: fewer heads, fewer neurons, matrices in two factors. Layer 2.

What the configuration of an architecture cannot say is a *structure*: {"heads": {attention: [places of those that stay]},
"neurons": {module: number}, "ranks": {module in two factors: rank}}, names within the encoder. `hf_disparse.export` writes
and reads it. It stands under `quantization_config` in config.json: that is transformers' word for weights that are stored in
another form than they are used in, and there is no other place where it looks before it loads.
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
from hf_disparse.model.low_rank import empty, replace
from hf_disparse.pruning.parts import Site

Structure = dict[str, Any]
METHOD, FORM_VERSION = "hf_disparse", 1


def rebuild(encoder: nn.Module, structure: Structure) -> None:
    """Gives an encoder that was just made from its configuration the shape that `structure` has.

    Raises:
        UserError: a structure that does not fit, before any memory is taken.
    """
    known = {"heads", "neurons", "ranks"}
    _require(isinstance(structure, dict) and set(structure) <= known, structure, "heads, neurons and ranks")
    _factorise(encoder, structure.get("ranks", {}))
    layout, sites = layout_of(encoder), find_sites(encoder)
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
            shrink(encoder, layout, kind, name, site, keep, Cuts(None))


def _factorise(encoder: nn.Module, ranks: Any) -> None:
    """Puts two factors of these ranks in place of Linear modules, once all of them fit: at most twice the numbers."""
    _require(isinstance(ranks, dict), ranks, "a mapping of modules to ranks")
    modules = dict(encoder.named_modules())
    for name, rank in ranks.items():
        linear = modules.get(name)
        _require(name and isinstance(linear, nn.Linear), name, f"a Linear module of {type(encoder).__name__}")
        most = min(linear.weight.shape)
        _require(type(rank) is int and 0 < rank <= most, rank, f"a rank in 1..{most} for {name}")
    for name, rank in ranks.items():
        replace(encoder, name, empty(modules[name], rank))


def shrink(encoder: nn.Module, layout: Layout, kind: str, name: str, site: Site, keep: Tensor, cuts: "Cuts") -> None:
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
        for key in ("num_attention_heads", "n_heads"):
            if hasattr(attention, key):
                setattr(attention, key, heads)
        if hasattr(attention, "all_head_size"):
            attention.all_head_size = heads * attention.attention_head_size
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


class Cuts:
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
            elif isinstance(value, Tensor) and value.numel() > 1:
                got = f"{type(self.optimizer).__name__} with '{key}' {tuple(value.shape)} for {tuple(shape)}"
                raise UserError(
                    f"compact: expected an optimizer that holds a number per weight, as AdamW does, got {got}"
                )
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


def _require(condition: bool, got: Any, expected: str) -> None:
    if not condition:
        raise UserError(f"config.json: quantization_config.structure: expected {expected}, got {str(got)[:100]!r}")


@register_quantization_config(METHOD)
class StoredForm(QuantizationConfigMixin):
    """The form of a checkpoint.

    Args:
        packed: matrices are stored as their non-zeros and a bitmask.
        structure: heads and neurons by layer, of a compact encoder, and ranks of matrices in two factors; see the
            head of this file.
        sha256: file -> digest, of the checkpoint's weights and configuration, as exported.
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
        """What is not at its default."""
        return {key: value for key, value in super().to_dict().items() if value and key != "dequantize"}


def structure_of(model: Any) -> dict[str, Any]:
    """What of a model's shape the configuration of its architecture does not say."""
    form = getattr(model.config, "quantization_config", None)
    return dict(form.structure) if isinstance(form, StoredForm) and form.structure else {}


def set_structure(model: Any, structure: dict[str, Any]) -> None:
    """Makes the configuration of a model say that; empty entries are left out."""
    structure = {key: entries for key, entries in structure.items() if entries}
    if structure:
        model.config.quantization_config = StoredForm(structure=structure)
    elif hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
