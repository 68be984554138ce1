"""Losses, measures and gradients do not depend on how many processes hold the batch."""

import torch
from processes import Results, spawn
from torch import Tensor, distributed
from torch.nn.functional import normalize

from longclip import dist
from longclip.objectives import Contrastive, Grouping, PrimaryComponents, Sigmoid, Term, TextConditioned
from longclip.objectives.anchored import Anchored
from longclip.objectives.balance import Balance
from longclip.objectives.beta import Beta
from longclip.objectives.contrastive import info_nce
from longclip.objectives.corners import Corners
from longclip.objectives.distilled import Distilled, Teacher
from longclip.objectives.facets import Facets
from longclip.objectives.gates import Gated
from longclip.objectives.glimpsed import Glimpsed
from longclip.objectives.grounding import Grounding
from longclip.objectives.imitated import Imitated
from longclip.objectives.late import Late
from longclip.objectives.local import LocalNegatives
from longclip.objectives.masked import Masked
from longclip.objectives.matching import Matching
from longclip.objectives.noise import NoiseAdaptive
from longclip.objectives.own_row import Choice, OwnRow
from longclip.objectives.regions import RegionChoice, Regions
from longclip.objectives.sigmoid import pairwise_sigmoid
from longclip.objectives.visualness import Visualness
from longclip.types import Embeddings, Words

IMAGES, SLOTS, WIDTH, PATCHES, TOKENS = 8, 5, 12, 9, 5  # at most so many tokens in a caption
SECOND = Teacher("second", ["second"] * 4, 3.0)
GROUPS = {"raw": slice(0, 1), "sub": slice(1, 5), "raw-wrong": slice(1, 5)}


def terms() -> dict[str, Term]:
    torch.manual_seed(0)  # the same heads on every process
    made: dict[str, Term] = {
        "single": Contrastive("raw"),
        "multi": Contrastive("sub", label_smoothing=0.1),
        "hard": Contrastive("sub", label_smoothing=0.1, margin=0.5),
        "components": PrimaryComponents("raw", k=3, label_smoothing=0.1),
        "explained": PrimaryComponents("sub", explained=0.8, renormalise=True),
        "himo": PrimaryComponents("sub", of="texts", explained=0.8, label_smoothing=0.1),
        "grouping": Grouping("sub"),
        "within": Grouping("sub", threshold=0.3, negatives="image"),
        "sigmoid": Sigmoid("sub"),
        "conditioned": TextConditioned("sub", heads=4),
        "glimpsed": Glimpsed(Contrastive("sub", label_smoothing=0.1)),
        "corners": Corners("sub", label_smoothing=0.1),
        "late": Late("sub"),
        "masked": Masked("sub", heads=4),
        "balance": Balance(),
        "beta": Beta("raw", "sub", heads=4),
        "beta_logistic": Beta("sub", form="logistic", heads=4),
        "distilled": Distilled("sub", {"one": Teacher("vector", ["vector"] * 4, 9.0), "two": SECOND}),
        "anchored": Anchored("sub"),
        "imitated": Imitated("sub"),
        "facets": Facets("vector", facets=7, width=1, shown=3),
        "weighted": Contrastive("sub", label_smoothing=0.1, image_to_text=0.75, weighted=True),
        "chosen": Contrastive("sub", margin=0.5, false_above=0.1, hardest=2),
        "gated": Gated(["raw", "sub"]),
        "noisy": NoiseAdaptive("sub", momentum=0.5),
        "told": NoiseAdaptive("sub", column="share"),
        "own_row": OwnRow("raw", "raw-wrong"),
        "choice": Choice("raw", "raw-wrong"),
        "local": LocalNegatives("raw", "raw-wrong"),
        "regions": Regions("sub"),
        "one_scale": Regions("sub", own_scale=False),
        "region_choice": RegionChoice("raw", "raw-wrong"),
        "grounding": Grounding("sub"),
        "matching": Matching("sub", queries=6, layers=1, heads=4),
        "by_patches": Matching("sub", queries=None),
        "visual": Visualness(["raw", "sub"], gated=True),
    }
    for term in made.values():
        term.build(WIDTH)
    return made


