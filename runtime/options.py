"""Arguments and options that several commands share: one declaration each, so that a word means one thing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from ddexport.runtime.errors import BundleError, UsageError, did_you_mean
from ddexport.runtime.schemes import SEPARATOR, local_bundle

F = TypeVar("F", bound=Callable[..., Any])

BUILD = Path("build")  # where `ddexport onnx` writes, and where a bundle is found by its name
PATH, POSITIVE = click.Path(path_type=Path), click.IntRange(min=1)


class Option(click.Option):
    """An option that shows its default in one way. show_default: words in its place, or False for none."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """As click's, without the range of a number, which is told when a number is outside."""
        record = super().get_help_record(ctx)
        default = self._default_text(ctx)
        shown = f"  [default: {default}]" if default else ""
        return record and (record[0], f"{self.help}{shown}")

    def _default_text(self, ctx: click.Context) -> str:
        if self.show_default is not None:
            return str(self.show_default or "")
        value = self.get_default(ctx)
        if isinstance(value, bool):
            return (self.opts if value else self.secondary_opts)[0] if self.secondary_opts else ""
        if isinstance(value, (list, tuple)):
            return ", ".join(map(str, value))
        return str(value) if isinstance(value, (str, int, float)) else ""


option = partial(click.option, cls=Option)


def bundles() -> list[Path]:
    """The bundles under build/ of the working directory, sorted."""
    directories = (path.parent for path in BUILD.glob("*/bundle.json"))
    return sorted(path for path in directories if not path.name.startswith("."))


def the_only_bundle() -> Path:
    """The bundle of a command without BUNDLE; stderr names it. Raises UsageError for none or several."""
    built = bundles()
    if len(built) != 1:
        names = ", ".join(path.name for path in built)
        hint = f"Add one of these names to the command: {names}." if built else MAKE
        how_many = f"{len(built)} bundles" if built else "no bundle"
        raise UsageError(f"BUNDLE is missing, and there is no default: {BUILD}/ has {how_many}", hint)
    click.echo(f"bundle: {built[0]}", err=True)
    return built[0]


