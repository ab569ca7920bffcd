"""Exact rewrites: the exported graphs compute what the modules compute, stated so that engines are faster at
it. Each can be left out, to measure what it gives (docs/graph.md).

The modules themselves state each form, in methods; here is which there are, and what they are called. Nothing
heavy is imported, so that a command line can list them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ddexport.precision.policy import FLOAT32
from ddexport.runtime.errors import DDError

if TYPE_CHECKING:
    from torch import nn

    from ddexport.families._vq_codec import Decoder


class RewriteError(DDError):
    """A rewrite that there is not."""


@dataclass(frozen=True)
class Rewrite:
    """parts: the roles it concerns. what: what it does, in a line. apply: does it, in place. not_in:
    precisions whose graphs do without, because an engine cannot build them."""

    parts: tuple[str, ...]
    what: str
    apply: Callable[[nn.Module], None]
    not_in: tuple[str, ...] = ()


def _fold_upsampling(tokenizer: nn.Module) -> None:
    for decoder in _decoders(tokenizer):
        decoder.fold_upsampling()


def _norm_by_channel(tokenizer: nn.Module) -> None:
    for decoder in _decoders(tokenizer):
        decoder.norm_by_channel()


def _decoders(tokenizer: nn.Module) -> list[Decoder]:
    from ddexport.families._vq_codec import Decoder

    return [module for module in tokenizer.modules() if isinstance(module, Decoder)]


REWRITES: Mapping[str, Rewrite] = {
    "tables": Rewrite(
        ("student", "teacher"),
        "what depends on the class or on noise-or-data alone is looked up",
        lambda part: part.tabulate(),  # type: ignore[operator]
    ),
    "attention": Rewrite(
        ("student",),
        "large scales attend by themselves: what the mask forbids is not computed",
        lambda part: part.attend_in_groups(),  # type: ignore[operator]
    ),
    "upsampling": Rewrite(
        ("tokenizer",),
        "doubling and 3x3 convolution are one transposed convolution",
        _fold_upsampling,
        not_in=("bf16",),  # TensorRT-RTX 1.7 has no transposed convolution in bfloat16
    ),
    "group-norm": Rewrite(
        ("tokenizer",),
        "group norms are one product and one sum a channel",
        _norm_by_channel,
    ),
}
"""In the order in which they are applied; they do not depend on each other."""


LEFT_OUT = "rewrites left out"
"""The key of a manifest's `tools` that names them, separated by commas."""


def left_out(tools: Mapping[str, str]) -> tuple[str, ...]:
    """The rewrites that a bundle was made without, from its manifest's `tools`."""
    return tuple(name for name in tools.get(LEFT_OUT, "").split(", ") if name)


def check_rewrites(names: Iterable[str]) -> None:
    """Raises `RewriteError` for a name that is not in `REWRITES`."""
    for name in names:
        if name not in REWRITES:
            raise RewriteError(
                f"there is no rewrite {name!r} to leave out", f"there is: {', '.join(REWRITES)}"
            )


def rewrite(parts: Mapping[str, nn.Module], without: Iterable[str] = (), precision: str = FLOAT32) -> None:
    """Applies the rewrites of a precision to the parts by role, in place, but those named in `without`.

    Raises:
        RewriteError: there is no rewrite of such a name.
    """
    without = tuple(without)
    check_rewrites(without)
    for name, rule in REWRITES.items():
        if name in without or precision in rule.not_in:
            continue
        for role in rule.parts:
            if role in parts:
                rule.apply(parts[role])


def other_forms(
    parts: Mapping[str, nn.Module], precision: str, without: Iterable[str] = ()
) -> dict[str, nn.Module]:
    """Those parts by role that graphs of this precision are made of in a form of its own, rewritten.

    They are copies that share what they can with `parts`, which are float32 and not rewritten yet. All other
    parts have the same form in every precision.
    """
    from ddexport.precision.cast import shared_copy

    rules = [rule for rule in REWRITES.values() if precision in rule.not_in]
    roles = {role for rule in rules for role in rule.parts if role in parts}
    forms = {role: shared_copy(parts[role]) for role in sorted(roles)}
    rewrite(forms, without, precision)
    return forms
