"""A model as graphs of torch.export: files that draw without this package."""
