"""Loads and tries the teachers that a phase of a run distils from."""

from collections.abc import Callable

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_disparse.config import UserError, one_line
from hf_disparse.files import resolve
from hf_disparse.model.loading import load_pretrained
from hf_disparse.model.multitask import MultitaskModel
from hf_disparse.recipes.recipe import Recipe
from hf_disparse.trainer import DisparseTrainer


def teachers_of(
    recipe: Recipe, phase: str, tokenizer: PreTrainedTokenizerBase, dense: Callable[[], MultitaskModel] | None
) -> dict[str, MultitaskModel] | None:
    """Returns task -> its teacher, the recipe's or else the model that `dense` loads; None if the phase does not distil."""
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
                raise UserError(f"{where}: the teacher {name} does not have the encoder's vocabulary")
        teachers[task] = models[source]
    others = [task for task in recipe.tasks if task not in teachers]
    return {**(dict.fromkeys(others, dense()) if others and dense else {}), **teachers}


def try_teachers(trainer: DisparseTrainer) -> None:
    """Runs each teacher once, so that one that does not fit the model is refused before the dense phase, not after it."""
    for task, rows in trainer.train_dataset.items() if trainer.args.distils else ():
        longest = max(range(len(rows)), key=[len(ids) for ids in rows["input_ids"]].__getitem__)
        batch = trainer._prepare_inputs(trainer.data_collator([{**rows[longest], "task": task}]))
        try:
            with torch.no_grad():
                trainer.compute_loss(trainer.model.train(), batch)
        except (IndexError, RuntimeError) as error:
            raise UserError(
                f"teachers.{task}: the teacher cannot read the model's inputs: {one_line(error)}"
            ) from error
