"""What a request brings along: images, start images, references, control images."""
