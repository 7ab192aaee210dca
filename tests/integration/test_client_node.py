"""What `client.js` does with what it is told, in Node.js: see tests/browser/node/client.test.mjs."""

import subprocess
from pathlib import Path

import playwright

from tests.services import unavailable

NODE = Path(playwright.__file__).parent / "driver/node"
"""The one that Playwright brings with it, so that none has to be installed."""
TESTS = Path(__file__).parents[1] / "browser/node/client.test.mjs"


def test_the_client_folds_resumes_and_retries_as_it_should() -> None:
    if not NODE.exists():
        unavailable("Playwright has come without Node.js")
    run = subprocess.run([NODE, "--test", TESTS], capture_output=True, text=True, check=False, timeout=50)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
