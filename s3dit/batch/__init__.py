"""Many pictures: rows of a file, drawn by processes here or by a Ray cluster, a result for each."""