READS = {
    Imitated: {"text"},
    Grouping: {"text", "patches"},
    LocalNegatives: {"text", "patches"},
    Balance: {"routing"},
    Beta: {"text", "patches"},
    Facets: {"image"},
    Late: {"patches", "words"},
    Masked: {"text", "image", "words"},
    Regions: {"text", "patches"},
    RegionChoice: {"text", "patches"},
    Grounding: {"text", "patches"},
    Matching: {"text", "patches"},
    Glimpsed: {"text", "masked"},
    Corners: {"corners", "image"},
    TextConditioned: {"text", "patches", "image"},
}
"""What a term's gradient reaches where that is not images and texts."""


def leaves() -> tuple[dict[str, Tensor], Tensor]:
    """Raw features of the global batch; captions are ragged, and slot 4 exists nowhere."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        "image": (WIDTH,),
        "text": (SLOTS, WIDTH),
        "patches": (PATCHES, WIDTH),
        "words": (SLOTS, TOKENS, WIDTH),
    }
    features = {name: torch.randn(IMAGES, *shape, generator=random) for name, shape in shapes.items()}
    mask_BK = torch.rand(IMAGES, SLOTS, generator=random) < 0.7
    mask_BK[:, 4] = False
    mask_BK[:4, 3] = False  # absent on a whole process
    mask_BK[7] = False  # an image without any caption
    features["masked"] = torch.randn(IMAGES, WIDTH, generator=random)
    features["corners"] = torch.randn(IMAGES, SLOTS, 2, WIDTH, generator=random)
    features["routing"] = torch.randn(IMAGES, 3, 2, 4, generator=random)  # of each image in three blocks
    return features, mask_BK


def known(mask_GK: Tensor) -> dict[str, Tensor]:
    """What data know of all images beside pixels and texts: a box for most captions, weights, columns."""
    random = torch.Generator().manual_seed(1)
    start_GK2 = torch.rand(*mask_GK.shape, 2, generator=random) * 0.6
    boxes_GK4 = torch.cat([start_GK2, start_GK2 + 0.35], -1)
    boxes_GK4[torch.rand(mask_GK.shape, generator=random) < 0.2] = torch.nan
    vector_G7 = torch.randn(IMAGES, 7, generator=torch.Generator().manual_seed(2))
    vector_G7[5] = torch.nan  # a teacher that has not seen an image
    return {
        "boxes": boxes_GK4.masked_fill(~mask_GK[..., None], torch.nan),
        "weights": torch.rand(mask_GK.shape, generator=random) * mask_GK,
        "lengths": torch.randint(2, 6, mask_GK.shape, generator=random) * mask_GK,
        "share": torch.rand(IMAGES, generator=random),  # a column of numbers
        "vector": vector_G7,  # a column of vectors, as teachers make them
        "second": torch.randn(IMAGES, 5, generator=random),
    }


def embed(features: dict[str, Tensor], mask_GK: Tensor) -> tuple[Embeddings, dict[str, Tensor]]:
    """This process's part of the batch, and the leaves that its gradient reaches."""
    rows = dist.rows(IMAGES // dist.world())
    local = {name: x[rows].clone().requires_grad_() for name, x in features.items()}
    local["temperature"] = torch.tensor(2.0, requires_grad=True)
    mask_BK = mask_GK[rows].clone()
    mine = {name: x[rows] for name, x in known(mask_GK).items()}
    start = Embeddings(
        image_BE=normalize(local["image"].detach() + 1, dim=-1),
        text_BKE=normalize(local["text"].detach() + 1, dim=-1) * mask_BK[..., None],
        mask_BK=mask_BK,
        slots=GROUPS,
        scale=torch.tensor(9.0),
        gather=dist.Gather(),
    )
    embeddings = Embeddings(
        image_BE=normalize(local["image"], dim=-1),
        text_BKE=normalize(local["text"], dim=-1) * mask_BK[..., None],
        mask_BK=mask_BK,
        slots=GROUPS,
        scale=local["temperature"].exp(),
        gather=dist.Gather(),
        patches_BPE=local["patches"],
        grid=(3, 3),
        masked_BE=normalize(local["masked"], dim=-1),
        corners_BKME=normalize(local["corners"], dim=-1) * mask_BK[..., None, None],
        words=Words(
            local["words"][torch.arange(TOKENS) < mine["lengths"][..., None]], mine["lengths"].int().numpy()
        ),
        routing_A2N=local["routing"].exp().sum(0),
        start=start,
        boxes_BK4=mine["boxes"],
        weights_BK=mine["weights"],
        columns={name: mine[name] for name in ("share", "vector", "second")},
    )
    return embeddings, local


def judge() -> Results:
    """Value, measures and gradients of every term on this process's part of the batch."""
    features, mask_GK = leaves()
    embeddings, local = embed(features, mask_GK)
    results = {}
    for name, term in terms().items():
        loss = term(embeddings)
        inputs = {**local, **dict(term.named_parameters())}
        grads = torch.autograd.grad(
            loss.value, list(inputs.values()), retain_graph=True, materialize_grads=True
        )
        results |= {f"{name}/value": loss.value.detach()}
        results |= {f"{name}/measure/{key}": value for key, value in loss.measures.items()}
        results |= {f"{name}/grad/{key}": grad for key, grad in zip(inputs, grads, strict=True)}
    return results | exact(features, mask_GK) | collectives(embeddings)


def exact(features: dict[str, Tensor], mask_GK: Tensor) -> Results:
    """The pure losses in float64, where a wrong sum cannot hide behind rounding."""
    own, results = dist.rows(IMAGES // dist.world()), {}
    image, text = (features[name][own].double().requires_grad_() for name in ("image", "text"))
    scale, bias = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (3.0, -2.0))
    losses = {
        "softmax": info_nce(dist.gather(image), text, mask_GK, scale, 0.1, 0.5)[0],
        "sigmoid": pairwise_sigmoid(dist.gather(image), text, mask_GK[own], scale, bias) * dist.world(),
    }
    inputs = {"image": image, "text": text, "scale": scale, "bias": bias}
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True)
        results |= {f"{name}/exact": loss.detach()}
        results |= {f"{name}/exact/{key}": grad for key, grad in zip(inputs, grads, strict=True)}
    return results


