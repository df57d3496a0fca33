"""Autotune finds the settings that make a large language model train fast without running out of memory.

It searches precision, ZeRO stage, offload, activation checkpointing, batch and sequence length by running short, real
trials on the cluster under Ray Tune and Optuna, keeps every measurement in a database, and exports files that the
tools of the field take as they are.
"""

__version__ = "0.1.0"
