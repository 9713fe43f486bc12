"""The layout that ARCHITECTURE.md describes: names, who imports whom, and the links at the root."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ktransformers"

# Every module of the framework that is no operator; `__main__` would run a command.
CORE = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py" and "operators" not in path.relative_to(PACKAGE).parts
)


def in_fresh_interpreter(code: str) -> str:
    """Return what the code prints in an interpreter that has imported nothing of ours."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_no_module_bears_a_name_of_the_standard_library() -> None:
    # `python ./ktransformers/local_chat.py` puts that folder first on the path.
    names = {path.stem for path in PACKAGE.iterdir()}
    assert not names & sys.stdlib_module_names


def test_importing_the_package_loads_no_triton_and_touches_no_cuda() -> None:
    code = (
        "import sys, ktransformers\n"
        "torch = sys.modules.get('torch')\n"
        "print('triton' in sys.modules, torch is not None and torch.cuda.is_initialized())"
    )
    assert in_fresh_interpreter(code).split() == ["False", "False"]


def test_the_core_imports_no_operator() -> None:
    code = (
        "import importlib, sys\n"
        f"for name in {CORE!r}: importlib.import_module(name)\n"
        "print(*(name for name in sys.modules if name.startswith('ktransformers.operators')))"
    )
    assert in_fresh_interpreter(code).split() == []


def test_all_sources_are_ascii() -> None:
    folders = ("ktransformers", "csrc", "tests", "benchmarks", "examples", "docs", ".ci")
    suffixes = {"", ".cpp", ".h", ".inc", ".md", ".py", ".pyi", ".sh", ".toml", ".txt", ".yaml"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += ROOT.iterdir()
    files = [path for path in files if path.is_file() and path.suffix in suffixes]
    # What a model was trained or is measured on is somebody else's text.
    texts = [path for path in files if path.name != "held_out.txt"]
    assert [str(path) for path in texts if not path.read_bytes().isascii()] == []


@pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="the sdist leaves the links out")
@pytest.mark.parametrize("name", ["operators", "optimize_rules"])
def test_link_at_the_root_leads_into_the_package(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert link.resolve() == PACKAGE / name
    assert link.is_dir()
