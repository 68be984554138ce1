"""What terms that read patches send between processes: vectors of captions and masks, never patches."""

import torch
from processes import spawn
from torch import distributed
from torch.nn.functional import normalize

from longclip import dist
from longclip.objectives import Grouping, TextConditioned
from longclip.objectives.beta import Beta
from longclip.types import Embeddings

IMAGES, SLOTS, WIDTH, PATCHES = 4, 3, 8, 50
COLLECTIVES = """all_gather all_gather_into_tensor all_reduce all_to_all all_to_all_single broadcast gather
    isend reduce reduce_scatter reduce_scatter_tensor scatter send""".split()  # noqa: SIM905
TERMS = {
    "grouping": Grouping("sub"),
    "within": Grouping("sub", negatives="image"),
    "conditioned": TextConditioned("sub", heads=2),
    "beta": Beta("sub", heads=2),
}


def sent():
    """For each term, one row per collective: its name, elements that this process gave, whether floats."""
    calls = []
    for name in COLLECTIVES:  # for the life of this process
        setattr(distributed, name, counted(name, getattr(distributed, name), calls))
    found = {}
    for name, term in TERMS.items():
        calls.clear()
        step(term)
        found[name] = torch.tensor(calls)
    return found


def counted(name, original, calls):
    def call(*tensors, **options):
        given = tensors[1] if "_tensor" in name else tensors[0]
        calls.append([COLLECTIVES.index(name), given.numel(), given.is_floating_point()])
        return original(*tensors, **options)

    return call


def step(term):
    term.build(WIDTH)
    mask_BK = torch.rand(IMAGES, SLOTS) < 0.7
    text_BKE, patches_BPE = (torch.randn(IMAGES, n, WIDTH, requires_grad=True) for n in (SLOTS, PATCHES))
    embeddings = Embeddings(
        image_BE=normalize(patches_BPE.mean(1), dim=-1),
        text_BKE=normalize(text_BKE, dim=-1) * mask_BK[..., None],
        mask_BK=mask_BK,
        slots={"sub": slice(0, SLOTS)},
        scale=torch.tensor(7.0),
        gather=dist.Gather(),
        patches_BPE=patches_BPE,
    )
    term(embeddings).value.backward()


def test_one_vector_for_each_caption_or_image_travels_each_way_and_patches_never(tmp_path):
    out, back = COLLECTIVES.index("all_gather_into_tensor"), COLLECTIVES.index("reduce_scatter_tensor")
    both, captions = COLLECTIVES.index("all_to_all_single"), IMAGES * SLOTS
    mask = [out, captions, 0]
    groups = [[out, captions * WIDTH, 1], [back, 2 * captions * WIDTH, 1]]
    # To each of two processes its captions' log-sum-exps and highest scores, and their gradients back.
    figures = [[both, 2 * 2 * captions, 1]] * 2
    # Image features, which other terms of a recipe share, and captions.
    images = [[out, IMAGES * WIDTH, 1], [back, 2 * IMAGES * WIDTH, 1]]
    for found in spawn(sent, 2, tmp_path):
        assert sorted(found["beta"].tolist()) == sorted(found["grouping"].tolist())
        assert sorted(found["grouping"].tolist()) == sorted([mask, *groups, *figures])
        assert found["within"].tolist() == [mask]
        assert sorted(found["conditioned"].tolist()) == sorted([mask, *images, *groups])
