"""How a clock that differs from ours is judged.

Layer: whole. May import: checks.finding.
"""

from typing import Final

from realtime_bridge.checks.finding import Outcome, ok, warning

MOST_SECONDS: Final = 1.0


def clock_outcome(whose: str, offset: float) -> Outcome:
    """A finding about a clock.

    Args:
        whose: of what.
        offset: seconds by which it is ahead of this machine's.
    """
    if abs(offset) <= MOST_SECONDS:
        return ok(f"The clocks of {whose} and this machine agree.")
    direction = "ahead of" if offset > 0 else "behind"
    return warning(
        f"The clock of {whose} is {abs(offset):.1f} s {direction} this machine's: tokens end, and `complete_until` "
        "stands, too early or too late; synchronise both (NTP)."
    )
