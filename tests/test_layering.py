"""The plan of the house, held by the syntax trees: who may import whom, and what no file may ever do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("platform", "models", "pipelines", "sweeps")
HEAVY = ("torch", "ray", "mlflow", "optuna")
FORBIDDEN = {
    "models": ("ray", "mlflow", "optuna", "setwise.platform", "setwise.pipelines", "setwise.sweeps"),
    "platform": ("setwise.models", "setwise.pipelines", "setwise.sweeps"),
    "pipelines": ("setwise.sweeps",),
    "sweeps": (),
}
FRONT_DOOR = "pipelines/cli.py"
RUNS_CODE = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
"""Modules whose files run code when they are read."""


def modules() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[int, str, int]]:
    """(line, full name of the module or of what is taken from it, dots of a relative import)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = f"{node.module}." if node.module else ""
            yield from ((node.lineno, base + alias.name, node.level) for alias in node.names)
        elif isinstance(node, ast.Call) and called(node).endswith(("import_module", "__import__")):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value, 0


def called(node: ast.Call) -> str:
    """The dotted name of what is called, as far as it is one."""
    parts: list[str] = []
    function: ast.expr = node.func
    while isinstance(function, ast.Attribute):
        parts.append(function.attr)
        function = function.value
    parts.append(function.id if isinstance(function, ast.Name) else "")
    return ".".join(reversed(parts))


def wrong_imports(file: str, source: str) -> list[str]:
    """Imports that the plan of the house does not allow in `file`, FOLDER/NAME.py."""
    folder = file.partition("/")[0]
    forbidden = () if file == FRONT_DOOR else FORBIDDEN[folder]
    found = []
    for line, name, dots in imported(ast.parse(source)):
        if dots:
            found.append(f"{file}:{line}: relative import of '{name}'; write setwise.{folder}...")
        elif name.split(".")[0] in ("models", "pipelines", "sweeps"):
            found.append(f"{file}:{line}: '{name}' is a second copy of the package; write setwise.{name}")
        elif name.startswith("platform.") and (ROOT / "platform" / f"{name.split('.')[1]}.py").is_file():
            found.append(f"{file}:{line}: '{name}' is the standard library's; write setwise.{name}")
        elif any(name == bad or name.startswith(f"{bad}.") for bad in forbidden):
            found.append(f"{file}:{line}: {folder} may not import {name}")
    return found


def dangers(file: str, source: str) -> list[str]:
    """Calls that run what a file or a string says."""
    found = []
    tree = ast.parse(source)
    for line, name, _ in imported(tree):
        if name.split(".")[0] in RUNS_CODE:
            found.append(f"{file}:{line}: import of {name}")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        keywords = {
            keyword.arg: keyword.value.value for keyword in node.keywords if isinstance(keyword.value, ast.Constant)
        }
        if name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(f"{file}:{node.lineno}: {name}")
        if name.endswith((".load_model", "pickle.load", "pickle.loads")):
            found.append(f"{file}:{node.lineno}: {name}")
        if name == "torch.load" and keywords.get("weights_only") is not True:
            found.append(f"{file}:{node.lineno}: torch.load without weights_only=True")
        for keyword, value in (("weights_only", False), ("allow_pickle", True), ("shell", True)):
            if keywords.get(keyword) is value:
                found.append(f"{file}:{node.lineno}: {name}({keyword}={value})")
        if name.endswith("YAML") and keywords.get("typ") == "unsafe":
            found.append(f"{file}:{node.lineno}: an unsafe YAML reader")
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run_python(code: str, folder: Path = ROOT, timeout: float = 120) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_imports_keep_to_the_plan() -> None:
    assert len(modules()) > 30, "the folders were not found from this file's place"
    assert [line for path in modules() for line in wrong_imports(relative(path), path.read_text("utf-8"))] == []


