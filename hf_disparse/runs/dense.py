"""Copies the dense model of another run (`dense_from`), so that one dense training serves many prunings."""

import shutil
from pathlib import Path

from hf_disparse.config import UserError
from hf_disparse.distributed.processes import on_main
from hf_disparse.files import new_folder
from hf_disparse.recipes.recipe import Recipe, read_recipe
from hf_disparse.recipes.yaml_text import differing_settings
from hf_disparse.runs.folder import PHASE_NAME, RECIPE_NAME

_MAY_DIFFER = {"pruning", "recovery", "teachers", "seed", "output_dir", "dense_from"}


@on_main
def expect_dense(recipe: Recipe, folder: Path) -> None:
    """Raises UserError if `folder` has no dense model yet and `dense_from` does not provide it; writes nothing."""
    if recipe.dense_from and not (folder / PHASE_NAME).is_file():
        _find(recipe)


@on_main
def take_dense(recipe: Recipe, folder: Path) -> None:
    """Copies the dense model of `dense_from`, without its checkpoints, to `folder`, unless one is there already."""
    if not recipe.dense_from or (folder / PHASE_NAME).is_file():
        return
    source = _find(recipe)
    for leftover in folder.parent.glob(f".{folder.name}-*"):  # of a copy that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with new_folder(folder) as target:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("checkpoint-*"), dirs_exist_ok=True)


def _find(recipe: Recipe) -> Path:
    """Returns the folder of the dense model in `dense_from`: a run's, or a comparison's for the recipe's seed.

    Raises:
        UserError: `dense_from` holds no run, a run whose dense phase differs, or an unfinished one.
    """
    source = Path(recipe.dense_from).expanduser()
    if not (source / RECIPE_NAME).is_file():
        raise UserError(f"dense_from: expected the folder of a run or a comparison, but {source} has no {RECIPE_NAME}")
    theirs = read_recipe(source / RECIPE_NAME, of_run=True)
    taught = {"teachers"} if recipe.dense.distils else set()
    may_differ = dict.fromkeys(_MAY_DIFFER - taught)
    others = differing_settings({**theirs.values, **may_differ}, {**recipe.values, **may_differ})
    if theirs.chooses_best != recipe.chooses_best:  # it was evaluated on other examples
        others.append("load_best_model_at_end")
    if others:
        raise UserError(f"dense_from: expected a run that has the same {', '.join(others)}, got {str(source)!r}")
    names = [f"dense-seed{recipe.seed}", *(["dense"] if theirs.seed == recipe.seed else [])]
    for name in names:
        if (source / name / PHASE_NAME).is_file():
            return source / name
    seeds = [path.parent.name.removeprefix("dense-seed") for path in source.glob(f"dense-seed*/{PHASE_NAME}")]
    if (source / "dense" / PHASE_NAME).is_file():
        seeds.append(str(theirs.seed))
    got = f"seed {', '.join(sorted(seeds, key=lambda seed: (len(seed), seed)))}" if seeds else "none"
    raise UserError(f"dense_from: expected a finished dense model of seed {recipe.seed} in {source}, got {got}")
