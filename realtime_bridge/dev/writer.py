"""The writer: keeps the sample table moving, about one change a second, so that there is something to see.

It writes as the sample users, under row-level security, and changes its own rows only: what a person posts stays.

Layer: whole (dev). May import: errors, database, dev.users.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Final, NoReturn

from realtime_bridge.database import Database
from realtime_bridge.dev.users import SampleUser
from realtime_bridge.errors import BridgeError

FEWEST_ROWS: Final = 2
MOST_ROWS: Final = 6
"""Rows of one user, so that the page shows them all and the table never grows."""

_QUALITIES: Final = ("quiet", "crooked", "famous", "leaky", "night", "floating", "second-hand", "northern", "borrowed")
_THINGS: Final = ("kettle", "ferry", "library", "garden", "bicycle", "lighthouse", "bakery", "train", "umbrella")
_NEWS: Final = (
    "Open again since this morning.",
    "Needs new paint, somebody ought to see to it.",
    "Full to the last seat at nine.",
    "Smells of rain.",
    "Runs ten minutes late, as ever.",
    "Made somebody's day.",
    "Quieter than it used to be.",
    "Found behind the shed.",
)


class Step(Enum):
    """One change of one row."""

    WRITE = auto()
    EDIT = auto()
    TURN = auto()
    """Publish what is hidden, hide what is public."""
    DELETE = auto()


def next_step(rows: int, dice: random.Random) -> Step:
    """What a user with so many rows does next; the number of rows stays within its bounds."""
    if rows < FEWEST_ROWS:
        return Step.WRITE
    steps = {Step.WRITE: 3, Step.EDIT: 4, Step.TURN: 3, Step.DELETE: 2}
    if rows >= MOST_ROWS:
        del steps[Step.WRITE]
    elif rows == FEWEST_ROWS:
        del steps[Step.DELETE]
    return dice.choices(list(steps), list(steps.values()))[0]


class Writer:
    """Writes as the users.

    Args:
        database: entered, and open to `set role`.
        pause: seconds between two changes, on average.
    """

    def __init__(self, database: Database, users: Sequence[SampleUser], *, pause: float = 1.0) -> None:
        self._database = database
        self._pause = pause
        self._dice = random.Random()
        self._rows: Mapping[SampleUser, list[int]] = {user: [] for user in users}

    async def begin(self) -> None:
        """Write the first rows of everyone, a public and a private one each."""
        for user in self._rows:
            for is_public in (True, False):
                await self._write(user, is_public=is_public)

    async def run(self) -> NoReturn:
        """Make one change after another, until cancelled; what Postgres refuses is left undone."""
        while True:
            await asyncio.sleep(self._dice.uniform(0.5, 1.5) * self._pause)
            try:
                await self.change_something()
            except BridgeError:
                continue

    async def change_something(self) -> Step:
        """Make one change, as a user chosen at random."""
        user = self._dice.choice(list(self._rows))
        rows = self._rows[user]
        step = next_step(len(rows), self._dice)
        match step:
            case Step.WRITE:
                await self._write(user, is_public=self._dice.random() < 0.5)
            case Step.EDIT:
                await self._change(user, "update public.posts set body = $2 where id = $1", self._dice.choice(_NEWS))
            case Step.TURN:
                await self._change(user, "update public.posts set is_public = not is_public where id = $1")
            case Step.DELETE:
                row = self._dice.choice(rows)
                await self._execute(user, "delete from public.posts where id = $1", row)
                rows.remove(row)
        return step

    async def _write(self, user: SampleUser, *, is_public: bool) -> None:
        title = f"The {self._dice.choice(_QUALITIES)} {self._dice.choice(_THINGS)}"
        statement = "insert into public.posts (title, body, is_public) values ($1, $2, $3) returning id"
        async with self._database.transaction_as(user.claims) as connection:
            row = await connection.fetchval(statement, title, self._dice.choice(_NEWS), is_public)
        self._rows[user].append(row)

    async def _change(self, user: SampleUser, statement: str, *values: object) -> None:
        row = self._dice.choice(self._rows[user])
        if await self._execute(user, statement, row, *values) == "UPDATE 0":
            self._rows[user].remove(row)  # a person has deleted it

    async def _execute(self, user: SampleUser, statement: str, *values: object) -> str:
        async with self._database.transaction_as(user.claims) as connection:
            return await connection.execute(statement, *values)
