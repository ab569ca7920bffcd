"""`ddexport sample`: draws images from a bundle."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ddexport.runtime import console
from ddexport.runtime.errors import LabelError, TextError
from ddexport.runtime.options import PATH, POSITIVE, option, shared

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ddexport.runtime.conditions import Conditions
    from ddexport.runtime.pipeline import Pipeline
    from ddexport.runtime.result import Result

FEW_CLASSES = 10
SHOWN_CLASSES = 8

EPILOG = """
\b
Examples:
  ddexport sample digits-var
  ddexport sample digits-var --label seven --steps 2 -n 16 -o seven.png
  ddexport sample digits-var --decoder small -o small.png
  ddexport sample digits-var --steps 3 --guidance-scale 1.5 --top-p 0.9 -o three-steps.png
  ddexport sample digits-var --steps teacher --top-k 1 -o teacher.png --dump teacher.npz
  ddexport sample build/var-d16 --label 207 --label "ice bear" -n 4 -o dogs-and-bears/
  ddexport sample llamagen-t2i-xl --prompt "a red fox" --prompt "a lighthouse at dusk" -o fox.png
  ddexport sample llamagen-t2i-xl --features prompts.npz --top-k 500 -o prompts.png
  ddexport sample digits-var --labels uniform --count 50000 --shards digits-50k
  ddexport sample digits-t2i --prompts prompts.txt --count 9000 --shards /mnt/t2i --ray 10.0.0.1:6379
