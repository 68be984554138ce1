"""What a training step will need, said before it is run: memory by part, FLOPs, and a micro_batch that fits.

    with torch.device("meta"):
        module = LongClip(DualTower(build("ViT-B-16", None, 248)), terms, slots, optim, seed=0)
    costs = estimate.Costs(module, lengths_BK, estimate.Job(batch_size=512, precision="bf16-mixed"))
    choice = estimate.choose(costs, memory=24 * 2**30)  # micro_batch, grad_checkpointing, bytes needed

`counting` counts one piece of work, `pretending` runs the module's parts on fake tensors, `lengths` makes up
captions where there are none, `estimate` adds up and chooses, `report` says it with the command to type.

Nothing is guessed about activations: the towers and the terms themselves run on fake tensors, at two sizes,
and what autograd keeps is counted. No weights are read and no device is needed.
"""
