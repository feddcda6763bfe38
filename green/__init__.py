"""A GPU's SMs split between stages: `partition` computes, `streams` splits, `probe` proves it.

Imports nothing by itself: `partition` is plain Python, and only `streams` and `probe` need a GPU.
"""
