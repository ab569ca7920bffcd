"""Student steps in the style of the published sampler, the baseline `naive`: one file a family, by its name.

Eager float32; noise-or-data projections at every position and layer, modulation computed from the class
embedding in every layer, both heads everywhere, a nearest-code search over all positions. A file has

    step_of(recipe, student) -> Step        # of a student as it was loaded, not tabulated
    literal_step(...)                       # the formulas, which the tests compare with the modules
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


def naive_step(recipe: Recipe, student: Any) -> Step:
    """The naive step of a student that is not tabulated. Raises DDError if its family has none."""
    step: Step = load_plugin(__name__, recipe.family, kind="naive sampler").step_of(recipe, student)
    return step
