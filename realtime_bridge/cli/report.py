"""What `realtime-bridge check` does: run the checks, and print what they have found."""

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Final

import orjson
from rich.console import Console
from rich.text import Text

from realtime_bridge.checks import Finding, apply_fixes, failed, run_checks
from realtime_bridge.checks.finding import Status
from realtime_bridge.errors import ConfigurationError
from realtime_bridge.settings import Settings

_COUNTED: Final[dict[Status, str]] = {
    "problem": "to mend",
    "warning": "to know",
    "skipped": "not looked at",
    "ok": "in order",
}
_STYLES: Final = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}
_INDENT: Final = 9


def report(*, as_json: bool, fix: bool) -> int:
    """Look, mend if told to, print what was found: the exit status.

    Raises:
        ConfigurationError: the settings do not suffice to look; as JSON, it is a finding like any other.
    """
    try:
        settings = Settings.load()
    except ConfigurationError as error:
        if not as_json:
            raise
        _print_json([Finding("settings", "problem", str(error))], [])
        return 2
    logging.getLogger().addHandler(logging.NullHandler())  # what is wrong is told once, as a finding
    done, findings = asyncio.run(_look(settings, fix=fix))
    if as_json:
        _print_json(findings, done)
    else:
        _print_report(findings, done)
    return 1 if failed(findings) else 0


async def _look(settings: Settings, *, fix: bool) -> tuple[list[str], list[Finding]]:
    done, failures = await apply_fixes(settings) if fix else ([], [])
    return done, failures + await run_checks(settings)


def _print_json(findings: Sequence[Finding], done: Sequence[str]) -> None:
    document = {"ok": not failed(findings), "findings": [asdict(finding) for finding in findings], "done": done}
    print(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode())


def _print_report(findings: Sequence[Finding], done: Sequence[str]) -> None:
    """Problems are told last, where a reader of a terminal looks first."""
    console = Console(highlight=False, soft_wrap=True)
    for statement in done:
        console.print(Text.assemble(("done".ljust(_INDENT), "bold green"), statement))
    for status in reversed(_COUNTED):
        for name, detail, remedy in _lines(findings, status):
            console.print(Text.assemble((status.ljust(_INDENT), _STYLES[status]), (name, "bold"), f": {detail}"))
            if remedy:
                console.print(Text(f"{'':{_INDENT}}{remedy}", style="cyan"))
    counts = Counter(finding.status for finding in findings)
    console.print(", ".join(f"{counts[status]} {words}" for status, words in _COUNTED.items() if counts[status]) + ".")


def _lines(findings: Sequence[Finding], status: Status) -> list[tuple[str, str, str]]:
    """Name, detail and fix of the findings of a status; what was skipped for the same reason is one line."""
    chosen = [finding for finding in findings if finding.status == status]
    if status != "skipped":
        return [(finding.name, finding.detail, finding.fix) for finding in chosen]
    reasons: dict[str, list[str]] = {}
    for finding in chosen:
        reasons.setdefault(finding.detail, []).append(finding.name)
    return [(", ".join(names), reason, "") for reason, names in reasons.items()]
