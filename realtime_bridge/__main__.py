"""`python -m realtime_bridge` is `realtime-bridge`."""

from realtime_bridge.cli import main

main()
