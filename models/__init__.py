"""Checkpoints: found or fetched, read, and run as a decoder in stages."""