def collectives(embeddings: Embeddings) -> Results:
    """What the plain functions say, and whether `Gather` asks once for one tensor."""
    once, twice = embeddings.all_images(), embeddings.all_images()
    mine = torch.tensor([[dist.rank()]])
    return {
        "rank": torch.tensor(dist.rank()),
        "world": torch.tensor(dist.world()),
        "order": dist.gather(mine),
        "mask": dist.gather(embeddings.mask_BK),
        "shared": torch.tensor(once is twice),
        "sent": dist.exchange(torch.arange(dist.world())[:, None] + 10 * dist.rank()),
    }


def merge(parts: list[Results], key: str) -> Tensor:
    """What data parallelism makes of the processes' results: the mean, features joined."""
    if key.split("/")[-1] in leaves()[0]:
        return torch.cat([part[key] for part in parts]) / len(parts)
    return torch.stack([part[key] for part in parts]).mean(0)


def check(parts: list[Results]) -> None:
    whole = judge()
    keys = [key for key in whole if "/" in key]
    got, want = {key: merge(parts, key) for key in keys}, {key: whole[key] for key in keys}
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    fine = [key for key in keys if "/exact" in key]
    got, want = {key: got[key] for key in fine}, {key: want[key] for key in fine}
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for rank, part in enumerate(parts):
        assert part["rank"] == rank
        assert part["world"] == len(parts)
        assert part["order"].flatten().tolist() == list(range(len(parts)))
        assert torch.equal(part["mask"], leaves()[1])
        assert part["shared"]
        assert part["sent"].flatten().tolist() == [rank + 10 * sender for sender in range(len(parts))]


def test_two_processes_equal_one(tmp_path):
    check(spawn(judge, 2, tmp_path))


def test_four_processes_equal_one(tmp_path):
    check(spawn(judge, 4, tmp_path))


def test_one_process_gathers_nothing():
    x = torch.randn(3, 2)
    assert dist.gather(x) is x
    assert dist.exchange(x) is x
    assert dist.Gather()(x) is x
    assert (dist.rank(), dist.world(), dist.rows(3)) == (0, 1, slice(0, 3))
    assert not distributed.is_initialized()


def test_every_term_teaches_what_it_reads():
    """So that the agreement above is not one of zeros."""
    whole = judge()
    for name, term in terms().items():
        learns = {*READS.get(type(term), {"text", "image"}), *dict(term.named_parameters())}
        grads = {key: whole[f"{name}/grad/{key}"] for key in (*leaves()[0], *learns)}
        assert {key for key, grad in grads.items() if grad.abs().max() > 1e-4} == learns, name


def test_gather_keeps_tensors_apart_that_follow_each_other():
    gather = dist.Gather()
    sums = [gather(torch.full((2,), float(i))).sum().item() for i in range(50)]
    assert sums == [2.0 * i for i in range(50)]
