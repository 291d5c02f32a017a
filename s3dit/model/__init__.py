"""The model: what is computed, as modules and plain data."""
