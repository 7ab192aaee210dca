"""One bridge of `realtime-bridge dev`, in a process of its own: what `serve` runs, and the page with its sample users.

The parent made the listening socket, so both know the port, nobody else can take it meanwhile, and who connects early
waits; that the bridge can do its job is told by `/readyz` alone.

Run as `python -m realtime_bridge.dev.app FILE-DESCRIPTOR USERS`, with settings in the environment.

Layer: whole (dev). May import: everything.
"""

import socket
import sys
from collections.abc import Sequence
from functools import partial

from fastapi import APIRouter, FastAPI, Response
from fastapi.responses import JSONResponse

from realtime_bridge import __version__, logs
from realtime_bridge.bridge import Bridge
from realtime_bridge.dev.users import SampleUser, sample_users
from realtime_bridge.errors import BridgeError
from realtime_bridge.rest import application
from realtime_bridge.routes import live_page
from realtime_bridge.server import BridgeServer, server_config
from realtime_bridge.settings import Settings


def create_app(settings: Settings, users: Sequence[SampleUser]) -> FastAPI:
    """The application of `serve`, with the page open to everyone and a way for it to sign in as the sample users."""
    bridge = Bridge(settings)
    app = FastAPI(title="realtime_bridge dev", version=__version__, lifespan=bridge.lifespan)
    app.include_router(_dev_router(settings, users))  # first: its page comes before the guarded one
    app.include_router(bridge.router)
    application.install(app, bridge.allows)
    return app


def _dev_router(settings: Settings, users: Sequence[SampleUser]) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    assert settings.supabase_jwt_secret is not None, "dev chooses one"
    secret = settings.supabase_jwt_secret.get_secret_value()

    @router.get("/")
    async def page() -> Response:
        return live_page(users="dev/users.json")

    @router.get("/dev/users.json")
    async def sample() -> Response:
        return JSONResponse([user.describe(secret) for user in users], headers={"Cache-Control": "no-store"})

    return router


def main(file_descriptor: int, users: int) -> None:
    """Serve until SIGTERM."""
    logs.configure()
    settings = Settings.load(env_file=None)
    config = server_config(settings, host="127.0.0.1", port=0)
    config.app = partial(create_app, settings, sample_users(users))
    with socket.socket(fileno=file_descriptor) as listener:
        BridgeServer(config).run(sockets=[listener])


if __name__ == "__main__":
    try:
        main(*map(int, sys.argv[1:]))
    except BridgeError as error:
        sys.exit(str(error))
