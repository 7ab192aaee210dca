"""What `client.js` does with what it is told, in Node: see tests/browser/node/client.test.mjs."""

import shutil
import subprocess
from pathlib import Path

from tests.services import unavailable

TESTS = Path(__file__).parents[1] / "browser/node/client.test.mjs"


def test_the_client_folds_resumes_and_retries_as_it_should() -> None:
    node = shutil.which("node")
    if node is None:
        unavailable("Node.js is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    if int(version.removeprefix("v").split(".")[0]) < 20:
        unavailable(f"Node.js 20 or newer is needed, and this is {version.strip()}")
    run = subprocess.run([node, "--test", str(TESTS)], capture_output=True, text=True, check=False, timeout=50)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
