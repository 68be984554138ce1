"""What people have: layouts of data sets, and the containers that they come in.

mapping    which field means what: one YAML per layout, in this folder
fields     values in an entry, by their paths
rows       JSON lines, JSON, CSV, TSV, Parquet, and the listings of COCO and Flickr30k
window     JSON texts too long for memory
samples    webdataset tars, and loose files that share a name
files      folders and tars that images are found in, and what names may not do
listings   which files of a source hold its entries
source     all of it together: `Entry`s and `Fault`s
"""

from .mapping import Layout, load, shipped
from .source import Entry, Fault, Source

__all__ = ["Entry", "Fault", "Layout", "Source", "load", "shipped"]
