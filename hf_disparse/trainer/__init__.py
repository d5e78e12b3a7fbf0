"""Thin glue between the pure layers and transformers' Trainer. Layer 7."""

from hf_disparse.trainer.callback import PruningCallback
from hf_disparse.trainer.trainer import DisparseTrainer, DisparseTrainingArguments, last_whole_checkpoint

__all__ = ["DisparseTrainer", "DisparseTrainingArguments", "PruningCallback", "last_whole_checkpoint"]
