"""`ddexport doctor`: what this machine has, what is broken, and what a bundle would run on and why."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from ddexport.runtime import console
from ddexport.runtime.errors import BundleError, VerificationError
from ddexport.runtime.machine import GPU_RUNTIME, Cpu, Gpu, Machine, Package

if TYPE_CHECKING:
    from ddexport.runtime.fit import Build
    from ddexport.runtime.manifest import Manifest
    from ddexport.runtime.selection import Candidate

WIDTH = 16
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
PROVIDER_NAMES = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "tensorrt",
}


@dataclass(frozen=True)
class EngineReport:
    """The engines of one folder in one precision. roles: to batch sizes. fits: nothing stands in the way.
    The rest is that of `ddexport.runtime.fit.Fit`. rebuild: the command that makes one that fits."""

    folder: str
    precision: str
    roles: dict[str, list[str]]
    fits: bool
    misfits: tuple[str, ...]
    lacking: tuple[str, ...]
    doubts: tuple[str, ...]
    notes: tuple[str, ...]
    rebuild: str | None


@dataclass(frozen=True)
class Way:
    """One way to run the bundle, and what stands in it.

    usable: `auto` may take it. on_request: it runs if it is named. total_ms: measured on this CPU, as all
    others of the bundle were; None if it was not. verdict: whether its outputs met the bundle's limits there.
    """

    name: str
    usable: bool
    reasons: str
    on_request: bool
    total_ms: float | None
    verdict: str


@dataclass(frozen=True)
class BundleReport:
    """damaged: what makes the bundle bad. auto: the way that `--backend auto` takes, if any; why: and the
    reason."""

    path: str
    name: str
    title: str
    precisions: tuple[str, ...]
    engines: list[EngineReport]
    damaged: list[str]
    auto: str | None
    why: str | None
    ways: list[Way]


@dataclass(frozen=True)
class Diagnosis:
    """Everything `doctor` says. cuda: the newest CUDA that the driver supports. openvino_precisions:
    those that OpenVINO computes in on this CPU."""

    ddexport: str
    python: str
    platform: str
    cpu: Cpu
    gpus: tuple[Gpu, ...]
    cuda_problem: str | None
    driver: str | None
    cuda: str | None
    packages: list[Package]
    providers: list[str]
    openvino_precisions: list[str]
    problems: list[str]
    bundle: BundleReport | None = None


def diagnose(machine: Machine, bundle: Path | None = None) -> Diagnosis:
    """Looks at the machine, and at a bundle. Raises BundleError if its manifest or a file of it is bad."""
    from ddexport import runtime

    packages = [machine.onnxruntime, machine.openvino, *machine.engine_packages.values(), machine.bindings]
    known = [PROVIDER_NAMES[name] for name in machine.providers if name in PROVIDER_NAMES]
    return Diagnosis(
        ddexport=runtime.__version__,
        python=platform.python_version(),
        platform=machine.platform,
        cpu=machine.cpu,
        gpus=machine.gpus,
        cuda_problem=machine.cuda_problem,
        driver=machine.driver,
        cuda=".".join(map(str, machine.cuda)) if machine.cuda else None,
        packages=packages,
        providers=known,
        openvino_precisions=[name for name in PRECISIONS if name.upper() in machine.openvino_capabilities],
        problems=problems(machine),
        bundle=diagnose_bundle(machine, bundle) if bundle else None,
    )


def problems(machine: Machine) -> list[str]:
    """What is installed and does not work, each with what to do. A package that is missing is none."""
    found = [machine.both_onnxruntimes] if machine.both_onnxruntimes else []
    packages = (machine.onnxruntime, machine.openvino, *machine.engine_packages.values(), machine.bindings)
    found += [package.problem for package in packages if package.problem and not package.missing]
    if machine.onnxruntime.missing:
        found.append(str(machine.onnxruntime.problem))
    for name, package in machine.engine_packages.items():
        if not package.problem:
            found += machine.cuda_troubles(name)
            if machine.bindings.missing:
                found.append(f"{name} cannot run engines alone: {machine.bindings.problem}")
    if machine.gpus and not machine.onnxruntime.problem and "CUDAExecutionProvider" not in machine.providers:
        found.append(f"the installed onnxruntime leaves the GPU idle; the one that uses it: {GPU_RUNTIME}")
    return list(dict.fromkeys(found))


def diagnose_bundle(machine: Machine, root: Path) -> BundleReport:
    """What a bundle could run on. Raises BundleError if its manifest or a file of it is bad."""
    from ddexport.runtime.fit import builds
    from ddexport.runtime.manifest import read_manifest
    from ddexport.runtime.selection import candidates, choose, explain

    manifest = read_manifest(root)
    made, errors = builds(root)
    found = candidates(root, manifest, machine)
    chosen = choose(found, explicit=False)
    return BundleReport(
        path=str(root),
        name=manifest.name,
        title=manifest.title,
        precisions=manifest.precisions,
        engines=[_engines(machine, root, manifest, build) for build in made],
        damaged=[error.message for error in errors] + [text for build in made for text in _bad_plans(build)],
        auto=chosen.name if chosen else None,
        why=explain(chosen, found) if chosen else None,
        ways=[_way(each) for each in found],
    )


def _way(candidate: Candidate) -> Way:
    can, asked = not candidate.why_not, bool(candidate.doubts or candidate.unproven)
    verdict = "failed" if candidate.failed else "passed" if candidate.total_ms is not None else "not measured"
    return Way(
        candidate.name, can and not asked, candidate.reasons, can and asked, candidate.total_ms, verdict
    )


def _engines(machine: Machine, root: Path, manifest: Manifest, build: Build) -> EngineReport:
    from ddexport.runtime.fit import Fit, fit, rebuild_command
    from ddexport.runtime.manifest import ROLES

    if build.precision in manifest.precisions:
        result = fit(build, {role: manifest.graph(role, build.precision) for role in ROLES}, machine)
    else:
        result = Fit((f"the bundle has no graphs in {build.precision}",))
    return EngineReport(
        folder=build.folder,
        precision=build.precision,
        roles={role: [str(p) for p in found.engine.profiles] for role, found in build.engines.items()},
        fits=not result.obstacles and not result.doubts,
        misfits=result.misfits,
        lacking=result.lacking,
        doubts=result.doubts,
        notes=result.notes,
        rebuild=rebuild_command(root, build, machine) if result.misfits or result.doubts else None,
    )


def _bad_plans(build: Build) -> Iterator[str]:
    from ddexport.runtime.manifest import sha256_of

    for found in build.engines.values():
        if not found.plan.is_file():
            yield f"{build.folder}/{found.plan.name} is missing"
        elif sha256_of(found.plan) != found.engine.sha256:
            yield f"{build.folder}/{found.plan.name} is not the file its sidecar describes"


def lines(found: Diagnosis) -> Iterator[str]:
    """The diagnosis for people."""
    yield f"ddexport {found.ddexport}, Python {found.python}, {found.platform}"
    yield from _heading("machine")
    features = "features not known" if found.cpu.features is None else " ".join(found.cpu.features)
    cores = f"{found.cpu.cores} core{'' if found.cpu.cores == 1 else 's'}"
    yield _row("cpu", ", ".join(part for part in (found.cpu.name, cores, features) if part))
    for gpu in found.gpus:
        yield _row(f"gpu {gpu.index}", f"{gpu.name}, {gpu.target}, {gpu.memory / (1 << 30):.1f} GiB")
    if not found.gpus:
        yield _row("gpu", found.cuda_problem or "none")
    if found.driver or found.cuda:
        yield _row("driver", f"{found.driver or 'version not known'}, CUDA up to {found.cuda or 'unknown'}")
    yield from _heading("packages")
    for package in found.packages:
        extra = _details(found).get(package.name, "")
        problem = package.problem or ""
        state = "missing" if package.missing else "broken" if problem else f"{package.version}{extra}"
        # What is broken is told in full under `problems`.
        yield _row(package.name, f"{state}  ({_install(problem)})" if package.missing else state)
    yield from _heading("problems")
    for problem in found.problems or ["none"]:
        yield f"  {problem}"
    if found.bundle:
        yield from _bundle_lines(found.bundle)


def _bundle_lines(bundle: BundleReport) -> Iterator[str]:
    yield from _heading(f"{bundle.path}: {bundle.title}")
    yield _row("graphs", ", ".join(bundle.precisions))
    yield _row("engines", "" if bundle.engines else "none: make them with ddexport trt")
    for build in bundle.engines:
        state = _mark(build.fits, "runs here" if build.fits else "does not run here")
        roles = "; ".join(f"{role} {', '.join(sizes)}" for role, sizes in build.roles.items())
        yield f"    {build.folder}, {build.precision}, {roles}: {state}"
        yield from (
            f"      - {text}" for text in (*build.misfits, *build.lacking, *build.doubts, *build.notes)
        )
        if build.rebuild:
            yield f"      rebuild: {build.rebuild}"
    for text in bundle.damaged:
        yield _row("damaged", click.style(text, fg="red"))
    yield _row("auto takes", bundle.auto or click.style("nothing: no engine can run it here", fg="red"))
    if bundle.why:
        yield _row("", f"because it is {bundle.why}")
    for way in bundle.ways:
        mark = "yes" if way.usable else "ask" if way.on_request else "no "
        measured = [] if way.total_ms is None else [f"{way.total_ms:.4g} ms, {way.verdict}"]
        said = "; ".join([*measured, *([way.reasons] if way.reasons else [])])
        yield f"    {_mark(way.usable, mark)}  {way.name}" + (f": {said}" if said else "")
    if any(way.on_request for way in bundle.ways):
        yield "    ask: runs if it is named with --backend or --precision"


def _details(found: Diagnosis) -> dict[str, str]:
    """What is worth knowing of a package beside its version."""
    return {
        "onnxruntime": f"  providers: {', '.join(found.providers)}",
        "openvino": f"  computes in: {', '.join(found.openvino_precisions)}",
    }


def _heading(text: str) -> Iterator[str]:
    yield ""
    yield click.style(text, bold=True)


def _row(name: str, text: str) -> str:
    return f"  {name:<{WIDTH}}{text}".rstrip()


def _mark(good: bool, text: str) -> str:
    return click.style(text, fg="green" if good else "yellow")


def _install(problem: str) -> str:
    return problem.partition(": ")[2] or problem


EPILOG = """
\b
Examples:
  ddexport doctor
  ddexport doctor build/var-d16 --json
  ddexport doctor build/var-d16 --check --backend openvino --precision int8
