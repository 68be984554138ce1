"""Tars without an index, read from front to back."""
