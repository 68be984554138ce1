"""Results for people: on the terminal, as Markdown, as pictures, as one HTML page."""

from .ending import finish
from .lengths import length_curves, plot_lengths
from .tables import markdown, table

__all__ = ["finish", "length_curves", "markdown", "plot_lengths", "table"]
