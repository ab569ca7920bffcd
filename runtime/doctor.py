"""`ddexport doctor`: what this machine has, what is broken, and what a bundle would run on and why."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ddexport.runtime import console, machine
from ddexport.runtime.errors import BundleError, VerificationError
from ddexport.runtime.options import BUNDLE, option, shared, the_only_bundle

WIDTH = 16
PACKAGES = {  # distribution -> the module that must import, and the extra that brings it
    "onnxruntime": ("onnxruntime", "cpu"),
    "onnxruntime-gpu": ("onnxruntime", "gpu"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", "tensorrt"),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt-rtx"),
    "cuda-bindings": ("cuda.bindings.runtime", "gpu"),
}


def diagnose(root: Path | None = None) -> dict[str, Any]:
    """Looks at the machine, and at a bundle. Raises BundleError if its manifest or a file of it is bad."""
    from ddexport.runtime import __version__

    cuda, packages, problems = machine.cuda(), {}, []
    for name, (module, extra) in PACKAGES.items():
        packages[name] = machine.version_of(name)
        if packages[name] and (fault := machine.import_fault(module, extra)):
            problems.append(fault)
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        problems.append(
            "onnxruntime and onnxruntime-gpu overwrite each other's files: uninstall both, then install one"
        )
    if not any(packages[name] for name in PACKAGES if name != "cuda-bindings"):
        problems.append('no inference engine is installed: pip install "ddexport[cpu]"')
    return {
        "ddexport": __version__,
        "python": platform.python_version(),
        "platform": machine.this_platform(),
        "cpu": machine.cpu()._asdict(),
        "gpus": [{**vars(gpu), "target": gpu.target} for gpu in cuda.gpus],
        "cuda": ".".join(map(str, cuda.version)) if cuda.version else None,
        "cuda_fault": cuda.fault,
        "packages": packages,
        "problems": problems,
        "bundle": diagnose_bundle(root) if root else None,
    }


def diagnose_bundle(root: Path) -> dict[str, Any]:
    """What a bundle could run on, the most preferred first. Raises BundleError if a file of it is bad."""
    from ddexport.runtime.backends import configurations
    from ddexport.runtime.bundle import read_manifest, sha256_of
    from ddexport.runtime.engines import find_engines

    manifest = read_manifest(root)
    sets, errors = find_engines(root)
    damaged = [error.message for error in errors]
    for folder, _, engines in sets:
        for plan, sha256 in ((folder / engine.file, engine.sha256) for engine in engines.values()):
            if not plan.is_file():
                damaged.append(f"{folder.name}/{plan.name} is missing")
            elif sha256_of(plan) != sha256:
                damaged.append(f"{folder.name}/{plan.name} is not the file its sidecar describes")
    prompts = None
    if manifest.text and manifest.text.tokenizer:
        absent = [name for name in ("tokenizers", "ftfy", "beautifulsoup4") if not machine.version_of(name)]
        prompts = f'need {", ".join(absent)}: pip install "ddexport[text]"' if absent else "can be read"
    by_default = configurations(root, manifest)
    others = [
        configuration
        for precision in dict.fromkeys((*manifest.precisions[1:], "bf16", "fp16"))
        for configuration in configurations(root, manifest, precision=precision)
        if configuration not in by_default and not configuration.obstacle
    ]
    return {
        "path": str(root),
        "name": manifest.name,
        "title": manifest.title,
        "precisions": manifest.precisions,
        "damaged": damaged,
        "prompts": prompts,
        "auto": next((str(c) for c in by_default if not c.obstacle), None),
        "configurations": [
            {"name": str(c), "runs": not c.obstacle, "reason": c.obstacle or c.note} for c in by_default
        ],
        "by_name": [str(c) for c in others],
    }


def lines(diagnosis: dict[str, Any]) -> Iterator[str]:
    """The diagnosis for people."""
    yield f"ddexport {diagnosis['ddexport']}, Python {diagnosis['python']}, {diagnosis['platform']}"
    yield from _heading("machine")
    yield _row("cpu", f"{diagnosis['cpu']['name']}, {diagnosis['cpu']['cores']} cores")
    for gpu in diagnosis["gpus"]:
        memory = gpu["memory"] / (1 << 30)
        yield _row(f"gpu {gpu['index']}", f"{gpu['name']}, {gpu['target']}, {memory:.1f} GiB")
    if not diagnosis["gpus"]:
        yield _row("gpu", diagnosis["cuda_fault"] or "none")
    if diagnosis["cuda"]:
        yield _row("driver", f"CUDA up to {diagnosis['cuda']}")
    yield from _heading("packages")
    for name, version in diagnosis["packages"].items():
        yield _row(name, version or f'not installed: pip install "ddexport[{PACKAGES[name][1]}]"')
    yield from _heading("problems")
    for problem in diagnosis["problems"] or ["none"]:
        yield f"  {problem}"
    if diagnosis["bundle"]:
        yield from _bundle_lines(diagnosis["bundle"])


def _bundle_lines(bundle: dict[str, Any]) -> Iterator[str]:
    yield from _heading(f"{bundle['path']}: {bundle['title']}")
    yield _row("graphs", ", ".join(bundle["precisions"]))
    if bundle["prompts"]:
        yield _row("prompts", bundle["prompts"])
    for text in bundle["damaged"]:
        yield _row("damaged", click.style(text, fg="red"))
    yield _row("auto takes", bundle["auto"] or click.style("nothing: no engine can run it here", fg="red"))
    for configuration in bundle["configurations"]:
        mark = click.style("yes", fg="green") if configuration["runs"] else click.style("no ", fg="yellow")
        reason = f": {configuration['reason']}" if configuration["reason"] else ""
        yield f"    {mark}  {configuration['name']}{reason}"
    if bundle["by_name"]:
        yield _row(
            "also possible", "; ".join(bundle["by_name"]) + "  (choose with --backend and --precision)"
        )


def _heading(text: str) -> Iterator[str]:
    yield ""
    yield click.style(text, bold=True)


def _row(name: str, text: str) -> str:
    return f"  {name:<{WIDTH}}{text}".rstrip()


EPILOG = """
\b
Examples:
  ddexport doctor
  ddexport doctor digits-var
  ddexport doctor digits-int8 --check --backend openvino --precision int8
