"""Other inference runtimes on a CPU, each at its best settings, with PyTorch's number of threads. Optional."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .providers import Missing, Refused

Runner = Callable[[Tensor], Tensor]


def compile_model(runtime: str, model: nn.Module, images: Tensor, dtype: torch.dtype) -> Runner:
    """``model`` (float32, on the CPU) as a function of images of this one shape; raises ``Refused``.

    dtype  what the runtime may compute in; images and logits are float32
    """
    return {"onnxruntime": _onnxruntime, "openvino": _openvino}[runtime](model, images, dtype)


def _need(module: str, package: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise Missing(f"{package} is not installed (pip install 'fastvit[peers]')")
    return importlib.import_module(module)


def _onnxruntime(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Runner:
    """Every graph optimisation; the exporter's own come first."""
    runtime = _need("onnxruntime", "onnxruntime")
    _need("onnxscript", "onnxscript, which exports models for onnxruntime,")
    if dtype != torch.float32:
        raise Missing(f"onnxruntime has no {str(dtype).removeprefix('torch.')} matrix product on a CPU")
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (images,), path, input_names=["images"], dynamo=True, verbose=False)
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {"images": pixels.numpy()})[0])


def _openvino(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Runner:
    """A static shape and one stream. Without the precision hint float32 would silently run in bfloat16."""
    openvino = _need("openvino", "openvino")
    hints = {torch.float32: "f32", torch.bfloat16: "bf16"}
    if dtype not in hints:
        raise Missing(f"openvino has no hint for {dtype} on a CPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(model, example_input=images)
    converted.reshape(list(images.shape))
    settings = {
        "INFERENCE_PRECISION_HINT": hints[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    try:
        compiled = openvino.Core().compile_model(converted, "CPU", settings)
    except RuntimeError as error:
        raise Refused(f"openvino does not compile the model: {error}") from error
    return lambda pixels: torch.from_numpy(compiled(pixels.numpy())[0])
