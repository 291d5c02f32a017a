"""Parity: the stages of a picture here and in a reference, the first that parts, and why."""
