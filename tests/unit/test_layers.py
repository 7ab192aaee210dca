"""Imports point one way: a file may import from its own package's layer's elders, never from those who stand on it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "realtime_bridge"

LAYERS = [
    ("words", ["errors", "change", "claims", "settings", "metrics", "logs"]),
    (
        "pure",
        [
            *("values", "canonical", "filters", "pgoutput", "wire"),
            *("policy.expression", "policy.nodes", "policy.dependence", "policy.keeping", "policy.membership"),
            *("policy.reading", "policy.ordering", "policy.atoms", "policy.predicate", "policy.compiler"),
        ],
    ),
    ("adapters", ["auth", "jwks", "tickets", "database", "policy", "sources", "broker"]),
    ("core", ["ingest", "rows", "row_versions", "rights", "seeding", "repair", "hub", "guarantee"]),
    ("edges", ["transports", "rest"]),
    ("whole", ["bridge", "parts", "background", "routes", "app", "server", "checks", "dev", "cli", "__main__"]),
]
PEERS_APART = [{"sources", "broker", "policy", "auth"}, {"transports", "rest"}]
"""Peers that must not know each other: what joins them stands above them. (`database` is what adapters share.)"""


def layer(module: str) -> int:
    """The layer of a module of the package: the longest name that fits decides."""
    fits = [
        (len(name), i)
        for i, (_, names) in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    assert fits, f"{module} stands in no layer: give it one in {Path(__file__).name}"
    return max(fits)[1]


def imports() -> list[tuple[str, str]]:
    """(importing module, imported module) of the package, relative to it."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if module == "__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
                if node.module == "realtime_bridge":
                    names = [f"realtime_bridge.{alias.name}" for alias in node.names if alias.name != "__version__"]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found += [
                (module, name.removeprefix("realtime_bridge.")) for name in names if name.startswith("realtime_bridge.")
            ]
    return found


def test_no_module_imports_from_a_layer_above_it() -> None:
    wrong = [f"{a} imports {b}" for a, b in imports() if layer(a) < layer(b)]
    assert not wrong


def test_peers_do_not_know_each_other() -> None:
    wrong = []
    for peers in PEERS_APART:
        for a, b in imports():
            one, other = a.split(".")[0], b.split(".")[0]
            if one in peers and other in peers and one != other:
                wrong.append(f"{a} imports {b}")
    assert not wrong


def test_a_module_of_each_layer_was_seen() -> None:
    assert {layer(a) for a, _ in imports()} == set(range(1, len(LAYERS))) | {0}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("realtime_bridge.cli", {"fastapi", "asyncpg", "psycopg", "redis", "realtime", "supabase"}),
        ("realtime_bridge.server", {"psycopg", "redis", "realtime", "supabase"}),
    ],
)
def test_what_takes_long_to_import_waits_until_it_is_needed(module: str, heavy: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert run.stdout.split() == []
