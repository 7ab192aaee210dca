"""`realtime-bridge` in this process, which saves the time that a start takes."""

import logging

import pytest

from realtime_bridge.cli import main


class CommandLine:
    """Runs `realtime-bridge` in this process: what an operator types, and what it answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, standard output and standard error."""
        self._monkeypatch.setattr("sys.argv", ["realtime-bridge", *arguments])
        root = logging.getLogger()
        handlers = root.handlers.copy()
        try:
            with pytest.raises(SystemExit) as caught:
                main()
        finally:
            root.handlers[:] = handlers  # a process would have ended with those that it has added
        output = self._capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err
