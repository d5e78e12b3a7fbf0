"""Every method on real tasks and a real encoder, to see that it trains; minutes."""

import pytest

from hf_disparse.compare.by_method import ByMethod, grid
from hf_disparse.config.rows import NAMES
from hf_disparse.recipes.recipe import parse_recipe
from tests.helpers.glue import glue_recipe, needs_glue
from tests.helpers.tiny import needs_demo


@pytest.mark.slow
@needs_demo
@needs_glue
def test_every_method_trains_on_glue(tmp_path):
    """Half of the weights, parts or numbers go in a few steps; what that costs is for docs/methods.md to say."""
    values = glue_recipe(tmp_path)
    for task in values["tasks"].values():
        task["max_validation_rows"] = 200
    recipe = parse_recipe({**values, "recovery": {"max_steps": 20}})
    left_out = ("dense", "joint", "sum", "max", "mean", "quorum2", "movement_joint", "platon_joint", "rigl")
    methods = [method for method in NAMES if method not in left_out]
    report = ByMethod(recipe, grid([*methods, "2:4", "block16x16"], ["snip"], [0.5], [1])).run()
    assert not report["failed"]
    found = {cell["method"]: cell for cell in report["cells"]}
    assert len(found) == len(methods) + 2
    for method, cell in found.items():
        assert cell["pruned"]["prunable"] == pytest.approx(0.5, abs=1e-3), method
        assert cell["backward_passes"] == pytest.approx(20 + 2 * 8, abs=2), method
    scores = {method: cell["metrics"]["average"] for method, cell in found.items()}
    for method in ("magnitude", "unanimous", "dynamic", "platon", "2:4", "parts"):
        assert scores[method] > scores["random"] + 5, scores
