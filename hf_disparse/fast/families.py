"""Which modules of an encoder do what, by transformers' names: what the fused path knows of an architecture."""

from dataclasses import dataclass

from torch import nn
from transformers.activations import ACT2FN


@dataclass(frozen=True)
class Family:
    """Names of modules, relative to a layer unless said otherwise."""

    layers: str  # the ModuleList, relative to the encoder
    project: tuple[str, ...]  # query, key, value, or one module with all three
    merge: str
    up: str
    down: str
    before: str  # the norm by attention
    after: str  # the norm by the feed-forward network
    activation: str  # a module or function
    tables: tuple[str, ...]  # the embeddings, relative to the encoder, in the order in which they are added
    embedding_norm: str
    positions: str | None = "count"  # "count": as they stand; "skip padding": RoBERTa's; None: no table of positions
    norm_first: bool = False


_BERT = Family(
    layers="encoder.layer",
    project=("attention.self.query", "attention.self.key", "attention.self.value"),
    merge="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
    before="attention.output.LayerNorm",
    after="output.LayerNorm",
    activation="intermediate.intermediate_act_fn",
    tables=("word_embeddings", "token_type_embeddings", "position_embeddings"),
    embedding_norm="embeddings.LayerNorm",
)
_ROBERTA = Family(**{**_BERT.__dict__, "positions": "skip padding"})
# By `config.model_type`. Relatives with other names are not here, because some of them compute something else.
FAMILIES = {
    "bert": _BERT,
    "electra": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": Family(
        layers="transformer.layer",
        project=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        merge="attention.out_lin",
        up="ffn.lin1",
        down="ffn.lin2",
        before="sa_layer_norm",
        after="output_layer_norm",
        activation="ffn.activation",
        tables=("word_embeddings", "position_embeddings"),
        embedding_norm="embeddings.LayerNorm",
    ),
    "mpnet": Family(
        layers="encoder.layer",
        project=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
        merge="attention.attn.o",
        up="intermediate.dense",
        down="output.dense",
        before="attention.LayerNorm",
        after="output.LayerNorm",
        activation="intermediate.intermediate_act_fn",
        tables=("word_embeddings", "position_embeddings"),
        embedding_norm="embeddings.LayerNorm",
        positions="skip padding",
    ),
    "modernbert": Family(
        layers="layers",
        project=("attn.Wqkv",),
        merge="attn.Wo",
        up="mlp.Wi",
        down="mlp.Wo",
        before="attn_norm",
        after="mlp_norm",
        activation="mlp.act",
        tables=("tok_embeddings",),
        embedding_norm="embeddings.norm",
        positions=None,
        norm_first=True,
    ),
}
# Names of activations in configurations -> the number in encoder.h.
ACTIVATIONS = {
    "gelu": 0,
    "gelu_python": 0,
    "gelu_new": 1,
    "gelu_fast": 1,
    "gelu_pytorch_tanh": 1,
    "gelu_accurate": 1,
    "relu": 2,
    "silu": 3,
    "swish": 3,
}


def family_of(encoder: nn.Module) -> Family | None:
    """The encoder's family, or None if the fused path does not know it."""
    config = encoder.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return None
    return FAMILIES.get(config.model_type)


def activation_of(encoder: nn.Module) -> int | None:
    """The number of the encoder's activation in encoder.h, or None if there is none."""
    return ACTIVATIONS.get(_activation_name(encoder))


def activation_module(encoder: nn.Module) -> nn.Module:
    """The activation that transformers makes for the encoder's configuration, one of `ACTIVATIONS`."""
    return ACT2FN[_activation_name(encoder)]


def _activation_name(encoder: nn.Module) -> str:
    names = (getattr(encoder.config, key, None) for key in ("hidden_act", "activation", "hidden_activation"))
    return next((name for name in names if isinstance(name, str)), "")
