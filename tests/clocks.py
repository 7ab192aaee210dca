"""A wall clock that a test can set while a program runs by it."""

import time
from pathlib import Path


class Clock:
    """Planted in a process it is what that process takes for the time; of the same folder everywhere."""

    def __init__(self, folder: Path) -> None:
        self._offset = folder / "offset"

    def __call__(self) -> None:
        true_time = time.time
        time.time = lambda: true_time() + (float(self._offset.read_text()) if self._offset.exists() else 0.0)

    def jump(self, seconds: float) -> None:
        """Set the clock, so many seconds from what is true."""
        new = self._offset.with_suffix(".new")
        new.write_text(str(seconds))
        new.replace(self._offset)
