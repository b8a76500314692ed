"""What setup.py decides to build, and what it says when it leaves a part out."""

import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_on_cpu
import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")
SWITCHES = ("FASTVIT_SKIP_BUILD", "FASTVIT_FORCE_CUDA", "FASTVIT_SANITIZE", "CUDA_HOME", "CUDA_PATH", "CXX")
SWITCHES += ("CUTLASS_PATH", "TORCH_CUDA_ARCH_LIST")


@pytest.fixture
def run_setup(monkeypatch, capsys):
    """Run setup.py with ``setup`` caught; returns its arguments, its names and what it printed."""
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(ROOT)

    def run(tools=("c++", "nvcc"), **environment):
        caught = {}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(shutil, "which", lambda tool, **_: f"/bin/{tool}" if tool in tools else None)
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: caught.update(arguments))
        names = runpy.run_path("setup.py", run_name="setup")
        return caught, names, capsys.readouterr().err

    return run


def built(arguments):
    return {extension.name for extension in arguments["ext_modules"]}


def test_pure_python_on_request(run_setup):
    arguments, _, said = run_setup(FASTVIT_SKIP_BUILD="1")
    assert built(arguments) == set()
    assert said == ""


@pytest.fixture
def cutlass(tmp_path):
    """A folder that looks like CUTLASS."""
    (tmp_path / "include" / "cutlass").mkdir(parents=True)
    (tmp_path / "include" / "cutlass" / "cutlass.h").touch()
    return tmp_path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the CUDA part is built on Linux")
def test_cuda_needs_neither_a_gpu_nor_a_cuda_build_of_torch(run_setup, cutlass):
    arguments, _, said = run_setup(CUTLASS_PATH=str(cutlass))
    assert built(arguments) == {"fastvit._C", "fastvit._cuda"}
    assert said == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the CUDA part is built on Linux")
def test_hoppers_products_are_built_where_they_can_be(run_setup, cutlass, monkeypatch):
    _, names, _ = run_setup(CUTLASS_PATH=str(cutlass))
    assert names["why_not_sm90"]() == []
    assert "csrc/cuda/sm90/ops.cpp" in names["cuda_sources"]()
    _, names, said = run_setup(CUTLASS_PATH=str(cutlass), TORCH_CUDA_ARCH_LIST="8.0;10.0")
    assert "building without Hopper's own products: 9.0a is not among the architectures (8.0;10.0)" in said
    assert not any("sm90" in source for source in names["cuda_sources"]())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    arguments, _, said = run_setup(CUTLASS_PATH=str(cutlass / "nowhere"))
    if not (ROOT / "build" / "cutlass").exists():
        assert "building without Hopper's own products: CUTLASS is not here" in said
    assert "fastvit._cuda" in built(arguments)


def test_the_compiler_is_given_cutlass_for_hopper_alone(run_setup, cutlass, tmp_path):
    if cuda_on_cpu.why_not():
        pytest.skip(cuda_on_cpu.why_not())
    _, names, _ = run_setup(CUTLASS_PATH=str(cutlass))
    names["cuda_ninja_file"].__globals__["find_nvcc"] = lambda: NVCC
    names["cuda_ninja_file"].__globals__["find_cxx"] = lambda: "c++"
    text = names["cuda_ninja_file"](tmp_path, tmp_path / "library.so")
    flags = dict(re.findall(r"^(\w+_flags) = (.*)$", text, re.MULTILINE))
    assert f"-isystem={cutlass / 'include'}" in flags["sm90_flags"]
    assert re.findall(r",code=(\w+)", flags["sm90_flags"]) == ["sm_90a"]
    assert str(cutlass) not in flags["nvcc_flags"]
    assert re.search(r"^build \S*sm90_linear_act_bf16\.cu\.o: sm90_cu ", text, re.MULTILINE)


@pytest.mark.skipif(not list(ROOT.glob("fastvit/_cuda*.so")), reason="the CUDA library is not built")
@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf")
def test_the_library_leads_to_the_cuda_symbols_of_torch():
    """Through libtorch.so, which holds nothing in a CPU build of torch: the linker must not drop it."""
    library = next(ROOT.glob("fastvit/_cuda*.so"))
    needs = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "[libtorch.so]" in needs


def test_no_nvcc_is_a_skip_that_says_so(run_setup):
    arguments, _, said = run_setup(tools=("c++",))
    assert built(arguments) == {"fastvit._C"}
    assert said.count("\n") == 1
    assert "skipping the CUDA part: no nvcc found (CUDA_HOME, PATH)" in said


def test_no_compiler_is_pure_python_and_says_so(run_setup):
    arguments, _, said = run_setup(tools=())
    assert built(arguments) == set()
    assert "no C++ compiler found (CXX, c++, g++): installing pure Python" in said


def test_forced_cuda_is_an_error_where_it_cannot_be_built(run_setup):
    with pytest.raises(SystemExit, match="FASTVIT_FORCE_CUDA is set, but no nvcc found"):
        run_setup(tools=("c++",), FASTVIT_FORCE_CUDA="1")
    with pytest.raises(SystemExit, match="FASTVIT_FORCE_CUDA and FASTVIT_SKIP_BUILD are both set"):
        run_setup(FASTVIT_FORCE_CUDA="1", FASTVIT_SKIP_BUILD="1")


def test_sanitizers_reach_compiler_and_linker(run_setup):
    arguments, _, _ = run_setup(FASTVIT_SANITIZE="1")
    (extension,) = arguments["ext_modules"]
    assert extension.name == "fastvit._C"
    assert "-fsanitize=address,undefined" in extension.extra_compile_args
    assert "-fsanitize=address,undefined" in extension.extra_link_args


def test_arch_list(run_setup):
    _, names, _ = run_setup(FASTVIT_SKIP_BUILD="1")
    assert names["arch_flags"]("8.0;9.0a 12.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST has 'Hopper', expected entries like 8\.0, 9\.0a"):
        names["arch_flags"]("Hopper")


def test_the_stand_in_for_the_kernels_is_not_installed(run_setup):
    """An installed ``fastvit/kernels.py`` would sit beside the package of that name."""
    arguments, names, _ = run_setup(FASTVIT_SKIP_BUILD="1")
    assert "fastvit.kernels" in arguments["packages"]
    distribution = setuptools.Distribution({"packages": ["fastvit"], "script_name": "setup.py"})
    command = names["BuildPython"](distribution)
    command.ensure_finalized()
    modules = {module for _, module, _ in command.find_package_modules("fastvit", "fastvit")}
    assert "dispatch" in modules
    assert "kernels" not in modules
