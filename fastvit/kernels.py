"""In a source checkout the Triton kernels live in ``../kernels``; an installed wheel has the real package instead."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent / "kernels")]
