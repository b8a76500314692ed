"""What setup.py decides to build, and what it says when it leaves a part out."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
SWITCHES = ("FASTVIT_SKIP_BUILD", "FASTVIT_FORCE_CUDA", "FASTVIT_SANITIZE", "CUDA_HOME", "CUDA_PATH", "CXX")


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the CUDA part is built on Linux")
def test_cuda_needs_neither_a_gpu_nor_a_cuda_build_of_torch(run_setup):
    arguments, _, said = run_setup()
    assert built(arguments) == {"fastvit._C", "fastvit._cuda"}
    assert said == ""


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
