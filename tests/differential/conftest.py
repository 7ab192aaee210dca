"""Says at the end of the run which seed was tried and how much was compared."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "differential" and report.when == "call":
                    terminalreporter.write_line(str(value))
