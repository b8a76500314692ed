"""Versions agree, what is pinned is pinned once, and a build holds what it should and nothing else."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastvit

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "pyproject.toml").exists():
    pytest.skip("needs the source checkout", allow_module_level=True)
PYPROJECT = (ROOT / "pyproject.toml").read_text()
PINS = dict(re.findall(r"^([\w-]+)==([^\s;]+)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE))


def test_version_is_the_same_everywhere():
    assert re.search(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE)[1] == fastvit.__version__


def test_pre_commit_runs_the_pinned_tools():
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    pinned = re.findall(r"\[([\w-]+)==([\w.]+)\]", config)
    assert {name for name, _ in pinned} == {"ruff", "clang-format"}
    assert all(PINS[name] == version for name, version in pinned)


def test_every_development_requirement_is_pinned():
    extra = re.search(r"^dev = \[(.*?)^\]", PYPROJECT, re.MULTILINE | re.DOTALL)[1]
    names = set(re.findall(r'"([A-Za-z][\w-]*)(?!\[)[\w>=<,.]*"', extra)) - {"fastvit"}
    assert names, extra
    assert names <= set(PINS), f"not in requirements-dev.txt: {names - set(PINS)}"


def build(tmp_path: Path, *command: str, **env: str) -> subprocess.CompletedProcess:
    """Run setup.py in a copy of the tracked layout, so that nothing is written into the checkout."""
    source = tmp_path / "source"
    if not source.exists():
        source.mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "fastvit", "kernels", "csrc"):
            if (ROOT / name).exists():
                subprocess.run(["cp", "-r", ROOT / name, source], check=True)
        for leftover in source.rglob("*.so"):
            leftover.unlink()
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=source,
        capture_output=True,
        text=True,
        env=os.environ | {"FASTVIT_SKIP_BUILD": "1"} | env,
    )


def test_pure_python_wheel_holds_the_package_and_the_kernels(tmp_path):
    result = build(tmp_path, "bdist_wheel", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("METADATA"))
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "fastvit").rglob("*.py")} - {"fastvit/kernels.py"}
    sources |= {f"fastvit/{p.relative_to(ROOT)}" for p in (ROOT / "kernels").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert not [name for name in names if name.split("/")[0] != "fastvit"]
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra)", metadata, re.MULTILINE)
    assert set(required) == {"torch", "safetensors"}


def test_source_distribution_can_be_built_from(tmp_path):
    result = build(tmp_path, "sdist", "--dist-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr[-2000:]
    (archive,) = tmp_path.glob("*.tar.gz")
    listed = subprocess.run(["tar", "tzf", archive], capture_output=True, text=True, check=True).stdout.splitlines()
    names = {name.partition("/")[2] for name in listed}
    wanted = {str(p.relative_to(ROOT)) for folder in ("csrc", "kernels") for p in (ROOT / folder).rglob("*.*")}
    wanted = {name for name in wanted if name.endswith((".py", ".cpp", ".h", ".cu", ".cuh"))}
    assert not wanted - names, f"the sdist lacks {sorted(wanted - names)[:5]}"


def test_force_cuda_and_skip_build_contradict(tmp_path):
    result = build(tmp_path, "--version", FASTVIT_FORCE_CUDA="1")
    assert result.returncode != 0
    assert "FASTVIT_FORCE_CUDA and FASTVIT_SKIP_BUILD" in result.stderr


def test_force_cuda_without_nvcc_is_an_error(tmp_path):
    without = {"FASTVIT_SKIP_BUILD": "0", "PATH": str(tmp_path), "CUDA_HOME": "", "CUDA_PATH": ""}
    skipped = build(tmp_path, "--version", **without)
    assert skipped.returncode == 0, skipped.stderr[-2000:]
    assert "skipping the CUDA part" in skipped.stderr
    forced = build(tmp_path, "--version", FASTVIT_FORCE_CUDA="1", **without)
    assert forced.returncode != 0
    assert "FASTVIT_FORCE_CUDA is set, but" in forced.stderr


def test_a_wrong_architecture_list_is_named(tmp_path):
    code = "import sys; sys.argv = ['setup.py', '--version']; import setup; setup.arch_flags('9.0a;nine')"
    env = os.environ | {"FASTVIT_SKIP_BUILD": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env)
    assert "TORCH_CUDA_ARCH_LIST has 'nine'" in result.stderr


TARGETS = ("setup", "demo", "test", "lint", "types", "wheel", "aot", "sanitize", "bench", "gpu", "results-check")


@pytest.mark.parametrize("target", TARGETS)
def test_make_has_a_rule_for(target):
    result = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
