"""transformers' Trainer with several tasks and pruning."""

from hf_disparse.trainer.arguments import DisparseTrainingArguments
from hf_disparse.trainer.callback import PruningCallback
from hf_disparse.trainer.checkpoints import last_whole_checkpoint
from hf_disparse.trainer.trainer import DisparseTrainer

__all__ = ["DisparseTrainer", "DisparseTrainingArguments", "PruningCallback", "last_whole_checkpoint"]
