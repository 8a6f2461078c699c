"""Who may import whom, what an import costs, and that a device without torch can still infer."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edge_sdk
from edge_sdk import errors

ROOT = Path(__file__).parent.parent
FOLDERS = {"edge_sdk": ROOT / "edge_sdk", "edge_server": ROOT / "server/edge_server", "edge_export": ROOT / "export/edge_export"}
FORBIDDEN = {
    "edge_sdk": {"edge_server", "edge_export"},
    "edge_server": {"edge_export"},
    "edge_export": {"edge_server"},
}
PURE = [
    *(
        f"edge_sdk/{name}.py"
        for name in (
            *("protocol", "wire", "adapters", "tasks", "softlabels", "session", "eligibility", "verbs", "judgments"),
            *("codec", "cohort", "consent", "masking", "identity", "alignment", "knowledge", "corpus"),
            *("training/batches", "training/depth"),
        )
    ),
    *(
        f"server/edge_server/{name}.py"
        for name in (
            *("aggregation", "robust", "coordinator", "cohorts", "unmasking", "gate", "simulate", "llm/jobs"),
            *("leases", "pacing", "intake"),
        )
    ),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "server/edge_server/knowledge").glob("*.py"))),
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "server/edge_server/systems").glob("*.py"))),
]
IMPURE = {
    "asyncio",
    "aiohttp",
    "sqlite3",
    "sqlalchemy",
    "torch",
    "onnxruntime",
    "time",
    "random",
    "socket",
    "subprocess",
    "threading",
}
HEAVY = {"torch", "transformers", "peft", "onnxruntime", "aiohttp"}
TRAINING = {"torch", "transformers", "peft"}


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, at its top, inside functions and for type checkers alike."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module if node.module and not node.level else f"{'.' * node.level}{node.module or ''}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names if not node.level)


def roots(path: Path) -> set[str]:
    """The first parts of a file's imports."""
    return {name.split(".")[0] for name in imports(path)}


def modules(package: str) -> list[Path]:
    return sorted(FOLDERS[package].rglob("*.py"))


