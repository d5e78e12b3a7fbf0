"""The dense model of another run, `dense_from`: trained once, pruned in many ways. Layer 10."""

import shutil
from pathlib import Path

from hf_disparse.config import UserError, require
from hf_disparse.distributed.processes import from_main
from hf_disparse.files import sync, writing
from hf_disparse.recipes.recipe import Recipe, read_recipe
from hf_disparse.recipes.yaml_text import differing
from hf_disparse.runs.folder import PHASE_NAME, RECIPE_NAME

_MAY_DIFFER = {"pruning", "recovery", "teachers", "seed", "output_dir", "dense_from"}


def expect_dense(recipe: Recipe, folder: Path) -> None:
    """Refuses a `dense_from` without the model that `folder` is to hold, unless it does already; writes nothing."""
    if recipe.dense_from:
        from_main(lambda: (folder / PHASE_NAME).is_file() or _find(recipe))


def take_dense(recipe: Recipe, folder: Path) -> None:
    """Copies the dense model that `dense_from` names to `folder`, whole or not at all, unless it is there already."""
    if recipe.dense_from:
        from_main(lambda: (folder / PHASE_NAME).is_file() or _copy(_find(recipe), folder))


def _find(recipe: Recipe) -> Path:
    """The folder of the dense model that `dense_from` names: of a run, or of a comparison's model with the recipe's seed.

    Raises:
        UserError: no run is there, its dense phase was another one, or it is not finished.
    """
    source = Path(recipe.dense_from).expanduser()
    if not (source / RECIPE_NAME).is_file():
        raise UserError(
            f"dense_from: expected the folder of a run or of a comparison, which holds {RECIPE_NAME}, got {source}"
        )
    theirs = read_recipe(source / RECIPE_NAME)
    taught = {"teachers"} if recipe.arguments("dense", recipe.output_dir).distils else set()
    may_differ = dict.fromkeys(_MAY_DIFFER - taught)
    others = differing({**theirs.values, **may_differ}, {**recipe.values, **may_differ})
    if theirs.chooses_best != recipe.chooses_best:  # its metrics are of other examples
        others.append("load_best_model_at_end")
    require(not others, "dense_from", f"a run that has the same {', '.join(others)}", str(source))
    names = [f"dense-seed{recipe.seed}", *(["dense"] if theirs.seed == recipe.seed else [])]
    for name in names:
        if (source / name / PHASE_NAME).is_file():
            return source / name
    seeds = [path.parent.name.removeprefix("dense-seed") for path in source.glob(f"dense-seed*/{PHASE_NAME}")]
    if (source / "dense" / PHASE_NAME).is_file():
        seeds.append(str(theirs.seed))
    got = f"seed {', '.join(sorted(seeds, key=lambda seed: (len(seed), seed)))}" if seeds else "none"
    raise UserError(f"dense_from: expected a finished dense model of seed {recipe.seed} in {source}, got {got}")


def _copy(source: Path, folder: Path) -> None:
    """Without its checkpoints."""
    part = folder.with_name(folder.name + ".part")
    with writing(folder):
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part, ignore=shutil.ignore_patterns("checkpoint-*"))
        sync(part)
        part.rename(folder)
