"""The sample schema: roles, `auth` functions and `public.posts` as a Supabase project has them.

Layer: whole (dev). May import: nothing of this package.
"""

from pathlib import Path

import asyncpg

SCHEMA = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")


async def install_schema(dsn: str) -> None:
    """Install the sample schema into a database, as its superuser. May be repeated; all of it or nothing."""
    connection = await asyncpg.connect(dsn)
    try:
        async with connection.transaction():
            await connection.execute(SCHEMA)
    finally:
        await connection.close()
