"""Up to when nothing is missing here, and for how long nothing new has been proven.

A proof names a time by the clock of whoever made it, and any clock can be set. So how old a proof is counts from when
it came, by a clock that nobody sets; and the newest one counts, be it of an earlier time.

Layer: core. May import: nothing.
"""

import time
from dataclasses import dataclass


@dataclass
class Proof:
    """What is proven of the history.

    Attributes:
        until: seconds since 1970 up to which nothing is missing, never later than it was here when that was told; 0 if
            nothing is proven, as behind a fork, which may have cut off what was.
    """

    until: float = 0.0
    _told: float = 0.0
    _known: float = 0.0  # told last, but for 0
    _counted: float = 0.0  # as new, last
    _counted_at: float | None = None

    def tell(self, until: float, now: float) -> None:
        """Take what the broker tells, again and again, at `now` in the loop's time.

        One counts as new that is later than the one before it. Not so the first of an earlier time: a failover goes
        back to a proof of before, too, and nobody needs to live for that. Nor the one that counted last: two brokers
        of which now one is found and now the other prove nothing.
        """
        if until == self._told:
            return
        clock = time.time()
        self._told, self.until = until, min(until, clock)
        if not until:
            return
        known, self._known = self._known, until
        if not known:
            self._begin(until, now, clock)
        elif until > known and until != self._counted:
            self._counted, self._counted_at = until, now

    def _begin(self, until: float, now: float, clock: float) -> None:
        """How old it is that is met at the start only the clocks can say; what is of the future says nothing."""
        if until <= clock:
            self._counted, self._counted_at = until, now - (clock - until)
        else:
            self.until = 0.0

    def age(self, now: float) -> float | None:
        """Seconds since something new was proven, or None if nothing is."""
        return now - self._counted_at if self.until and self._counted_at is not None else None
