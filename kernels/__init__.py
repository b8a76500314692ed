"""Triton kernels, one file per op. Installed as ``fastvit.kernels``."""
