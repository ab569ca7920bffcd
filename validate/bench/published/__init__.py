"""Samplers written the way the published research code works: the baseline of `--against published`.

Eager float32, noise-or-data projections at every position and layer, modulation computed from the class
embedding in every layer, both heads everywhere, and a nearest-code search over all positions. A module is
found by the name of its family and has

    step_of(recipe, student) -> Step        # of a student as it was loaded, not tabulated
    literal_step(...)                       # the formulas, which the tests hold the student against
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from ddexport.runtime.registry import load_plugin

if TYPE_CHECKING:
    from torch import Tensor

    from ddexport.recipe import Recipe

# tokens [B, L, Cv], label [B], known -> sequence [B, L, Cv], and both heads everywhere: [B, L, V], [B, L, Cv]
Step: TypeAlias = "Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]"


def published_step(recipe: Recipe, student: Any) -> Step:
    """A student step as the published code of the recipe's family takes it. Raises DDError if there is none.

    recipe: of the bundle. student: loaded and connected, not tabulated; its weights are used as they are.
    """
    module = load_plugin("ddexport.validate.bench.published", recipe.family, kind="published sampler")
    step: Step = module.step_of(recipe, student)
    return step
