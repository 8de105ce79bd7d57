"""Comparisons: one module each, whose docstring tells of it: command, hardware, time, the paper's numbers and ours.

A module has

* `SIZES`, the names of its sizes: `cpu` runs take minutes each on two cores, `gpu` ones up to ten on one GPU, `paper`
  has the published shapes;
* `CORE`, whether it carries a main claim of a paper;
* `arms(size)`, a training config by the name of each arm;
* `evaluation(size)`, settings of `experiments.evaluate` that all arms are measured with, those without a FAM
  without controls of one; or of `experiments.analyze`, if they say `what`;
* `RUNS_OF`, if it has arms of another comparison by the same names, whose runs then serve both.
"""
