"""Instruments that look inside a model."""
