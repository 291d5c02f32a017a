"""Files and names of checkpoints; import a room by name, for example `from s3dit.weights.checkpoint import open_checkpoint`."""
