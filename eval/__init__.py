"""Judging offline (`python -m eval.run`) and showing results."""
