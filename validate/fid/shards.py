"""Images that `ddexport sample --shards` has drawn, in place of those that a bundle would draw now."""

from __future__ import annotations

from dataclasses import replace

from ddexport.runtime.bundle import Manifest
from ddexport.runtime.errors import VerificationError
from ddexport.runtime.shards.image_set import Reader
from ddexport.validate.conditions import conditions_of
from ddexport.validate.fid.command import Options
from ddexport.validate.fid.draws import Draw
from ddexport.validate.fid.plan import FidSettingError

TAKEN = ("seed", "steps", "decoder", "precision", "backend")  # from the set, as options call them


def options_of(reader: Reader, options: Options, manifest: str) -> Options:
    """The options, completed from the set. manifest: SHA-256 of that of the bundle.

    Raises FidSettingError for a set of another bundle, and for options that it contradicts.
    """
    drawn = reader.set
    if drawn.manifest != manifest:
        text = f"{reader.folder} was drawn with another bundle, {drawn.bundle}"
        raise FidSettingError(text, "name that bundle, or draw the images again")
    if options.per_class is not None or (options.images or 0) > drawn.count:
        raise FidSettingError(
            f"{reader.folder} has {drawn.count} images of its own labels", "leave the number out"
        )
    values = {name: getattr(drawn, name) for name in TAKEN} | {"steps": (drawn.steps,)}
    for name, value in values.items():
        if name in options.given and getattr(options, name) != value:
            raise FidSettingError(
                f"{reader.folder} was drawn with {name} {getattr(drawn, name)}", f"leave out --{name}"
            )
    return replace(options, images=options.images or drawn.count, **values)


def labels_of(reader: Reader, manifest: Manifest) -> tuple[int, ...]:
    """The label of each image of a set, as `conditions_of` numbers them. Raises VerificationError."""
    if manifest.text is None:
        return tuple(facts["label"] for facts in reader.facts)
    prompts = conditions_of(manifest).prompts
    try:
        return tuple(prompts.index(facts["prompt"]) for facts in reader.facts)
    except ValueError as error:
        text = f"{reader.folder} has a prompt that is no example of {manifest.name}"
        raise VerificationError(
            text, "draw the examples of its recipe: the reference knows no others"
        ) from error


def by_shards(reader: Reader, steps: int) -> Draw:
    """As they were drawn before, in so many steps."""
    return lambda order, indices: {steps: reader.images(indices)}
