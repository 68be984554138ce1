"""`python one_of_two.py MODE RUN SCENES SECONDS`, by rank variables; process 1 fails in its third step."""

import datetime
import os
import signal
import sys

import engines
import lightning
import torch

from longclip.failing import Together


class Fail(lightning.Callback):
    def __init__(self, mode):
        self.mode = mode

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            if self.mode == "raise":
                raise ValueError("the disk under process 1 is on fire")
            if self.mode == "shape":  # an image too many: its collectives do not fit those of process 0
                module.terms["long"].register_forward_pre_hook(lambda _, args: _shorten(args[0]))
            else:
                os.kill(os.getpid(), {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}[self.mode])


def _shorten(e):
    from dataclasses import replace

    return (replace(e, image_BE=e.image_BE[1:], text_BKE=e.text_BKE[1:], mask_BK=e.mask_BK[1:]),)


if __name__ == "__main__":
    mode, run, scenes, seconds = sys.argv[1:]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=float(seconds)))
    try:
        engines.fit("ddp", engines.Job("siglip", 6, run, scenes), [Together(run), Fail(mode)])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
