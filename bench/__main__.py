"""`make bench`: every figure that the documentation quotes, measured on this machine.

`python -m bench [latency] [sinks] [deciding] [drain] [reconnect]` runs some of them.
"""

import asyncio
import importlib
import platform
import sys
from importlib.metadata import version

BENCHES = ("latency", "sinks", "deciding", "drain", "reconnect")


def main() -> None:
    chosen = sys.argv[1:] or BENCHES
    for name in chosen:
        if name not in BENCHES:
            sys.exit(f"no bench named {name}; there are: {', '.join(BENCHES)}")
    packages = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "uvloop", "redis", "asyncpg", "psycopg"))
    print(f"Python {platform.python_version()} on {platform.machine()}, {packages}")
    for name in chosen:
        module = importlib.import_module(f"bench.{name}")
        print(f"\n== {name}: {(module.__doc__ or '').splitlines()[0]}")
        outcome = module.main()
        if outcome is not None:
            asyncio.run(outcome)


if __name__ == "__main__":
    main()
