"""Which modules of an encoder do what, by transformers' names: what the fused path knows of an architecture."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
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
_NUMBERS = {
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
_ACTIVATIONS = {type(ACT2FN[name]): number for name, number in _NUMBERS.items() if name in ACT2FN}


def family_of(encoder: nn.Module) -> Family | None:
    """The encoder's family, or None if the fused path does not know it."""
    config = encoder.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return None
    return FAMILIES.get(config.model_type)


def activation_of(module: Any) -> int | None:
    """The number of an activation in encoder.h, or None if C has no such function."""
    return _ACTIVATIONS.get(type(module))


def head_size(config: PreTrainedConfig) -> int:
    """Features of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def token_limit(config: PreTrainedConfig) -> int | None:
    """A safe maximum number of tokens: RoBERTa-style encoders reserve two positions. None if there is no limit."""
    positions = getattr(config, "max_position_embeddings", None) or 0
    return max(positions - 2, 1) if positions > 0 else None
