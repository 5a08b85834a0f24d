"""What is built and installed: the wheel holds the whole package and nothing beside it, the lock names no index."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("platform", "models", "pipelines", "sweeps")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that no build folder is left in the checkout."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)  # type: ignore[operator]
    uv = Path(sys.executable).parent / "uv"
    command = [uv, "build", "--wheel", "--out-dir", built, source] if uv.exists() else None
    command = command or [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", built, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = built.glob("*.whl")
    return made


def test_the_wheel_holds_every_module_recipe_preset_and_study(wheel: Path) -> None:
    expected = {
        f"setwise/{folder}/{path.relative_to(ROOT / folder)}"
        for folder in FOLDERS
        for pattern in ("*.py", "*.yaml", "gates/*.yaml", "pages/*.html", "presets/*.yaml", "recipes/*.yaml")
        for path in (ROOT / folder).glob(pattern)
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_installed_wheel_finds_its_recipes_and_presets(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path / "site")!r})
from setwise.pipelines import hardware, recipe
from setwise.sweeps import space
assert recipe.__file__.startswith({str(tmp_path)!r}), recipe.__file__
print(*(recipe.load(name).data.name for name in recipe.names()))
print(*(hardware.load(name)[0].device for name in hardware.names()))
print(*(space.load(name)[0].recipe for name in space.names()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("digits", "coco_butd", "NVIDIA H200", "digits_cnn_bigru"))


def test_the_lock_has_hashes_and_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    for block in re.split(r"\n(?=[a-z0-9])", lock.strip()):
        assert "--hash=sha256:" in block, block.splitlines()[0]


def test_the_standard_librarys_platform_is_found_in_the_root() -> None:
    for arguments in (["-c", "import platform; print(platform.system())"], ["-m", "platform"]):
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and "Linux" in done.stdout, done.stderr
