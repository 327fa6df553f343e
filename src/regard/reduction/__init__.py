"""Fewer tokens from layer to layer."""
