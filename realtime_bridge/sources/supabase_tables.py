"""Tables as they stand, read through a project's PostgREST with the service key: where there is no DATABASE_URL.

What it cannot tell is how Realtime will describe a table, so a table is read from its first change on.

Layer: adapters. May import: words, sources.{base,supabase_texts}.
Sources: PostgREST's reference of tables and views; Supabase's projects answer at most 1,000 rows, whatever is asked.
"""

import json
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

import httpx

from realtime_bridge.change import ABSENT, Image, Relation, Value
from realtime_bridge.errors import SourceError
from realtime_bridge.sources.base import Page
from realtime_bridge.sources.supabase_texts import to_text

FIRST_ROWS: Final = 50
MOST_ROWS: Final = 1_000
_ENOUGH_BYTES: Final = 1 << 20
_TIMEOUT: Final = 10.0
_MARGIN: Final = 30_000_000
"""By so much, in microseconds, the clocks of this machine and of the project may differ without harm."""

Condition = tuple[str, str]


class SupabaseTables:
    """Reads tables over HTTP; see `TableReader`.

    Args:
        url: the project's address.
        key: its service key.
    """

    def __init__(self, url: str, key: str) -> None:
        self._url = url.rstrip("/") + "/rest/v1/"
        self._headers = {"apikey": key, "Authorization": f"Bearer {key}"}

    async def describe(self, table: str) -> Relation | None:
        """See `TableReader.describe`: only the source can tell."""
        return None

    async def pages(self, relation: Relation) -> AsyncGenerator[Page, None]:
        """See `TableReader.pages`."""
        async with self._client(relation) as client:
            behind: Sequence[str] = ()
            limit = FIRST_ROWS
            while True:
                records, size = await self._behind(client, relation, behind, limit)
                if not records:
                    return
                rows = [_image(relation, record) for record in records]
                yield Page(rows, time.time_ns() // 1000 + _MARGIN)
                behind = _texts(relation.key_of(rows[-1]))
                # A page stays near `_ENOUGH_BYTES`, as far as the rows of the last one tell.
                limit = max(1, min(MOST_ROWS, limit * 2, len(rows) * _ENOUGH_BYTES // size))

    async def rows(self, relation: Relation, keys: Sequence[Sequence[str]]) -> list[Image]:
        """See `TableReader.rows`. What is asked for is more than the keys, if those have several columns."""
        names = [relation.columns[i].name for i in relation.key]
        columns = zip(names, zip(*keys, strict=True), strict=True)
        query = [(name, f"in.({','.join(map(_item, sorted(set(texts))))})") for name, texts in columns]
        async with self._client(relation) as client:
            records, answer = await self._get(client, relation.table, query, prefer="count=exact")
        if not answer.headers.get("Content-Range", "").endswith(f"/{len(records)}"):
            raise SourceError(f"PostgREST does not show all rows of {relation.name} that were asked for")
        if any(record.keys() != relation.index.keys() for record in records):
            raise SourceError(f"{relation.name} has other columns than its changes had")
        wanted = set(map(tuple, keys))
        return [row for row in (_image(relation, record) for record in records) if relation.key_of(row) in wanted]

    def _client(self, relation: Relation) -> httpx.AsyncClient:
        headers = httpx.Headers({**self._headers, "Accept-Profile": relation.schema}, encoding="utf-8")
        return httpx.AsyncClient(base_url=self._url, headers=headers, timeout=_TIMEOUT)

    async def _behind(
        self, client: httpx.AsyncClient, relation: Relation, behind: Sequence[str], limit: int
    ) -> tuple[list[dict[str, Any]], int]:
        """The next rows in the order of their keys, and the bytes that they came in."""
        for conditions in _ranges([relation.columns[i].name for i in relation.key], behind):
            records, answer = await self._get(client, relation.table, [*conditions, ("limit", str(limit))])
            if records:
                return records, len(answer.content)
        return [], 0

    async def _get(
        self, client: httpx.AsyncClient, table: str, query: Sequence[Condition], *, prefer: str = ""
    ) -> tuple[list[dict[str, Any]], httpx.Response]:
        try:
            headers = {"Prefer": prefer} if prefer else None
            answer = await client.get(quote(table, safe=""), params=list(query), headers=headers)
            answer.raise_for_status()
            return json.loads(answer.content), answer
        except httpx.HTTPStatusError as error:
            raise SourceError(f"PostgREST answers {error.response.status_code} for {table}") from None
        except (httpx.HTTPError, ValueError) as error:
            raise SourceError(f"PostgREST cannot be read: {type(error).__name__}") from None


def _ranges(keys: Sequence[str], behind: Sequence[str]) -> Iterator[list[Condition]]:
    """The rows behind a key, as ranges that a list of conditions can name, nearest first.

    Behind (a, b) lie those with the same a and a greater b, and then those with a greater a.
    """
    if not behind:
        yield [("order", ",".join(keys))]
        return
    for same in range(len(keys) - 1, -1, -1):
        equal = [(name, f"eq.{text}") for name, text in zip(keys[:same], behind, strict=False)]
        yield [*equal, (keys[same], f"gt.{behind[same]}"), ("order", ",".join(keys[same:]))]


def _item(text: str) -> str:
    """An item of a list as a filter writes it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _image(relation: Relation, record: Mapping[str, Any]) -> Image:
    return tuple(_text(c.type, record[c.name]) if c.name in record else ABSENT for c in relation.columns)


def _text(type_: str, value: Any) -> Value:
    """A value's text; ABSENT if it cannot be had from JSON."""
    try:
        return value if type_ == "bytea" else to_text(type_, value)  # which only Realtime takes its prefix off
    except (ArithmeticError, TypeError, ValueError):
        return ABSENT


def _texts(key: Sequence[Value]) -> Sequence[str]:
    if not all(isinstance(text, str) for text in key):
        raise SourceError("PostgREST shows rows without their key")
    return [text for text in key if isinstance(text, str)]
