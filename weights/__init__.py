"""Files and names of checkpoints; import a room by name: `from s3dit.weights.checkpoint import open_checkpoint`."""
