"""The application that `realtime-bridge serve` runs: a bridge and nothing else.

Layer: whole.
"""

from fastapi import FastAPI

from realtime_bridge import __version__
from realtime_bridge.bridge import Bridge
from realtime_bridge.rest import application
from realtime_bridge.settings import Settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """A FastAPI application that carries one bridge.

    Raises:
        ConfigurationError: a setting is missing or wrong.
    """
    bridge = Bridge(settings or Settings.load())
    app = FastAPI(title="realtime_bridge", version=__version__, lifespan=bridge.lifespan)
    app.include_router(bridge.router)
    application.install(app, bridge.allows)
    return app
