"""The models that come with the engine, by name. Importing this module does not import torch.

The base model has an S3-DiT, a schedule and settings of its own, and all else from the folder of the other.
"""

from pathlib import Path

_FOLDERS = Path(__file__).resolve().parents
# In a checkout whose links are plain files it lies beside the package (see `s3dit/__init__.py`).
_WEIGHTS = _FOLDERS[1 if (_FOLDERS[1] / "weights").is_dir() else 2] / "weights"
EMBEDDED = _WEIGHTS / "tiny"
EMBEDDED_BASE = _WEIGHTS / "tiny_base"
FOLDERS = {"embedded": EMBEDDED, "embedded-base": EMBEDDED_BASE}
NAMES = {folder: name for name, folder in FOLDERS.items()}
