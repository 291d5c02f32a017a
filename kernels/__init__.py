"""Fused and quantized operations; import a room by name: `from s3dit.kernels.attention import attention`."""
