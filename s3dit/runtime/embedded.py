"""The models that come with the engine, by name. Importing this module does not import torch.

The base model has an S3-DiT, a schedule and settings of its own, and all else from the folder of the other.
"""

from pathlib import Path

_WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
EMBEDDED = _WEIGHTS / "tiny"
EMBEDDED_BASE = _WEIGHTS / "tiny_base"
FOLDERS = {"embedded": EMBEDDED, "embedded-base": EMBEDDED_BASE}
NAMES = {folder: name for name, folder in FOLDERS.items()}
