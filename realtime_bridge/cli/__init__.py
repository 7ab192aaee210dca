"""The command line: `realtime-bridge serve | dev | check | why | token | tail | teardown`.

Exit status: 0 done, 1 it failed, or has found what is wrong, 2 bad usage or configuration (typer's own word for bad
usage, too).
"""

import sys

import typer

from realtime_bridge.cli import check, dev, serve, tail, teardown, token, why
from realtime_bridge.errors import BridgeError, ConfigurationError

cli = typer.Typer(
    name="realtime-bridge",
    help="One subscription upstream, any number of browsers, each seeing exactly what row-level security shows it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (serve.serve, dev.dev, check.check, why.why, token.token, tail.tail, teardown.teardown):
    cli.command()(command)


def main() -> None:
    """Run the command line; errors of ours become one sentence and an exit status."""
    try:
        cli()
    except ConfigurationError as error:
        print(f"realtime-bridge: {error}", file=sys.stderr)
        sys.exit(2)
    except BridgeError as error:
        print(f"realtime-bridge: {error}", file=sys.stderr)
        sys.exit(1)
