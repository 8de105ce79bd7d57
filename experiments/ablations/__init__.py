"""Comparisons: one module each, whose docstring tells of it.

A module has `SIZES`, the names of its sizes; `arms(size)`, a training config by the name of each arm; and
`evaluation(size)`, settings of `experiments.evaluate` that all arms are measured with.
"""
