"""Hydra configs, one folder per group, and the launcher that turns a typo into a sentence."""
