"""Time ops and whole models against stock PyTorch, and refuse to time what is not right first.

>>> from fastvit import bench
>>> result = bench.run(ops=["layernorm_mlp"], dtype="float32", batch=8)
>>> print(bench.table(result))
"""

from .op_case import NAMES as OPS
from .providers import PROVIDERS
from .run import run, table

__all__ = ["OPS", "PROVIDERS", "run", "table"]
