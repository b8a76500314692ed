"""What benchmarks/aot_cuda.py reads from the built library, and what the tuning command does without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = "cutlass::device_kernel<fastvit::sm90::LinearResidualKernel<(fastvit::DType)2, (fastvit::sm90::Tile)1, {}> >"
USAGE = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:88
 Function product:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:3456 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function pass:
  REG:40 STACK:16 SHARED:512 LOCAL:8 CONSTANT[0]:700 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	.headerflags	@"EF_CUDA_SM90"
		Function : product
  /*0100*/ HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
  /*0200*/ HGMMA.64x256x16.F32.BF16 R24, gdesc[UR12], R24, gsb0 ;
		Function : pass
  /*0100*/ FFMA R0, R1, R2, R3 ;
"""


SPLIT = """
		Function : pass
  /*0710*/ @!P0 LDG.E.128 R12, desc[UR8][R16.64] ;
  /*0730*/ @!P1 LDG.E.128 R4, desc[UR8][R18.64] ;
  /*0a80*/ STG.E desc[UR8][R2.64+-0x8], R23 ;
  /*0ae0*/ STG.E desc[UR8][R2.64+-0x4], R31 ;
  /*0b30*/ STG.E desc[UR8][R2.64], R25 ;
  /*0b60*/ STG.E desc[UR8][R2.64+0x4], R27 ;
"""