"""


@click.command(name="doctor", cls=console.Command, epilog=EPILOG)
@shared("bundle", whole=True, callback=None,
        help=f"{BUNDLE}  [default: none; with --check the only one there]")  # fmt: skip
@option("--check", "checked", is_flag=True,
        help="Generate the images in parity/golden.npz of the bundle, and compare them with those of the"
        " PyTorch model.")  # fmt: skip
@shared("backend", default=None, show_default="auto")
@shared("precision", "json")
@console.debug_option
def command(
    bundle: Path | None, checked: bool, backend: str | None, precision: str | None, as_json: bool
) -> None:
    """Show which inference engines work on this machine.

    With BUNDLE it also lists the engines and precisions that can run the bundle, and why others cannot. A
    damaged bundle ends with exit code 1, a missing package does not.

    With --check it generates images with the bundle instead, and compares them with those that `ddexport
    validate parity` stored from the PyTorch model. PyTorch is not needed. --backend and --precision choose
    what is checked. Exit code 3 if a difference exceeds a limit.
    """
    if checked:
        _check(bundle or the_only_bundle(), backend or "auto", precision, as_json)
        return
    if backend or precision:
        raise click.UsageError("--backend and --precision can only be given with --check.")
    diagnosis = diagnose(bundle)
    if as_json:
        console.emit_json(diagnosis)
    else:
        click.echo("\n".join(lines(diagnosis)))
    if diagnosis["bundle"] and diagnosis["bundle"]["damaged"]:
        raise BundleError(
            f"{bundle} has damaged engines: {'; '.join(diagnosis['bundle']['damaged'])}",
            f"Remove them, or build them again: ddexport trt {bundle} --force",
        )


def _check(bundle: Path, backend: str, precision: str | None, as_json: bool) -> None:
    from ddexport.runtime.check import check, read_golden
    from ddexport.runtime.pipeline import load

    golden = read_golden(bundle)
    with load(bundle, backend, precision=precision) as pipe:
        what = f"generating {len(golden.seeds)} images in {len(golden.steps)} schedules"
        with console.stage(what, keep=False):
            checks = check(pipe, golden)
        name = f"{pipe.backend.name} in {pipe.precision}"
    if as_json:
        console.emit_json({"backend": name, "checks": [vars(row) for row in checks]})
    else:
        click.echo("\n".join(map(str, checks)))
    failed = [row.steps for row in checks if row.faults]
    if failed:
        raise VerificationError(
            f"{name} does not generate the images of PyTorch, in steps: {', '.join(failed)}",
            "Try another --backend or --precision. `ddexport validate parity` shows more, but needs PyTorch.",
        )
    if not as_json:
        click.echo(f"{name} generates the images of PyTorch, within the limits")
