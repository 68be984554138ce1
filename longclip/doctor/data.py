"""Are the shards whole, do they fit the model, and does training see what judging asks?

In: folders of shards on this machine. Out: findings. One pass over the indexes, which holds one of them at a
time; with `deep` the tars are read as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..data.tars.index import LIST, UNFINISHED, Index, Shard, digests, parse_list, read_index
from ..towers import configs
from ..types import UserError
from .findings import Finding
from .overlap import Overlap

NAMED = 3  # faults of a folder that are named; the others are counted

See = Callable[[Path, Index], None]


def data(train: Sequence[str], benchmarks: Sequence[str], model: str, deep: bool) -> Iterator[Finding]:
    """All findings about these folders; those that judge come first, so that training can be compared."""
    trains: dict[Path, bool] = {}
    for given in (*train, *benchmarks):
        inner = folders(Path(given))
        if not inner:
            seen = f"{given} is no folder on this machine with shards in it"
            yield Finding("problem", "data", seen, "*.tar, or folders of them", "longclip shards SRC ...")
        for folder in inner:
            trains[folder] = given in train and (folder == Path(given) or folder.name.startswith("train"))
    overlap, wanted = Overlap(deep), configs.tokenizer(model).name_hash
    for folder in sorted(trains, key=lambda folder: trains[folder]):
        made_by = Counter[str]()
        compare = overlap.train if trains[folder] else overlap.judge
        yield from health(folder, partial(_see, made_by, compare), deep)
        yield from tokenizer(folder, made_by, model, wanted)
    if len(set(trains.values())) == 2:
        yield from overlap.findings()


def _see(made_by: Counter[str], compare: See, tar: Path, index: Index) -> None:
    made_by[index.tokenizer] += index.samples
    compare(tar, index)


def folders(root: Path) -> list[Path]:
    """`root` itself or the folders in it that hold shards, or begin to."""
    inner = [root, *sorted(root.iterdir())] if root.is_dir() else []
    found = [folder for folder in inner if folder.is_dir() and _holds_shards(folder)]
    return found[:1] if found and found[0] == root else found


def _holds_shards(folder: Path) -> bool:
    marks = ("*.tar", "*.index.json", LIST, UNFINISHED)
    return any(next(folder.glob(mark), None) is not None for mark in marks)


def health(folder: Path, see: See, deep: bool) -> Iterator[Finding]:
    """Every index against its tar and against the list; `see` is called with each shard that is whole."""
    again = f"rm -r {folder}, and longclip shards ... again"
    if (folder / UNFINISHED).exists():
        seen = f"{folder} is UNFINISHED: its conversion was interrupted or still runs"
        yield Finding("problem", "shards", seen, "a finished folder", "the same longclip shards ... again")
        return
    listed, faults = _listed(folder)
    if not (folder / LIST).exists():
        seen = f"{folder} has no {LIST}: it can be read on this machine, but not by URL"
        yield Finding("warning", "shards", seen, "a list of the shards", again)
    samples = captions = size = 0
    tars = sorted({*folder.glob("*.tar"), *_indexed(folder), *(folder / name for name in listed)})
    for tar in tars:
        try:
            index = read_index(tar)
        except UserError as error:
            faults.append(str(error))
            continue
        differences = _differences(tar, index, listed, deep)
        faults += differences
        samples, captions, size = samples + index.samples, captions + index.captions, size + index.bytes
        if not differences:
            see(tar, index)
    yield from (Finding("problem", "shards", fault, "", again) for fault in faults[:NAMED])
    if len(faults) > NAMED:
        yield Finding("problem", "shards", f"{folder}: {len(faults) - NAMED} more like these", "", again)
    if not faults:
        how = "checksums equal" if deep else "sizes equal; --deep reads every byte"
        seen = (
            f"{folder}: {len(tars):,} shards, {samples:,} images, {captions:,} captions, {size / 1e6:,.1f} MB"
        )
        yield Finding("ok", "shards", f"{seen}, {how}")


def _indexed(folder: Path) -> Iterator[Path]:
    """The tars that an index speaks of."""
    return (path.with_suffix("").with_suffix(".tar") for path in folder.glob("*.index.json"))


def _listed(folder: Path) -> tuple[dict[str, Shard], list[str]]:
    """The shards that `shards.json` names, and what is wrong with it."""
    path = folder / LIST
    try:
        return {shard.name: shard for shard in parse_list(path.read_bytes(), str(path))}, []
    except FileNotFoundError:
        return {}, []
    except UserError as error:
        return {}, [str(error)]


def _differences(tar: Path, index: Index, listed: Mapping[str, Shard], deep: bool) -> list[str]:
    """What a shard's list, index and (with `deep`) content say differently."""
    faults = []
    entry = Shard(tar.name, index.samples, index.captions, index.bytes, index.sha256)
    if listed and tar.name not in listed:
        faults.append(f"{tar} is not in {LIST}")
    elif listed and listed[tar.name] != entry:
        faults.append(f"{tar}: its index and {LIST} disagree ({entry[1:4]} and {listed[tar.name][1:4]})")
    if deep:
        sha256, crcs, _ = digests(tar, index.sizes)
        bad = [key for key, was, now in zip(index.keys, index.crcs, crcs, strict=True) if was != now]
        if bad:
            faults.append(f"{tar}: {len(bad)} samples have changed since they were written, first {bad[0]!r}")
        elif sha256 != index.sha256:
            faults.append(f"{tar}: its content is not what its index describes (sha256)")
    return faults


def tokenizer(folder: Path, made_by: Mapping[str, int], model: str, wanted: str) -> Iterator[Finding]:
    """Ids of another tokenizer are not wrong, only made again at every reading."""
    total, fitting = sum(made_by.values()), made_by.get(wanted, 0)
    if not total:
        return
    if fitting == total:
        yield Finding("ok", "tokenizer", f"{folder}: ids by {model}'s ({wanted})")
        return
    others = ", ".join(f"{name or 'none'} ({count:,})" for name, count in made_by.items() if name != wanted)
    yield Finding(
        "warning",
        "tokenizer",
        f"{folder}: {total - fitting:,} of {total:,} images have ids by another tokenizer: {others}",
        f"{wanted} of {model}; they are tokenised again whenever they are read",
        f"longclip shards ... --model {model}, or longclip doctor --model THEIRS",
    )
