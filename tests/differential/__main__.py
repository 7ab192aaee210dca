"""`make fuzz`: the differential test with one new seed after another, until its time is over or one of them fails."""

import argparse
import asyncio
import logging
import random
import time
from pathlib import Path

import psycopg

from realtime_bridge.dev.engines import EmbeddedPostgres
from realtime_bridge.dev.schema import install_schema
from tests.differential.comparison import compare_all
from tests.services import drop_database

_NAME = "fuzz"


def main() -> int:
    """Exit status 1 if a seed fails, which is then named."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long to go on; 0: until interrupted")
    parser.add_argument("--seed", type=int, help="the first seed; each further one is one more")
    parser.add_argument("--postgres", type=Path, help="the folder of another Postgres' programs")
    options = parser.parse_args()
    seed = random.randrange(2**32) if options.seed is None else options.seed
    until = time.monotonic() + options.minutes * 60 if options.minutes else float("inf")
    logging.disable()  # tables that are refused, again and again
    with EmbeddedPostgres(bin_dir=options.postgres) as server:
        while time.monotonic() < until:
            if not fuzz(server, seed):
                return 1
            seed += 1
    return 0


def fuzz(server: EmbeddedPostgres, seed: int) -> bool:
    """One round; whether the engine agreed with Postgres."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"create database {_NAME}".encode())
        try:
            asyncio.run(install_schema(server.dsn(_NAME)))
            tally = asyncio.run(compare_all(server.dsn(_NAME), _NAME, seed))
        finally:
            drop_database(admin, _NAME)
    print(f"DIFFERENTIAL_SEED={seed}: {tally}", flush=True)
    return not tally.mismatches


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(0) from None
