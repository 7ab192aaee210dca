"""Documents that are printed from the code say what the code says."""

import re
from pathlib import Path

from realtime_bridge import __version__
from realtime_bridge.settings import describe

ROOT = Path(__file__).parents[2]


def test_the_table_of_settings_is_the_one_that_the_code_prints() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    assert describe() in text, "run: make docs"


def test_the_changelog_is_about_this_version() -> None:
    heading = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert heading is not None
    assert __version__ in heading[1]


def test_nothing_promises_more_than_is_kept() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"exactly once|guaranteed delivery", path.read_text(), re.I), path