def test_no_file_runs_what_a_file_says() -> None:
    assert [line for path in modules() for line in dangers(relative(path), path.read_text("utf-8"))] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("models/x.py", "import ray"),
        ("models/x.py", "def f():\n    from optuna.trial import Trial"),
        ("models/x.py", "from setwise.platform import storage"),
        ("models/x.py", "from setwise import pipelines"),
        ("models/x.py", "import importlib\nimportlib.import_module('mlflow')"),
        ("platform/x.py", "if TYPE_CHECKING:\n    from setwise.models.retriever import SetRetriever"),
        ("platform/x.py", "import setwise.sweeps.space"),
        ("pipelines/x.py", "from setwise.sweeps.space import Study"),
        ("sweeps/x.py", "from models.similarity import chamfer"),
        ("sweeps/x.py", "import pipelines"),
        ("pipelines/cli.py", "from .recipe import load"),
        ("pipelines/x.py", "from . import recipe"),
        ("pipelines/x.py", "from platform.config import Settings"),
    ],
)
def test_a_planted_import_is_found(file: str, source: str) -> None:
    assert len(wrong_imports(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("pipelines/cli.py", "from setwise.sweeps import space"),
        ("platform/x.py", "import platform"),
        ("platform/x.py", "from platform import python_version"),
        ("sweeps/x.py", "import ray, optuna\nfrom setwise.pipelines import recipe"),
        ("models/x.py", "import torch\nfrom setwise.models.similarity import chamfer"),
    ],
)
def test_allowed_imports_are_not_complained_about(file: str, source: str) -> None:
    assert wrong_imports(file, source) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "yaml.load(text)",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "mlflow.pytorch.load_model('models:/x/1')",
        "mlflow.pyfunc.load_model('models:/x/1')",
        "YAML(typ='unsafe').load(text)",
    ],
)
def test_a_planted_danger_is_found(source: str) -> None:
    assert dangers("pipelines/x.py", source) != []


def test_evaluation_mode_is_not_taken_for_eval() -> None:
    assert dangers("pipelines/x.py", "model.to(device).eval()\ntorch.load(p, weights_only=True)") == []


def test_platform_is_never_a_package() -> None:
    for folder in ("platform", "tests/platform"):
        assert not (ROOT / folder / "__init__.py").exists(), (
            f"{folder}/__init__.py would shadow the standard library's `platform` for everything started in that "
            "folder's parent: import uuid, import ray and python -m pytest would die. Remove it; setwise.platform is "
            "a namespace package and needs none."
        )


def test_no_folder_is_a_package_of_its_own() -> None:
    folders = [ROOT / folder for folder in (*FOLDERS, "tests")]
    assert [relative(path) for folder in folders for path in folder.rglob("__init__.py")] == []


def test_folders_are_flat() -> None:
    nested = [relative(path) for folder in FOLDERS for path in (ROOT / folder).glob("*/**/*.py")]
    assert nested == [], "setuptools maps these four folders alone; a module below one would be missing in the wheel"


def test_deploy_holds_no_python() -> None:
    assert [relative(path) for path in (ROOT / "deploy").rglob("*.py")] == []


@pytest.mark.parametrize("folder", ["", "tests"])
def test_the_standard_library_s_platform_is_found_from_the_repository(folder: str) -> None:
    assert run_python("import platform; print(platform.system())", ROOT / folder).strip()


def test_every_module_imports() -> None:
    names = [f"setwise.{path.parent.name}.{path.stem}" for path in modules()]
    code = f"import importlib\nfor name in {names!r}:\n    print(importlib.import_module(name).__file__)"
    places = [Path(line).resolve() for line in run_python(code).split()]
    assert places == modules(), "setwise is installed from somewhere else than this checkout"


@pytest.mark.parametrize("name", ["setwise.pipelines.cli", "setwise.pipelines.recipe", "setwise.sweeps.space"])
def test_the_front_door_and_the_configuration_load_nothing_heavy(name: str) -> None:
    loaded = run_python(f"import sys, {name}\nprint(*sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert loaded.split() == []
