"""Whom a phase of a recipe's run learns from. Layer 10."""

from collections.abc import Callable

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_disparse.config import UserError, one_line
from hf_disparse.model.loading import load_pretrained
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.recipes.recipe import Recipe
from hf_disparse.tasks import resolve
from hf_disparse.trainer import DisparseTrainer


def teachers_of(
    recipe: Recipe, phase: str, tokenizer: PreTrainedTokenizerBase, dense: Callable[[], MultitaskModel] | None
) -> dict[str, MultitaskModel] | None:
    """Task -> who teaches it, if there is something to learn: the recipe's teacher, or else what `dense` loads."""
    if not getattr(recipe, phase).distils:
        return None
    models, teachers = {}, {}
    for task, name in recipe.teachers.items():
        source = resolve(name)
        if source not in models:
            where = f"teachers.{task}"
            models[source] = load_pretrained(where, MultitaskModel, source)
            theirs = load_pretrained(where, AutoTokenizer, source)
            if theirs.get_vocab() != tokenizer.get_vocab():
                raise UserError(f"{where}: expected a teacher with the encoder's vocabulary, got another one in {name}")
        teachers[task] = models[source]
    others = [task for task in recipe.tasks if task not in teachers]
    return {**(dict.fromkeys(others, dense()) if others and dense else {}), **teachers}


def try_teachers(trainer: DisparseTrainer) -> None:
    """Asks each teacher once, so that one which does not fit the model is refused before the dense phase, not after it."""
    for task, rows in trainer.train_dataset.items() if trainer.args.distils else ():
        longest = max(range(len(rows)), key=[len(ids) for ids in rows["input_ids"]].__getitem__)
        batch = trainer._prepare_inputs(trainer.data_collator([{**rows[longest], "task": task}]))
        try:
            with torch.no_grad():
                trainer.compute_loss(trainer.model.train(), batch)
        except (IndexError, RuntimeError) as error:
            raise UserError(
                f"teachers.{task}: expected a teacher that reads what the model reads, got one where {one_line(error)}"
            ) from error
