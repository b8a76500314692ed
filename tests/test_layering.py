"""The package's import arrows, read from its sources. Imports go down only, and importing fastvit stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the bottom up; a part is the first component below fastvit. Each imports from its own layer or a lower one.
LAYERS = (
    {"reference", "_extension", "kernels"},
    {"dispatch", "packs", "relabel", "testing"},
    {"ops"},
    {"fused", "kinds", "block_parts", "block_plan", "norm_act", "resample", "weight_init"},
    {"layers", "pool"},
    {"checkpoints", "foreign", "intermediates", "model", "variants"},
    {"adapters"},
    {"_fetch", "_pins", "accelerate", "attention_maps", "data", "parity", "training"},
    {"bench"},
    {"cli", "__main__"},
)
LAYER = {part: height for height, parts in enumerate(LAYERS) for part in parts}
ONLY = {"reference": set(), "kernels": set(), "testing": {"reference"}}
ONLY |= {part: {"_extension"} for part in ("dispatch", "packs")}
LAZY = {"triton", "timm", "transformers", "torchvision", "onnx", "safetensors"}
LAZY |= {"numpy", "PIL", "matplotlib", "rich", "psutil"}


def package_files() -> list[tuple[str, Path]]:
    """(module name inside fastvit, file) of every Python file, kernels included."""
    files = {path: path.relative_to(ROOT / "fastvit") for path in sorted((ROOT / "fastvit").rglob("*.py"))}
    files |= {path: path.relative_to(ROOT) for path in sorted((ROOT / "kernels").glob("*.py"))}
    del files[ROOT / "fastvit" / "kernels.py"]
    names = {path: ".".join(relative.with_suffix("").parts) for path, relative in files.items()}
    return [(name.removesuffix("__init__").removesuffix("."), path) for path, name in names.items()]


FILES = package_files()


def fastvit_imports(module: str, source: str, is_package: bool) -> set[str]:
    """Parts of fastvit that a module's source imports, anywhere in it; "" stands for fastvit itself."""
    package = ["fastvit", *module.split(".")]
    package = package if is_package else package[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # "from . import x" and "from fastvit import x": each name may be a module
            names = [f"{stem}.{alias.name}" for alias in node.names] if stem == "fastvit" else [stem]
        else:
            continue
        found |= {name.split(".")[1] if "." in name else "" for name in names if name.split(".")[0] == "fastvit"}
    return found


def outside_imports(source: str) -> set[str]:
    """Other packages that a module imports when it is itself imported (not inside functions or TYPE_CHECKING)."""
    found = set()

    def visit(nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                visit(node.orelse)
            elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ClassDef)):
                visit([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])
                for handler in getattr(node, "handlers", []):
                    visit(handler.body)

    visit(ast.parse(source).body)
    return found


EACH_FILE = pytest.mark.parametrize(("module", "path"), FILES, ids=[name or "__init__" for name, _ in FILES])


@EACH_FILE
def test_imports_go_down(module, path):
    part = module.split(".")[0]
    if not part:
        return  # fastvit/__init__.py gathers the public names
    assert part in LAYER, f"{part} has no layer yet: give it one in LAYERS"
    imported = fastvit_imports(module, path.read_text(), path.name == "__init__.py") - {part}
    modules = {name for name in imported if name in LAYER}
    above = {name for name in modules if LAYER[name] > LAYER[part]}
    assert not above, f"{module} imports {', '.join(sorted(above))}, above it"
    if part in ONLY:
        assert modules <= ONLY[part], f"{module} imports {', '.join(sorted(modules - ONLY[part]))}"
        assert "" not in imported, f"{module} imports fastvit itself"


@EACH_FILE
def test_optional_packages_are_imported_where_they_are_used(module, path):
    part = module.split(".")[0]
    allowed = {"kernels": {"triton"}}.get(part, set())
    early = outside_imports(path.read_text()) & (LAZY - allowed)
    assert not early, f"{module or 'fastvit'} imports {', '.join(sorted(early))} at its top"


def test_kernels_import_torch_triton_and_siblings_only():
    for module, path in FILES:
        if module.split(".")[0] == "kernels":
            outside = outside_imports(path.read_text()) - set(sys.stdlib_module_names) - {"__future__"}
            assert outside <= {"torch", "triton"}, f"{module} imports {outside}"


def test_the_reading_of_imports_sees_every_form():
    source = "from . import ops\nfrom .cli import main\nimport fastvit.parity\nfrom fastvit import bench\nimport torch"
    assert fastvit_imports("reference", source, False) == {"ops", "cli", "parity", "bench"}
    source = "from .. import reference\nfrom . import _register\ndef f():\n    import fastvit"
    assert fastvit_imports("ops.attention", source, False) == {"reference", "ops", ""}
    assert fastvit_imports("ops", "from .attention import attention", True) == {"ops"}
    source = "def f():\n    import timm\ntry:\n    import onnx\nexcept ImportError:\n    import rich"
    assert outside_imports(source) == {"onnx", "rich"}


def test_importing_fastvit_is_light_and_silent():
    code = "import sys, {}; print(*{{name.split('.')[0] for name in sys.modules}})"
    torch, fastvit = (
        subprocess.run([sys.executable, "-c", code.format(name)], capture_output=True, text=True, cwd=ROOT, check=True)
        for name in ("torch", "torch, fastvit")
    )
    assert fastvit.stderr == torch.stderr
    added = set(fastvit.stdout.split()) - set(torch.stdout.split())
    assert not added & LAZY, added
    assert "fastvit" in added