"""
SHARD_SIZE = 500
MAX_COUNT = 10**8  # images; their labels are in memory
ONLY_SHARDS = ("label_source", "count", "shard_size", "workers", "address")
NO_SHARDS = ("features", "noise", "dump", "output", "num_images", "list_labels")


def _steps(ctx: click.Context, param: click.Parameter, value: Any) -> int | str | None:
    """A number of steps, or "teacher"."""
    return value if value in (None, "teacher") else int(POSITIVE.convert(value, param, ctx))


@click.command(name="sample", cls=console.Command, epilog=EPILOG)
@shared("bundle")
@option("--label", "labels", multiple=True, metavar="CLASS",
        show_default=f"all classes if there are at most {FEW_CLASSES}, else {SHOWN_CLASSES} of them",
        help="Class to generate, by number or by name. Can be repeated.")  # fmt: skip
@option("--prompt", "prompts", multiple=True, metavar="PROMPT",
        help="Text to generate, of a model that draws from texts. Can be repeated.")  # fmt: skip
@option("--prompts", "prompt_file", type=PATH, metavar="FILE", help="The same, one prompt a line.")
@option("--features", type=PATH, metavar="FILE.npz",
        help="What a text encoder made of the prompts, in place of them: features (N, T, W), left-padded, and"
        " features_mask (N, T).")  # fmt: skip
@option("--steps", callback=_steps, metavar="N|teacher", show_default="the fewest",
        help="Number of steps; `ddexport inspect` lists those that the bundle has. teacher: all steps of the"
        " auto-regressive model.")  # fmt: skip
@option("--teacher-start", type=click.IntRange(min=0), metavar="POSITION", show_default="as in the schedule",
        help="First token position that the teacher draws.")  # fmt: skip
@option("--guidance-scale", "--cfg", "guidance_scale", type=float, metavar="X", show_default="the bundle's",
        help="Scale of the teacher's classifier-free guidance.")  # fmt: skip
@option("--top-k", type=POSITIVE, metavar="K", show_default="the bundle's",
        help="The teacher draws from the K most probable tokens. 1: it always takes the most probable"
        " one.")  # fmt: skip
@option("--top-p", type=float, metavar="P", show_default="the bundle's",
        help="Nucleus sampling: the teacher draws from the fewest tokens whose probabilities add up to"
        " P.")  # fmt: skip
@option("--temperature", type=float, metavar="T", show_default="the bundle's",
        help="Divides the teacher's logits.")  # fmt: skip
@shared("seed")
@option("-n", "--num-images", type=POSITIVE, metavar="N", default=1,
        help="Number of images per label or prompt.")  # fmt: skip
@shared("decoder", "backend", "device", "threads", "precision")
@option("--batch-size", type=POSITIVE, metavar="N", show_default="chosen by the image size",
        help="Number of images per batch.")  # fmt: skip
@option("--noise", type=PATH, metavar="FILE.npz",
        help="Use the noise in this file instead of a seed, and its labels and uniform numbers if it has"
        " any. --dump writes such a file.")  # fmt: skip
@option("--dump", type=PATH, metavar="FILE.npz",
        help="Also write labels, noise, tokens, sequences and images to this file.")  # fmt: skip
@option("-o", "--output", default="out.png", metavar="PATH",
        help="File for one picture of all images, or directory for one file per image.")  # fmt: skip
@option("--shards", type=PATH, metavar="DIR",
        help="Directory of a set of images, in place of --output: tar files with a PNG and a JSON for each"
        " image, drawn by several processes. The same command goes on with an incomplete set.")  # fmt: skip
@option("--labels", "label_source", metavar="uniform|FILE", show_default="uniform",
        help="With --shards: labels drawn at random, or one a line of this file.")  # fmt: skip
@option("--count", type=click.IntRange(1, MAX_COUNT), metavar="N",
        show_default="the number of labels or prompts",
        help="With --shards: number of images in the set; labels and prompts are repeated.")  # fmt: skip
@option("--shard-size", type=POSITIVE, metavar="N", default=SHARD_SIZE,
        help="With --shards: number of images in a tar file.")  # fmt: skip
@option("--workers", type=POSITIVE, metavar="N", show_default="one a CPU, one on a GPU",
        help="With --shards: number of processes, of one thread each unless --threads is given.")  # fmt: skip
@option("--ray", "address", metavar="ADDRESS|local", show_default="processes of this machine",
        help="With --shards: draw on this Ray cluster, whose machines share the directories of bundle and"
        " images; local starts one on this machine.")  # fmt: skip
@shared("json")
@option("--list-labels", is_flag=True, help="Print the classes of the bundle and exit.")
@shared("no-verify")
@console.debug_option
@click.pass_context
def command(ctx: click.Context, /, as_json: bool, list_labels: bool, **options: Any) -> None:
    """Generate images with BUNDLE."""
    if list_labels:
        print_labels(options["bundle"], as_json)
        return
    given = {name for name in options if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    in_shards = options["shards"] is not None
    for parameter in ctx.command.params:
        if parameter.name in given.intersection(NO_SHARDS if in_shards else ONLY_SHARDS):
            how = "cannot be used with --shards" if in_shards else "needs --shards"
            raise click.UsageError(f"{max(parameter.opts, key=len)} {how}.")
    if in_shards:
        from ddexport.runtime.shards import request

        report = request.sample_shards(**{key: options[key] for key in options if key not in NO_SHARDS})
        line = request.report_line(report)
    else:
        options["seed"] = options["seed"] if "seed" in given else None
        report = sample(**{key: options[key] for key in options if key not in (*ONLY_SHARDS, "shards")})
        line = report_line(report)
    if as_json:
        console.emit_json(report)
    else:
        click.echo(line)


def sample(
    bundle: Path,
    labels: tuple[str, ...],
    steps: int | str | None,
    seed: int | None,
    num_images: int,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    features: Path | None,
    decoder: str,
    backend: str,
    device: str | None,
    threads: int | None,
    precision: str | None,
    batch_size: int | None,
    noise: Path | None,
    dump: Path | None,
    output: str,
    no_verify: bool,
    **sampling: Any,
) -> dict[str, Any]:
    """Draws and writes what the options ask for, and returns the report.

    output: a trailing slash means a directory. seed: 0 if None. Raises DDError; then the output is as it was.
    """
    from ddexport.runtime.files import Replay, read_noise
    from ddexport.runtime.images import grid_columns
    from ddexport.runtime.pipeline import load
    from ddexport.runtime.result import joined

    into_directory = output.endswith(("/", os.sep)) or Path(output).is_dir() or not Path(output).suffix
    _check_outputs(Path(output), into_directory, dump)
    replay = read_noise(noise) if noise else Replay(None, None, None)
    if replay.labels is not None and (labels or num_images != 1):
        raise LabelError(
            f"{noise} has labels of its own, so --label and -n cannot be used with it",
            "Leave them out, or remove `labels` from the file.",
        )
    began = time.perf_counter()
    with console.stage(f"loading {bundle}", keep=False):
        how: dict[str, Any] = {"steps": steps, "device": device, "decoder": decoder}
        pipe = load(bundle, backend, threads, precision, not no_verify, **how)
    with pipe:
        loaded = time.perf_counter() - began
        given = _conditions(pipe, replay.labels, labels, prompts, prompt_file, features)
        numbers = given.numbers.tolist()
        schedule = pipe.schedule(steps, sampling["teacher_start"])
        passes = pipe.manifest.number_of_steps(schedule)
        if schedule.teacher is not None:
            sampling["uniforms"] = replay.uniforms
        seeded = noise is None or (schedule.teacher is not None and replay.uniforms is None)
        if seed is not None and not seeded:
            raise click.UsageError("--noise takes the place of --seed: give one of them.")
        image = pipe.manifest.image
        columns = 0 if into_directory else grid_columns(len(numbers), num_images, image.width, image.height)
        with console.progress(len(numbers) * num_images * passes, "generating, model calls") as bar:
            batches = pipe.stream(
                given,
                steps,
                seed=seed or 0,
                num_images=num_images,
                batch_size=batch_size,
                output="numpy",
                noise=replay.noise,
                decoder=decoder,
                on_pass=bar.advance,
                **sampling,
            )
            folder = Path(output) if into_directory else None
            what = "class" if pipe.texts is None else "prompt"
            result = joined(list(_kept(batches, folder, dump is not None, what)))
        _write(result, None if into_directory else Path(output), dump, columns)
        chosen = pipe.backend.configuration
        return {
            "bundle": pipe.manifest.name,
            "output": output,
            "images": len(numbers) * num_images,
            "labels": numbers,
            "steps": passes,
            "seed": (seed or 0) if seeded else None,
            "backend": chosen.backend,
            "device": chosen.device,
            "precision": chosen.precision,
            "decoder": decoder,
            "decoder_cost": pipe.manifest.decoders.get(decoder),
            "random_weights": pipe.manifest.weights.kind == "random",
            "seconds": {"load": loaded, **result.seconds},
        }


def report_line(report: dict[str, Any]) -> str:
    """The report for people, in one line, and in another what a further decoder costs."""
    parts = {what: spent for what, spent in report["seconds"].items() if what != "load" and spent}
    times = ", ".join(f"{what} {console.duration(spent)}" for what, spent in parts.items())
    engine = ", ".join((report["backend"], report["device"], report["precision"]))
    image = console.duration(sum(parts.values()) / report["images"])
    cost = report["decoder_cost"]
    shown = f"\ndecoder {report['decoder']}, against the full one: {cost}" if cost else ""
    return (
        f"{report['output']}: {_count(report['images'], 'image')} in {_count(report['steps'], 'step')}; "
        f"{times}, {image} per image; {engine}{shown}"
    )


def print_labels(bundle: Path, as_json: bool) -> None:
    """Prints number and name of every class."""
    from ddexport.runtime.bundle import read_manifest, resolve
    from ddexport.runtime.labels import read_labels

    manifest = read_manifest(bundle, verify=False)
    if manifest.text is not None:
        raise LabelError(f"{manifest.name} draws from texts: it has no labels", "Give --prompt.")
    names = read_labels(resolve(bundle, manifest.labels.file), manifest.classes).names
    if as_json:
        console.emit_json({"names": names})
    else:
        click.echo("\n".join(f"{number:>5}  {name}" for number, name in enumerate(names)))


def dump_arrays(result: Result) -> dict[str, NDArray[Any]]:
    """The arrays of a dump: labels, noise, step{k}_tokens and step{k}_sequence of the student's steps from
    k = 1, in between those of a teacher with its uniform numbers, images.
    """
    arrays: dict[str, NDArray[Any]] = {"labels": result.labels, "noise": result.noise}
    if result.uniforms is not None:
        arrays["uniforms"] = result.uniforms
    numbers = itertools.count(1)
    for step in result.steps:
        name = "teacher" if step.role == "teacher" else f"step{next(numbers)}"
        arrays[f"{name}_tokens"] = step.tokens
        arrays[f"{name}_sequence"] = step.sequence
    arrays["images"] = result.images  # type: ignore[assignment]
    return arrays


def _check_outputs(output: Path, into_directory: bool, dump: Path | None) -> None:
    from ddexport.runtime.files import check_image_suffix, check_writable, make_directory

    if into_directory:
        make_directory(output)
    else:
        check_image_suffix(output)
        check_writable(output)
    if dump:
        check_writable(dump)


def _conditions(
    pipe: Pipeline,
    own: NDArray[np.int64] | None,
    labels: tuple[str, ...],
    prompts: tuple[str, ...],
    file: Path | None,
    features: Path | None,
) -> Conditions:
    """What the options ask for; own: the labels of a noise file, which number the prompts of a text model."""
    from ddexport.runtime.text import example_prompt, read_features, read_prompts

    texts = (prompts, file, features)
    if pipe.texts is None:
        if any(texts):
            raise TextError(f"{pipe.manifest.name} draws classes, not texts", "Give --label.")
        return pipe.conditions(_labels(own, labels, pipe))
    if labels or sum(map(bool, texts)) != 1:
        raise TextError(
            f"{pipe.manifest.name} draws from texts: give either --prompt, --prompts or --features",
            f'Give a sentence, and no label: --prompt "{example_prompt(pipe.manifest.recipe)}".',
        )
    size, given = pipe.texts.size, list(prompts)
    if file is not None:
        given = read_prompts(file)
    conditions = pipe.conditions(read_features(features, size.tokens, size.width) if features else given)
    if own is None:
        return conditions
    if len(own) and not 0 <= own.min() <= own.max() < len(conditions):
        fault = f"the noise file draws prompt {own.max()}, and {len(conditions)} are given"
        raise LabelError(fault, "Give the prompts that it was written with, in their order.")
    return conditions.rows(own)


def _labels(own: NDArray[np.int64] | None, labels: tuple[str, ...], pipe: Pipeline) -> list[Any]:
    if own is not None:
        return list(own)
    classes = pipe.manifest.classes
    if labels:
        return list(labels)
    if classes <= FEW_CLASSES:
        return list(range(classes))
    return [number * (classes - 1) // (SHOWN_CLASSES - 1) for number in range(SHOWN_CLASSES)]


def _kept(batches: Iterator[Result], folder: Path | None, everything: bool, what: str) -> Iterator[Result]:
    """Writes one file an image into a folder, and passes on what is still needed: all for a dump, else the
    images for a picture, else the times alone."""
    from dataclasses import replace

    from ddexport.runtime.files import write_image
    from ddexport.runtime.images import to_pil

    count = 0
    for batch in batches:
        if folder is not None:
            images = zip(to_pil(batch.images), batch.labels, strict=True)  # type: ignore[arg-type]
            for number, (image, label) in enumerate(images, count):
                write_image(folder / f"{number:05d}-{what}{label:04d}.png", image)
            count += len(batch)
        if everything:
            yield batch
        else:
            shown = batch.images[:0] if folder else batch.images
            yield replace(batch, images=shown, noise=batch.noise[:0], steps=[], uniforms=None)


def _write(result: Result, picture: Path | None, dump: Path | None, columns: int) -> None:
    from ddexport.runtime.files import write_arrays, write_image
    from ddexport.runtime.images import grid, to_pil

    if picture is not None:
        images = to_pil(result.images)  # type: ignore[arg-type]
        write_image(picture, grid(images, columns), follow=True)
    if dump:
        write_arrays(dump, dump_arrays(result), follow=True)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