"""


@click.command(name="doctor", cls=console.Command, epilog=EPILOG)
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option(
    "--check", "checked", is_flag=True, help="Draw what PyTorch drew (parity/golden.npz), and compare."
)
@click.option("--backend", metavar="NAME", help="The engine to check.  [default: auto]")
@click.option("--precision", metavar="NAME", help="The precision to check.  [default: the engine's]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@console.debug_option
def command(
    bundle: Path | None, checked: bool, backend: str | None, precision: str | None, as_json: bool
) -> None:
    """Say what this machine has to run bundles with, and what BUNDLE would run on and why.

    Ends with 1 if the bundle is bad, else with 0, whatever is missing. With --check the bundle draws instead
    what PyTorch drew when its parity was proven, without PyTorch: exit code 3 if a limit is passed.
    """
    if checked:
        if bundle is None:
            raise click.UsageError("--check needs a BUNDLE.")
        _check(bundle, backend or "auto", precision, as_json)
        return
    if backend or precision:
        raise click.UsageError("--backend and --precision belong to --check.")
    found = diagnose(Machine(), bundle)
    if as_json:
        console.emit_json(found)
    else:
        click.echo("\n".join(lines(found)))
    if found.bundle and found.bundle.damaged:
        raise BundleError(
            f"{bundle} has damaged engines: {'; '.join(found.bundle.damaged)}",
            f"Remove them, or build them again: ddexport trt {bundle} --force",
        )


def _check(bundle: Path, backend: str, precision: str | None, as_json: bool) -> None:
    from ddexport.runtime.check import check, read_golden
    from ddexport.runtime.pipeline import load

    golden = read_golden(bundle)
    with load(bundle, backend, precision=precision) as pipe:
        with console.stage(
            f"drawing {len(golden.seeds)} images in {len(golden.steps)} schedules", keep=False
        ):
            checks = check(pipe, golden)
        name = f"{pipe.backend.name} in {pipe.precision}"
    if as_json:
        console.emit_json({"backend": name, "checks": [vars(one) for one in checks]})
    else:
        for one in checks:
            title = (
                one.steps if one.steps == "teacher" else f"{one.steps} step{'s' if one.steps != '1' else ''}"
            )
            figures = f"{one.images - one.left_out} of {one.images} images with equal tokens"
            verdict = "FAIL: " + "; ".join(one.faults) if one.faults else "ok"
            click.echo(
                f"  {title:10}{figures}, PSNR {one.psnr:.1f} dB, 8-bit difference {one.largest}  {verdict}"
            )
    failed = [one.steps for one in checks if one.faults]
    if failed:
        raise VerificationError(
            f"{name} does not draw what PyTorch drew, in steps: {', '.join(failed)}",
            "Try another --backend or --precision; `validate parity` says more, where PyTorch is.",
        )
    if not as_json:
        click.echo(f"{name} draws what PyTorch drew")


if __name__ == "__main__":
    command()
