"""Launchers: training on Cloud TPUs, GKE, SLURM and plain hosts; `python -m experiments.launch --help`."""
