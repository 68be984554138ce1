"""Is this job fit to train? Asked by all processes together, before the training's first collective.

    srun python -m longclip.preflight --folder runs --deadline 120

It replaces the two ways in which a job of many nodes usually wastes its time: a hang in which nobody
says who is missing, and a difference between nodes that shows after an hour. Three rounds over a
TCPStore at MASTER_ADDR:MASTER_PORT (`meeting`): all arrive with a report of themselves (`reports`), all
look at the shared folder and the clock, all take part in one all-reduce over the library that will
train. Whoever is missing, differs or hangs is named by rank and node, and every process ends within
the deadline: 0 fit, 2 unfit.
"""