class _Bundle(click.Path):
    """The path of a bundle, or the name of one under build/. Raises BundleError for a name that is neither; a
    longer path is taken as it is, for whoever reads the bundle to check, and so is an address."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if SEPARATOR in str(value):
            return str(value)
        path = super().convert(value, param, ctx)
        assert isinstance(path, Path)
        named = BUILD / path.name
        # Something else of that name may lie here, such as the images of `sample digits-var -o digits-var/`.
        if path.parent == Path() and not _is_bundle(path) and _is_bundle(named):
            return named
        if path.parent not in (Path(), BUILD) or path.exists():
            return path
        if named.is_dir():
            return named
        built = bundles()
        guess = did_you_mean(path.name, [bundle.name for bundle in built])
        raise BundleError(f"there is no bundle {value}", f"{guess}{_what_there_is(built)}")


def _is_bundle(path: Path) -> bool:
    return (path / "bundle.json").is_file()


def _what_there_is(built: list[Path]) -> str:
    return f"Under {BUILD}/ there is: {', '.join(path.name for path in built)}." if built else MAKE


def _or_the_only(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    if value or ctx.resilient_parsing:
        return value
    return (the_only_bundle(),) if param.nargs == -1 else the_only_bundle()


def _fetching(function: F, argument: str, whole: bool) -> F:
    """`function` with directories in place of the addresses of bundles: of one elsewhere a command needs the
    graphs that its --precision and --steps name, else all."""

    @wraps(function)
    def call(**values: Any) -> Any:
        precisions = values.get("precisions", values.get("precision", ()))
        needed = () if whole else (precisions, values.get("steps", ()))
        asked = [value if isinstance(value, tuple) else (value,) for value in needed]
        bundle = values[argument]
        if isinstance(bundle, tuple):
            values[argument] = tuple(local_bundle(name, *asked) for name in bundle)
        elif bundle is not None:
            values[argument] = local_bundle(bundle, *asked)
        return function(**values)

    return cast(F, call)


MAKE = "Make one with `ddexport onnx MODEL`; `ddexport models` lists the models."
BUNDLE = f"A bundle directory, the name of one under {BUILD}/, or hf://USER/NAME[@REVISION]."
# fmt: off
ARGUMENTS: dict[str, dict[str, Any]] = {
    "bundle": {"type": _Bundle(path_type=Path), "required": False, "callback": _or_the_only,
               "help": f"{BUNDLE}  [default: the only one there]"},
    "model": {"help": "A recipe: its name in `ddexport models`, a recipe file (YAML), or a directory or"
              " hf://USER/NAME with a recipe.yaml and weights."},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "backend": {"metavar": "NAME", "default": "auto",
                "help": "Inference engine: onnxruntime, openvino or tensorrt. auto: the best one that runs"
                " here."},
    "device": {"names": ("--device", "--provider", "device"), "metavar": "NAME",
               "show_default": "the engine's choice",
               "help": "Device of the inference engine: cpu, cuda or cuda:N."},
    "precision": {"metavar": "NAME",
                  "show_default": "that of the TensorRT engines if they run, else the bundle's first",
                  "help": "Precision to compute in: fp32, fp16, bf16 or int8."},
    "decoder": {"metavar": "NAME", "default": "full",
                "help": "Decoder that makes the images: full, or small, which is faster and less exact."},
    "threads": {"type": POSITIVE, "metavar": "N", "show_default": "the engine's choice",
                "help": "Number of CPU threads."},
    "seed": {"type": click.IntRange(0, 2**64 - 1), "metavar": "N", "default": 0,
             "help": "Seed of the random noise."},
    "no-verify": {"is_flag": True, "help": "Do not check the SHA-256 of the bundle's files."},
    "json": {"names": ("--json", "as_json"), "is_flag": True, "help": "Print the result as JSON."},
}
# fmt: on


def comma_list(read: Callable[[str], Any], single: bool = False) -> Callable[..., Any]:
    """A callback for words between commas: a tuple of each once, or with `single` one or None.

    read: a word as what it means; its ValueError says what is wrong with the word.
    """

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        words = [] if value is None else [word.strip() for word in value.split(",")]
        try:
            values = tuple(dict.fromkeys(read(word) for word in words))
        except ValueError as error:
            raise click.BadParameter(f"{error}.", ctx, param) from error
        if single and len(values) > 1:
            raise click.BadParameter(f"{value!r} is more than one.", ctx, param)
        return (values[0] if values else None) if single else values

    return callback


def number(word: str, least: int = 1) -> int:
    """A word of a `comma_list` as a number."""
    if not word.isdecimal() or int(word) < least:
        raise ValueError(f"{word!r} is not a whole number of at least {least}")
    return int(word)


def known(word: str, names: Iterable[str]) -> str:
    """A word of a `comma_list` that is one of these names."""
    if word not in names:
        raise ValueError(f"{word!r} is not one of {', '.join(names)}")
    return word


def shared(
    *names: str, options: Mapping[str, Mapping[str, Any]] = OPTIONS, **changes: Any
) -> Callable[[F], F]:
    """Decorator: adds the arguments and options of these names in this order.

    options: the settings of each, with its spellings as `names`. changes: settings that are different here;
    whole: a bundle elsewhere is fetched whole, whatever the precision.
    """

    def add(function: F) -> F:
        for name in reversed(names):
            if name in ARGUMENTS:
                settings = {**ARGUMENTS[name], **changes}
                argument, whole = settings.pop("name", name), settings.pop("whole", False)
                if name == "bundle":
                    function = _fetching(function, argument, whole)
                function = click.argument(argument, **settings)(function)
            else:
                settings = {**options[name], **changes}
                function = option(*settings.pop("names", (f"--{name}",)), **settings)(function)
        return function

    return add
