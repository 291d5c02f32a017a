"""The official JSON and tokenizer files of a model: read, checked key by key, or inferred from tensors."""
