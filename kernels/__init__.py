"""Fused and quantized operations; import a room by name, for example `from s3dit.kernels.attention import attention`."""
