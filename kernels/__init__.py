"""Fused and quantized operations; import from a module by name: `from s3dit.kernels.attention import attention`."""
