"""Files of weights: containers, names and formats; import from a module: `from s3dit.weights.hub import resolve`."""
