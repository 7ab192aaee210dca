"""A finding: what one check says, and how checks become findings.

Layer: whole. May import: nothing of this package.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypeVarTuple

Status: TypeAlias = Literal["ok", "warning", "problem", "skipped"]

Ts = TypeVarTuple("Ts")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check found.

    Attributes:
        detail: one sentence a person can act on; holds no secret.
        fix: the SQL (it ends with a semicolon), Redis command or setting that mends it; empty if nothing needs mending
            or only a person can.
    """

    status: Status
    detail: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """An outcome with its name: the check's own, then what it looked at (`published public.posts`)."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def ok(detail: str) -> Outcome:
    """Nothing to do."""
    return Outcome("ok", detail)


def warning(detail: str, fix: str = "") -> Outcome:
    """Changes arrive, but something is worth knowing before it hurts."""
    return Outcome("warning", detail, fix)


def problem(detail: str, fix: str = "") -> Outcome:
    """Some change does not arrive, or the bridge does not start."""
    return Outcome("problem", detail, fix)


def softened(outcome: Outcome) -> Outcome:
    """The same as a warning at most."""
    return replace(outcome, status="warning") if outcome.status == "problem" else outcome


def find(checks: Sequence[Callable[[*Ts], Outcome | None]], *about: *Ts, of: str = "") -> list[Finding]:
    """Run checks over the same facts. One that returns None does not apply.

    Args:
        checks: functions; their names become those of the findings.
        *about: the facts.
        of: what the facts are about, if there are several of it.
    """
    outcomes = ((_name(check, of), check(*about)) for check in checks)
    return [named(name, outcome) for name, outcome in outcomes if outcome is not None]


def skip(checks: Iterable[Callable[..., object]], because: str, *, of: str = "") -> list[Finding]:
    """Say of checks that they could not run."""
    return [Finding(_name(check, of), "skipped", because) for check in checks]


def named(name: str, outcome: Outcome) -> Finding:
    """An outcome as the finding of that name."""
    return Finding(name, outcome.status, outcome.detail, outcome.fix)


def failed(findings: Iterable[Finding]) -> bool:
    """Whether one of them is a problem."""
    return any(finding.status == "problem" for finding in findings)


def _name(check: Callable[..., object], of: str) -> str:
    return f"{check.__name__} {of}".rstrip()
