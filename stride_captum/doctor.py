"""Check of an installation: what is there, whether it works, and what that does not say.

It needs no extra. The methods are fitted on planted data and asked for most of the laws of the conformance
suite, in about ten seconds. `python -m stride_captum.doctor` does the same as `stride-captum doctor`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from tqdm.auto import tqdm

from .conformance import CHECKS, Subject, missing_extra, run_check, shipped
from .conformance.toy_problems import MLP, trained
from .influence.chance import at_chance
from .stride import STRIDE
from .system.packages import EXTRAS, PACKAGE, Finding, check_packages, requirements, version

_REPORT = "Reinstall the package; if it stays so, report it with the output of `stride-captum doctor --json`."
#: Laws that take longer than all others together.
LEFT_OUT = ("the_batch_size_changes_rounding_only", "the_block_size_changes_rounding_only")


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        versions: Of Python, this package, what it needs and what there is of the extras.
        devices: "cpu" and the accelerators that torch sees.
        findings: One per package that is broken, extra, training, accelerator and method.
        not_covered: What an `ok` says nothing of.
        seconds: How long it took.
    """

    versions: dict[str, str]
    devices: list[str]
    findings: list[Finding]
    not_covered: list[str]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return all(finding.status != "broken" for finding in self.findings)

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        broken = [finding.what for finding in self.findings if finding.status == "broken"]
        outcome = "Everything that was checked works" if self.ok else f"Broken: {', '.join(broken)}"
        return "\n".join(
            [
                textwrap.fill(", ".join(f"{name} {found}" for name, found in self.versions.items()), 110),
                f"devices: {', '.join(self.devices)}",
                "",
                *map(str, self.findings),
                "",
                "Not covered:",
                *(f"- {text}" for text in self.not_covered),
                "",
                f"{outcome} ({self.seconds:.1f} s).",
            ]
        )


def diagnose(subjects: Iterable[Subject] | None = None, *, show_progress: bool = False) -> Diagnosis:
    """Look at the packages, the extras, the accelerators and the methods.

    Args:
        subjects: The methods; None takes those that ship.
        show_progress: Whether to show a bar over the methods.

    >>> diagnosis = diagnose([])
    >>> diagnosis.ok, diagnosis.devices[0]
    (True, 'cpu')
    """
    started = time.perf_counter()
    found = [*check_packages(), check_training(), *map(check_device, accelerators())]
    bar = tqdm(list(shipped() if subjects is None else subjects), desc="methods", disable=not show_progress)
    found += map(check_method, bar)
    needed = [requirement.name for requirement in requirements()]
    useful = [requirement.name for extra in EXTRAS for requirement in requirements(extra)]
    versions = {name: version(name) or "missing" for name in (PACKAGE, *needed)}
    versions |= {name: there for name in useful if (there := version(name))}
    return Diagnosis(
        versions={"python": platform.python_version(), **versions},
        devices=["cpu", *accelerators()],
        findings=found,
        not_covered=not_covered(found),
        seconds=time.perf_counter() - started,
    )


def check_training() -> Finding:
    """Whether a network learns the planted data: scores of one that has learned nothing mean nothing."""
    model, train, _ = trained(MLP)
    x, y = train.tensors
    with torch.no_grad():
        predicted = model(x).argmax(1)
    why = at_chance(predicted, y)
    if why is not None:
        detail = f"the network of the checks has learned nothing: {why}"
        return Finding("training", "broken", detail, "Reinstall torch; what follows says nothing until then.")
    share = float((predicted == y).double().mean())
    return Finding("training", "ok", f"a small network is right for {share:.0%} of its training examples")


def check_device(device: str) -> Finding:
    """Whether STRIDE gives on an accelerator what it gives on the CPU."""
    model, train, test = trained(MLP)
    remedy = "Check that this build of torch fits the driver; until then pass device='cpu'."
    try:
        wanted = STRIDE(model, train).influence(test.tensors)
        scores = STRIDE(model, train, device=device).influence(test.tensors).cpu()
    except Exception as error:
        return Finding(device, "broken", f"{type(error).__name__}: {error}".rstrip("."), remedy)
    gap = float((scores - wanted).abs().max() / wanted.abs().max())
    if not gap < 1e-3:
        return Finding(device, "broken", f"scores differ from the CPU's by {gap:.1e} of the largest", remedy)
    return Finding(device, "ok", f"scores are the CPU's, up to {gap:.0e} of the largest")


def check_method(subject: Subject) -> Finding:
    """Whether a method keeps its laws on planted data."""
    missing = missing_extra(subject.build)
    if missing is not None:
        return Finding(subject.name, "absent", missing.rstrip("."))
    laws = [law for law in CHECKS if law not in LEFT_OUT and law not in subject.exceptions]
    for law in laws:
        outcome = run_check(CHECKS[law], subject.build)
        if outcome != "pass":
            why = outcome.removeprefix("fail: ").rstrip(".")
            return Finding(subject.name, "broken", f"{law.replace('_', ' ')}? No: {why}", _REPORT)
    return Finding(subject.name, "ok", f"keeps {len(laws)} laws on planted data")


def not_covered(findings: Sequence[Finding]) -> list[str]:
    """What the findings say nothing of."""
    left_out = ", ".join(law.replace("_", " ") for law in LEFT_OUT)
    absent = ", ".join(finding.what for finding in findings if finding.status == "absent")
    return [
        f"what is not installed: {absent}" if absent else "what is not installed: nothing",
        "the laws that take longest: " + left_out + " (`python -m stride_captum.conformance`)",
        "settings other than the defaults, trained operators among them, and wrapped classes of Captum",
        "methods other than STRIDE on an accelerator" if accelerators() else "accelerators: torch sees none",
        "time and memory at the size of your data: 48 planted examples were used",
        "whether your model has learned its training set (`stride-captum explain` says so)",
        "whether scores predict retraining on your task (`stride-captum compare`)",
    ]


def accelerators() -> list[str]:
    """The accelerators that torch sees, as it names them."""
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] + mps


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the diagnosis; 0 where nothing is broken, otherwise 1.

    Args:
        arguments: Of the command line: `--json` or nothing.
    """
    parser = argparse.ArgumentParser(prog="stride-captum doctor", description="Check the installation.")
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON")
    as_json = parser.parse_args(arguments).json
    diagnosis = diagnose(show_progress=not as_json)
    print(json.dumps(diagnosis.to_dict(), indent=1) if as_json else diagnosis)
    return 0 if diagnosis.ok else 1


if __name__ == "__main__":
    sys.exit(main())
