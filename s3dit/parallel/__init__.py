"""Several processes, each with a device of its own, that draw the same pictures together (torch.distributed)."""
