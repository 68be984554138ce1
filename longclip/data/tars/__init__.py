"""Shards on disk or behind a URL: format, writing, and reading any record by number."""
