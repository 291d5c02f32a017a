"""Instruments that look inside a model: sites, the map of tokens, observing, editing, attention, traces."""
