"""A FastAPI application of one's own that carries a bridge inside.

    DATABASE_URL=… SUPABASE_JWT_SECRET=… uvicorn examples.own_app:app \
        --ws realtime_bridge.transports.uvicorn_protocol:BridgeWebSocketProtocol \
        --http realtime_bridge.transports.uvicorn_protocol:BridgeHttpProtocol --no-access-log

Without `--ws` and `--http` everything works too, a little slower.
"""

from typing import Annotated

from fastapi import Depends, FastAPI

from realtime_bridge.auth import require_claims
from realtime_bridge.bridge import Bridge
from realtime_bridge.claims import Claims
from realtime_bridge.settings import Settings

bridge = Bridge(Settings.load())
app = FastAPI(title="my application", lifespan=bridge.lifespan)
app.include_router(bridge.router)


@app.get("/whoami")
async def whoami(claims: Annotated[Claims, Depends(require_claims(bridge.verifier))]) -> dict[str, str | None]:
    """An endpoint of the application, behind the bridge's own token check."""
    return {"sub": claims.subject, "role": claims.role}
