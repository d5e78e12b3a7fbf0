"""A run that keeps its tasks' scores."""

from hf_disparse import DisparseTrainer, PruningConfig
from tests.helpers.tiny import three_datasets, tiny_model, tiny_tokenizer
from tests.trainer.test_trainer import arguments, multitask_trainer

ONCE = PruningConfig(sparsity=0.7, score_batches=3, keep_scores=True)


def run(folder, config=ONCE, tasks=None, **changes) -> DisparseTrainer:
    """A trainer that has pruned and saved its model to `folder`."""
    if not tasks:
        trainer = multitask_trainer(folder, config, **changes)
    else:
        trainer = DisparseTrainer(
            tiny_model(),
            arguments(folder, **changes),
            pruning_config=config,
            train_dataset={task: rows for task, rows in three_datasets().items() if task in tasks},
            processing_class=tiny_tokenizer(),
        )
    trainer.train()
    trainer.save_model()
    return trainer


def pruned(masks) -> int:
    return sum(int((~keep).sum()) for keep in masks.values())
