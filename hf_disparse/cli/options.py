"""From the text of options to what they describe."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_disparse.compare.by_method import ByMethod
    from hf_disparse.compare.equal_budget import EqualBudget


def experiment_of(recipe, protocol, methods, criteria, sparsities, seeds, budgets) -> "ByMethod | EqualBudget":
    """Returns the experiment that the options of `compare` describe."""
    from hf_disparse.compare.by_method import ByMethod, default_criterion, grid
    from hf_disparse.compare.equal_budget import EqualBudget
    from hf_disparse.config import UserError

    if not recipe.pruning.in_training:
        raise UserError(
            "pruning.speedup: compare needs a recipe that prunes to a sparsity, which all methods can reach; "
            "set pruning.sparsity instead"
        )
    points = numbers_or_names(str(recipe.pruning.sparsity) if sparsities is None else sparsities, "--sparsities", float)
    every_seed = numbers_or_names(seeds, "--seeds", int)
    if protocol == "equal-budget":
        for option, value in (("--methods", methods), ("--criteria", criteria)):
            if value is not None:
                raise UserError(
                    f"{option}: only applies to --protocol methods, as equal-budget prunes as the recipe does"
                )
        wanted = () if budgets is None else numbers_or_names(budgets, "--budgets", float)
        return EqualBudget(recipe, tuple(points), tuple(every_seed), tuple(wanted))
    if budgets is not None:
        raise UserError("--budgets: only applies to --protocol equal-budget")
    names = numbers_or_names("dense,random,magnitude,joint,unanimous" if methods is None else methods, "--methods", str)
    kinds = numbers_or_names(default_criterion(recipe.pruning) if criteria is None else criteria, "--criteria", str)
    return ByMethod(recipe, grid(names, kinds, points, every_seed))


def numbers_or_names(text: str, where: str, kind) -> list:
    """Returns the values between the commas."""
    from hf_disparse.config import UserError

    try:
        values = [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        values = []
    if not values:
        raise UserError(f"{where}: expected values separated by commas, got {text!r}")
    return values
