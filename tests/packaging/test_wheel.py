"""What people download: sdist and wheel, built, installed where nothing of ours is, and run.

Two wheels are built, one from the tree and one from the sdist. Nothing is fetched: the builds use
the tools of this environment, and the empty environment borrows its site-packages by a `.pth`
file. What such a file names is not searched for further `.pth` files, so the editable install,
which is one, stays hidden.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A model, its rules and one generation; nothing here may come from the source tree.
OPTIMISE_AND_GENERATE = """
import ktransformers, torch
from importlib.resources import files
from pathlib import Path
from transformers import AutoModelForCausalLM, DeepseekV3Config

torch.manual_seed(0)
config = DeepseekV3Config(
    vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=32,
    num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=2, num_key_value_heads=2,
    n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1,
    q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
)
model = AutoModelForCausalLM.from_config(config).eval()
rule = {
    "match": {"name": r"mlp\\.experts$"},
    "replace": {"class": "ktransformers.operators.experts.CpuExperts"},
    "expect": 1,
}
model = ktransformers.optimize_and_load(model, [rule])
tokens = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=5, min_new_tokens=5)
print(Path(ktransformers.__file__).parent)
print(type(model.model.layers[1].mlp.experts).__name__, tuple(tokens.shape))
print(*(path.name for path in files("ktransformers.optimize_rules").iterdir()))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command offline and return what it prints."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(what: str, source: Path, out: Path) -> Path:
    """Build an `sdist` or a `wheel` of a source folder with the tools of this environment."""
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        f"--{what}",
        "--outdir",
        out,
        source,
        cwd=out,
    )
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the sdist, which is what people install."""
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked)
    (source,) = unpacked.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


def names_in_wheel(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_sdist_is_small_and_holds_no_links_and_no_weights(sdist: Path) -> None:
    assert sdist.stat().st_size < 5e6
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if member.issym() or member.islnk()] == []
    assert [member.name for member in members if member.name.endswith(".safetensors")] == []


def test_sdist_holds_what_building_and_testing_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers()}
    tracked = ("ktransformers", "csrc", "tests", "benchmarks")
    files = [path for folder in tracked for path in (ROOT / folder).rglob("*") if path.is_file()]
    wanted = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    wanted |= {"CMakeLists.txt", "LICENSE", "Makefile", "README.md", "constraints.txt"}
    assert wanted - names == set()


def test_wheel_is_the_same_from_the_sdist_and_from_the_tree(
    wheel: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from_tree = build("wheel", ROOT, tmp_path_factory.mktemp("from_tree"))
    assert from_tree.name == wheel.name
    assert names_in_wheel(from_tree) == names_in_wheel(wheel)


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = names_in_wheel(wheel)
    own = {name for name in names if ".dist-info/" not in name}
    package = [path for path in (ROOT / "ktransformers").rglob("*") if path.is_file()]
    wanted = {
        str(path.relative_to(ROOT))
        for path in package
        if path.suffix in {".py", ".pyi", ".yaml", ".typed"}
    }
    extensions = {name for name in own if name.endswith(".so")}
    assert len(extensions) == 1
    assert own - extensions == wanted
    assert {"ktransformers/py.typed", "ktransformers/_native.pyi"} <= wanted
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_bears_the_tag_of_its_python(wheel: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    expected = f"{tag}-{tag}" if sys.version_info < (3, 12) else "cp312-abi3"
    assert wheel.name.split("-", 2)[2].startswith(expected)
    (extension,) = (name for name in names_in_wheel(wheel) if name.endswith(".so"))
    assert extension.endswith(
        ".abi3.so" if sys.version_info >= (3, 12) else str(sysconfig.get_config_var("EXT_SUFFIX"))
    )


def test_extension_links_to_neither_torch_nor_cuda_nor_python(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (extension,) = (name for name in archive.namelist() if name.endswith(".so"))
        path = archive.extract(extension, tmp_path)
    lines = run("readelf", "--dynamic", "--wide", path, cwd=tmp_path).splitlines()
    needed = {line.rpartition("[")[2].rstrip("]") for line in lines if "(NEEDED)" in line}
    assert needed <= {
        "libc.so.6",
        "libgcc_s.so.1",
        "libm.so.6",
        "libpthread.so.0",
        "libstdc++.so.6",
        "ld-linux-x86-64.so.2",
    }
    assert not any("(RPATH)" in line or "(RUNPATH)" in line for line in lines)


def test_wheel_optimises_and_generates_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path)[:-1]
    )
    (site / "borrowed.pth").write_text(sysconfig.get_path("platlib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    place, model, rules = run(python, "-c", OPTIMISE_AND_GENERATE, cwd=tmp_path).splitlines()
    assert Path(place) == site / "ktransformers"
    assert model == "CpuExperts (1, 8)"
    assert {path.name for path in (ROOT / "ktransformers/optimize_rules").glob("*.yaml")} <= set(
        rules.split()
    )
