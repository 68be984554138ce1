"""Running out of memory ends in one sentence with three things to type."""

import pytest
import torch
from test_training import parts

from longclip.memory import Load, is_out_of_memory, power_of_two, remedies
from longclip.objectives import Contrastive, Loss
from longclip.types import UserError

LOAD = Load("encoding", 512, 2, None, False, None)


class Greedy(torch.autograd.Function):
    """Asks the allocator for what no machine has, in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.ones(2**50).sum()


class GreedyTerm(Contrastive):
    def __init__(self, texts, backward):
        super().__init__(texts)
        self.backward = backward

    def forward(self, embeddings):
        loss = super().forward(embeddings)
        value = Greedy.apply(loss.value) if self.backward else loss.value * torch.ones(2**50).sum()
        return Loss(value, loss.measures)


@pytest.mark.parametrize(("backward", "doing"), [(False, "the loss"), (True, "the backward pass")])
def test_a_real_failure_to_allocate_is_a_sentence_about_this_run(scenes, tiny, backward, doing):
    trainer, module, data = parts(scenes, tiny, terms={"long": GreedyTerm("long", backward)})
    with pytest.raises(UserError) as caught:
        trainer.fit(module, data)
    words = str(caught.value)
    assert f"out of memory during {doing}" in words
    assert "16 images at a time" in words
    for override in ("micro_batch=4", "model.grad_checkpointing=true", "batch_size=8"):
        assert override in words
    assert words.count("\n") == 0


def test_the_update_and_the_encoding_are_named(scenes, tiny, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")

    trainer, module, data = parts(scenes, tiny)
    monkeypatch.setattr(module.tower, "encode_image", full)
    monkeypatch.setattr(module, "needs", frozenset())
    with pytest.raises(UserError, match=r"during encoding \(asked for 2\.50 GiB more\)"):
        trainer.fit(module, data)
    trainer, module, data = parts(scenes, tiny)
    monkeypatch.setattr(type(module.optim.build(module)), "step", lambda self, closure: full(closure()))
    with pytest.raises(UserError, match="during the update"):
        trainer.fit(module, data)


def test_other_errors_stay_what_they_are(scenes, tiny, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    trainer, module, data = parts(scenes, tiny)
    monkeypatch.setattr(module.tower, "normalise", broken)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        trainer.fit(module, data)


def test_there_are_always_three_remedies_that_need_less_than_the_run_has():
    assert remedies(LOAD) == ["micro_batch=64", "model.grad_checkpointing=true", "batch_size=256"]
    small = LOAD._replace(micro_batch=3, grad_checkpointing=True, tokens=4000)
    assert remedies(small) == ["micro_batch=1", "batch_size=256", "data.plan.tokens=2000"]
    assert remedies(LOAD._replace(doing="the loss"))[0] == "batch_size=256", "chunks do not help a loss"
    least = LOAD._replace(micro_batch=1, grad_checkpointing=True, batch_size=2)
    assert len(remedies(least)) == 3
    assert not any(word.startswith(("micro_batch", "batch_size")) for word in remedies(least))
    odd = LOAD._replace(batch_size=42, world=6)
    assert "batch_size=18" in remedies(odd)
    assert [power_of_two(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 2, 64, 64]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=repr,
)
def test_allocators_have_many_voices(error):
    assert is_out_of_memory(error)
