"""Where heads, neurons and layers are in transformers' encoders.

Encoders are recognised by the names of the modules in a layer, not by their type, so that relatives of BERT (XLM-RoBERTa,
CamemBERT, ...) need no entry of their own.
"""

from dataclasses import dataclass

import torch
from torch import nn

from hf_disparse.config import UserError
from hf_disparse.fast.families import head_size
from hf_disparse.model.low_rank import LowRankLinear, low_rank_modules, rank_sites
from hf_disparse.pruning.parts import Site


@dataclass(frozen=True)
class Layout:
    """Names of the modules of a layer, relative to the layer."""

    layers: str  # the ModuleList, relative to the encoder
    attention: str  # the module that splits its input into heads
    by_head: tuple[str, ...]  # Linear modules with rows by head
    merge: str  # the one with columns by head
    up: str  # rows by neuron
    down: str  # columns by neuron
    if_there: tuple[str, ...] = ()  # further modules with rows by head that only some configurations have
    neurons_key: str = "intermediate_size"  # in the configuration
    first_stays: bool = False  # the first layer differs from the others
    bias_by_head: bool = False  # attention adds a bias (1, heads, tokens, tokens) that is computed outside of it


_SELF = ("attention.self.query", "attention.self.key", "attention.self.value")
_PROJ = tuple(f"attention.self.{name}_proj" for name in ("query", "key", "value"))
LAYOUTS = (
    Layout("encoder.layer", "attention.self", _SELF, "attention.output.dense", "intermediate.dense", "output.dense"),
    Layout(
        "encoder.layer",
        "attention.self",
        _PROJ,
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
        if_there=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
    ),  # DeBERTa-v2
    Layout(
        "encoder.layer",
        "attention.attn",
        ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        "attention.attn.o",
        "intermediate.dense",
        "output.dense",
        bias_by_head=True,
    ),  # MPNet
    Layout(
        "transformer.layer",
        "attention",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
        neurons_key="hidden_dim",
    ),  # DistilBERT
    Layout("layers", "attn", ("attn.Wqkv",), "attn.Wo", "mlp.Wi", "mlp.Wo", first_stays=True),  # ModernBERT
)


def layout_of(encoder: nn.Module, key: str = "pruning.granularity") -> Layout:
    """Returns the encoder's layout; an error names the setting `key` that needs it.

    Raises:
        UserError: the layout is none of the known ones.
    """
    for layout in LAYOUTS:
        try:
            first = encoder.get_submodule(layout.layers)[0]
            for name in (layout.attention, *layout.by_head, layout.merge, layout.up, layout.down):
                first.get_submodule(name)
        except (AttributeError, TypeError, IndexError):
            continue
        if _holds_no_more(encoder, first, layout):
            return layout
    known = "BERT, RoBERTa, ELECTRA, DistilBERT, MPNet, DeBERTa-v2 and ModernBERT"
    raise UserError(
        f"{key}: expected an encoder with the layers of {known} or a relative, got {type(encoder).__name__}"
    )


def encoder_layers(encoder: nn.Module, key: str = "pruning.granularity") -> nn.ModuleList:
    """The encoder's layers, in order; an error names the setting `key` that needs them."""
    return encoder.get_submodule(layout_of(encoder, key).layers)


def _holds_no_more(encoder: nn.Module, layer: nn.Module, layout: Layout) -> bool:
    """Whether a layer has no weights beyond the layout's: those of Longformer, ConvBERT, LUKE and MobileBERT do."""
    known = {*layout.by_head, layout.merge, *layout.if_there, layout.up, layout.down}
    weighty = {
        name for name, module in layer.named_modules() if next(module.parameters(recurse=False), None) is not None
    }
    factorised = low_rank_modules(layer)
    weighty = {name.rpartition(".")[0] if name.rpartition(".")[0] in factorised else name for name in weighty}
    norms = {name for name in weighty if "norm" in name.lower()}
    return weighty - norms <= known and getattr(encoder.config, "attention_type", None) != "block_sparse"


def first_stays(encoder: nn.Module) -> bool:
    """Whether the first layer cannot be dropped, because it differs from the others or a convolution follows it."""
    return layout_of(encoder).first_stays or getattr(getattr(encoder, "encoder", None), "conv", None) is not None


def find_sites(encoder: nn.Module, prefix: str = "") -> dict[str, dict[str, Site]]:
    """Returns kind of part -> name of the site -> site: heads and neurons by layer, the layers, and ranks if there are any.

    Parts are counted in the current weights, so that a compact encoder has fewer.

    Args:
        prefix: put before the names of modules, such as `encoder.` in a `MultitaskModel`.
    """
    layout = layout_of(encoder)
    layers, protected = encoder.get_submodule(layout.layers), int(first_stays(encoder))
    width = head_size(encoder.config)
    sites: dict[str, dict[str, Site]] = {"head": {}, "neuron": {}}
    linears = {}
    for i, layer in enumerate(layers):
        name = f"{prefix}{layout.layers}.{i}"
        columns = layer.get_submodule(layout.merge).in_features
        by_column = torch.arange(columns) // width
        by_head = [n for n in (*layout.by_head, *layout.if_there) if _has(layer, n)]
        members = {
            _member(layer, name, n, 0): (0, by_column.repeat(layer.get_submodule(n).out_features // columns))
            for n in by_head
        }
        members[_member(layer, name, layout.merge, 1)] = (1, by_column)
        sites["head"][f"{name}.{layout.attention}"] = Site(columns // width, members)
        neurons = layer.get_submodule(layout.down).in_features
        by_row = torch.arange(neurons).repeat(
            layer.get_submodule(layout.up).out_features // max(neurons, 1)
        )  # gated: twice
        members = {
            _member(layer, name, layout.up, 0): (0, by_row),
            _member(layer, name, layout.down, 1): (1, torch.arange(neurons)),
        }
        sites["neuron"][f"{name}.{layout.up}"] = Site(neurons, members)
        if i or not protected:
            for n, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    linears[f"{name}.{n}"] = (0, torch.full((module.out_features,), i - protected))
    sites["layer"] = {f"{prefix}{layout.layers}": Site(len(layers) - protected, linears)}
    ranks = rank_sites(encoder, prefix)
    return sites | {"rank": ranks} if ranks else sites


def _member(layer: nn.Module, prefix: str, name: str, dim: int) -> str:
    """Name of the module whose weight holds the outputs (dim 0) or inputs (dim 1) of a layer's module `name`."""
    factor = (".up", ".down")[dim] if isinstance(layer.get_submodule(name), LowRankLinear) else ""
    return f"{prefix}.{name}{factor}"


def _has(module: nn.Module, name: str) -> bool:
    try:
        return module.get_submodule(name) is not None
    except AttributeError:
        return False