@pytest.fixture
def aot(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import aot_cuda

    return aot_cuda


def test_rows_of_the_library(aot):
    product, other = aot.parse_usage(USAGE, aot.count_instructions(SASS), "90a")
    assert (product["registers"], product["spills"], product["wgmmas"], product["arch"]) == (168, 0, 2, 90)
    assert product["problems"] == []
    assert (other["registers"], other["spills"], other["shared"]) == (40, 24, 512)
    assert other["problems"] == ["spills 24 bytes a thread"]
    assert "wgmmas" not in other


def test_loads_into_shared_memory_are_loads(aot):
    """And Blackwell's of 32 bytes are wide."""
    listing = (
        "Function : pass\n/*00*/ LDGSTS.E.BYPASS.128 [R5], desc[UR8][R2.64] ;\n/*10*/ LDG.E.ENL2.256 R8, R4, [R2.64] ;"
    )
    assert aot.count_instructions(listing)["pass"]["LDG"] == (2, 2)


def test_passes_of_vectors_move_16_bytes(aot):
    """The listing of a kernel whose 16-byte stores were split, and of the same kernel whole."""
    split = aot.count_instructions(SPLIT)["pass"]
    assert (split["LDG"], split["STG"]) == ((2, 2), (0, 4))
    name = "pass_kernel<8, false, ActFwdOp<bf16, (Activation)0, 8> >"
    assert aot.check_width({"kernel": name, **split}) == ["no 16-byte store", "4 of 4 stores below 16 bytes"]
    assert aot.check_width({"kernel": name, "LDG": (2, 2), "STG": (2, 2)}) == []
    assert aot.check_width({"kernel": "layernorm_fwd_kernel<bf16, bf16>", "LDG": (10, 10), "STG": (4, 12)}) == []
    assert aot.check_width({"kernel": "layernorm_fwd_kernel<bf16, bf16>", "LDG": (0, 10), "STG": (4, 12)}) != []
    assert aot.check_width({"kernel": name.replace("8", "1"), **split}) == []


@pytest.mark.parametrize("name", ["layernorm_fwd_kernel<bf16, bf16, 3>", PRODUCT.format(1)])
def test_what_starts_early_waits(aot, name):
    """A launch that overlaps, of a kernel without the wait, reads what is not written yet."""
    load, tma, tasks = "  LDG.E.128 R4, [R2.64] ;", "  UTMALDG.4D [UR8], [UR24] ;", "  USETMAXREG.DEALLOC 0x18 ;"
    for arch, body, found in (
        (90, "", True),
        (90, "  ACQBULK ;", False),
        (80, "", False),
        (90, f"  ACQBULK ;{load}", False),
        (90, f"{load}  ACQBULK ;", True),
        (90, f"{tasks}{load}  ACQBULK ;{tma}", False),
        (90, f"{tasks}{tma}  ACQBULK ;", True),
    ):
        row = {"kernel": name.replace("fastvit::", ""), "arch": arch, "problems": []}
        row |= aot.count_instructions(f"Function : kernel\n{body}\n")["kernel"]
        assert bool(aot.check_wait(row)) == found


def test_what_touches_products_under_way(aot):
    """Sums and left operands until their group was waited for: not even to be read, by the PTX manual."""
    first = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT, gsb0"
    second = "HGMMA.64x64x16.F32.BF16 R88, R48, gdesc[UR16].tnspB, R88, gsb0"
    store, sums, address = "STSM.16.M88.4 [R15], R46", "FMUL R2, R30, R3", "LDS.64 R2, [R50]"
    one, none = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    for listing, found in (
        ([first, sums], [sums]),
        ([first, none, sums], []),
        ([first, second, one, sums], []),
        ([first, second, one, store], [store]),
        ([first, one, sums], [sums]),
        ([first, second, none, store, address], []),
        ([store, second, address, "@P0 BRA 0x20", none], [address]),
    ):
        body = "".join(f"        /*{16 * i:04x}*/  {code} ;   /* 0x0 */\n" for i, code in enumerate(listing))
        assert list(aot.touched_under_way(body)) == found


def test_products_by_their_names(aot, monkeypatch):
    row = {"kernel": "product", "module": "cuda", "arch": 90, "shared": 1024, "wgmmas": 8, "problems": []}
    monkeypatch.setattr(aot.shutil, "which", lambda tool, **_: tool)

    def named(shared, **changes):
        done = subprocess.CompletedProcess([], 0, stdout=PRODUCT.format(shared) + "\n")
        monkeypatch.setattr(aot.subprocess, "run", lambda *_, **__: done)
        (found,) = aot.named([{**row, **changes}])
        return found

    found = named(197120)
    assert (found["kernel"], found["shared"], found["problems"]) == (
        "sm90: linear_residual bf16 small",
        197120,
        [],
    )
    assert named("(fastvit::DType)2, 197120")["kernel"] == "sm90: linear_residual bf16 small"
    assert named("(fastvit::DType)0, 197120")["kernel"] == "sm90: linear_residual bf16 small fp32 stream"
    monkeypatch.setattr(
        sys.modules[__name__], "PRODUCT", "device_kernel<sm90::LinearActGradKernel<(DType)1, (sm90::Tile)0, {}> >"
    )
    assert named(197120)["kernel"] == "sm90: linear_act_grad fp16 large"
    assert named(250000)["problems"] == ["shared memory 250000 above 232448"]
    assert named(197120, wgmmas=0)["problems"] == ["no wgmma"]


def test_attention_by_its_name(aot, monkeypatch):
    """Products that the compiler lets wait for each other are a problem."""
    name = "void fastvit::sm90::attention_fwd_kernel<(fastvit::DType)2, 208, 64, 173120>"
    row = {"kernel": "attention", "module": "cuda", "arch": 90, "shared": 0, "problems": []}
    monkeypatch.setattr(aot.shutil, "which", lambda tool, **_: tool)
    done = subprocess.CompletedProcess([], 0, stdout=name + "\n")
    monkeypatch.setattr(aot.subprocess, "run", lambda *_, **__: done)
    for waits, problems in ((4, []), (34, ["34 waits for 34 products"])):
        (found,) = aot.named([row | {"wgmmas": 34, "wgmma_waits": waits}])
        assert (found["kernel"], found["shared"]) == ("sm90: attention_fwd bf16 n208 d64", 173120)
        assert found["problems"] == problems
    (found,) = aot.named([row])
    assert found["problems"] == ["no wgmma"]
    done.stdout = "void fastvit::sm90::attention_bwd_kernel<(fastvit::DType)1, 256, 198264>\n"
    (found,) = aot.named([row | {"wgmmas": 48, "wgmma_waits": 5, "problems": []}])
    assert (found["kernel"], found["shared"], found["problems"]) == ("sm90: attention_bwd fp16 n256 d64", 198264, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here, and would be timed")
def test_tuning_without_a_gpu_says_so():
    done = subprocess.run([sys.executable, "benchmarks/tune_mlp.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 3
    assert "nothing can be timed: torch sees no CUDA device here" in done.stderr
    assert done.stdout == ""
