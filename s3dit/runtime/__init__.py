"""Where weights are and how they come in: files, memory, devices, adapters."""