def python(code: str) -> Any:
    """What this code prints as JSON, in a fresh interpreter at the top of the checkout."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# Who imports whom -----------------------------------------------------------------------------------------------------
def test_the_walk_sees_every_form_of_import(tmp_path: Path) -> None:
    """The reader of imports these tests rest on finds plain, nested, aliased, from and relative imports."""
    path = tmp_path / "m.py"
    path.write_text(
        "import a.b\nimport c as d, e\nfrom f import g\ndef h():\n    from i.j import k\nfrom . import l\nfrom ..m import n\n"
    )

    assert sorted(imports(path)) == [".", "..m", "a.b", "c", "e", "f", "f.g", "i.j", "i.j.k"]
    assert roots(path) == {"", "a", "c", "e", "f", "i"}


@pytest.mark.parametrize("package", FOLDERS)
def test_packages_import_only_downwards(package: str) -> None:
    """edge_server and edge_export use edge_sdk; edge_sdk uses neither, and they never use each other."""
    found = {(path.name, name) for path in modules(package) for name in roots(path) & FORBIDDEN[package]}

    assert len(modules(package)) > 3
    assert found == set()


@pytest.mark.parametrize("package", FOLDERS)
def test_nobody_imports_relatively(package: str) -> None:
    """Imports name their package, so that the other rules here see them all."""
    assert [path.name for path in modules(package) for name in imports(path) if name.startswith(".")] == []


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_touch_no_world(module: str) -> None:
    """What decides knows no clock, chance, socket, disk engine, loop or model: these come in as arguments."""
    assert roots(ROOT / module) & IMPURE == set()


def test_the_server_reads_no_body_whole() -> None:
    """Bodies come in chunks with a limit and a time, by the one function of the handlers that does so; `watch.py` counts them."""
    asked = {"read", "text", "json", "post", "multipart", "content"}
    found = [
        (path.name, ast.unparse(node))
        for path in modules("edge_server")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in asked and ast.unparse(node.value) == "request"
    ]

    assert found == [("handlers.py", "request.content"), ("watch.py", "request.content")]


def test_torch_lives_in_one_folder() -> None:
    """On a device only `training/` imports torch and its kin; everything else works without them."""
    users = {path.relative_to(FOLDERS["edge_sdk"]).parts[0] for path in modules("edge_sdk") if roots(path) & TRAINING}

    assert users == {"training"}


def test_one_file_asks_which_system_a_run_is() -> None:
    """Beside the settings only `runs.py` knows all systems, and each answers the same questions."""
    systems = {path.stem: path for path in (FOLDERS["edge_server"] / "systems").glob("[!_]*.py")}
    known = {f"edge_server.systems.{name}" for name in systems}
    functions = {
        name: {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        for name, path in systems.items()
    }

    assert {path.name for path in modules("edge_server") if known <= set(imports(path))} == {"runs.py", "settings.py"}
    assert [name for name, there in functions.items() if not {"start", "plan", "averaged", "finished"} <= there] == []
    assert not {"edge_server.systems.crosslm", "edge_server.systems.fedmkt"} & set(imports(FOLDERS["edge_server"] / "ledger.py"))


def test_tests_are_no_part_of_the_product() -> None:
    """No package imports the tests, pytest or hypothesis."""
    assert [
        path.name for package in FOLDERS for path in modules(package) if roots(path) & {"tests", "pytest", "hypothesis"}
    ] == []


# What is public -------------------------------------------------------------------------------------------------------
def test_all_names_everything_public() -> None:
    """`edge_sdk.__all__` holds every public name the package imports, each once, and each exists."""
    tree = ast.parse((ROOT / "edge_sdk/__init__.py").read_text())
    imported = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}

    assert sorted(edge_sdk.__all__) == sorted(imported)
    assert all(hasattr(edge_sdk, name) for name in edge_sdk.__all__)


def test_every_error_can_be_caught_by_name() -> None:
    """Every exception raised on purpose is public and has the one root."""
    found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}

    assert found <= set(edge_sdk.__all__)
    assert all(issubclass(getattr(errors, name), edge_sdk.EdgeError) for name in found)


# What an import costs -------------------------------------------------------------------------------------------------
IMPORT = """
import json, sys, time
import numpy
before = time.process_time()
import edge_sdk
print(json.dumps([time.process_time() - before, sorted(name for name in sys.modules if "." not in name)]))
"""


def test_importing_the_sdk_is_cheap() -> None:
    """`import edge_sdk` loads nothing heavy, and takes less than 0.3 s of processor time beyond numpy (median of three)."""
    runs: list[tuple[float, list[str]]] = [python(IMPORT) for _ in range(3)]

    assert all(HEAVY.isdisjoint(loaded) for _, loaded in runs)
    assert statistics.median(seconds for seconds, _ in runs) < 0.3


WITHOUT_EXTRAS = """
import contextlib, io, json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "peft", "onnx", "optimum", "sqlalchemy"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import edge_export.cli, edge_server.cli
said = io.StringIO()
with contextlib.redirect_stderr(said):
    codes = [edge_export.cli.main(["bundle", "minilm", "-o", "none"]),
             edge_server.cli.main(["serve", "--config", CONFIG, "--bundle", "none", "--data", "none"])]
print(json.dumps([codes, said.getvalue().splitlines()]))
"""


def test_a_missing_extra_is_named() -> None:
    """Without what an extra brings, the two programs end with the command that installs it."""
    codes, said = python(WITHOUT_EXTRAS.replace("CONFIG", repr(str(ROOT / "examples/minilm.toml"))))

    assert codes == [1, 1]
    assert "pip install 'tandem-edge[export]'" in said[0]
    assert "pip install 'tandem-edge[server]'" in said[1]


BLOCKED = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "transformers", "peft"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import edge_sdk.agent, edge_sdk.cli, edge_sdk.device, edge_sdk.engines.onnx, edge_sdk.testing, edge_sdk.transport
try:
    import edge_sdk.training.learner
    reason = None
except ModuleNotFoundError as error:
    reason = error.name
print(json.dumps([reason, sorted(name for name in sys.modules if "." not in name)]))
"""


def test_a_device_without_torch_can_infer() -> None:
    """Agent, engine, device and transport load where torch is absent; only the learner needs it, and says so."""
    reason, loaded = python(BLOCKED)

    assert reason in TRAINING
    assert TRAINING.isdisjoint(loaded)
    assert {"onnxruntime", "aiohttp"} <= set(loaded)
