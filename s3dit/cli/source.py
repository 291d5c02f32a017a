"""SRC of the commands `inspect`, `convert` and `quantize`: a path, "embedded", or a name of the Hub."""

from pathlib import Path

from s3dit import files


def check_source(name: str) -> None:
    """Raise RequestError, without torch, where a name can only be a path and leads to nothing."""
    if name != "embedded":
        files.check_models([("", name)])


def located(name: str) -> Path:
    """The local path of a model, downloaded where it is a name of the Hub; raises CheckpointError."""
    from s3dit.pipeline import EMBEDDED
    from s3dit.weights.hub import resolve

    return EMBEDDED if name == "embedded" else resolve(name)
