"""Facets: what is stored is the model's own state at the right token, and a recipe trains on it."""

import json

import pytest
import torch

from longclip import cli
from longclip.data.sidecars.store import Store, digests
from longclip.data.tars.dataset import Dataset
from longclip.facets import PROMPTS, facets
from longclip.types import UserError

transformers = pytest.importorskip("transformers", reason="pip install longclip[huggingface]")
WIDTH = 8
ASK = ("Words: {caption} In one word:", "{caption}")


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """`language(kind, length)`: a folder of a tiny language model whose tokens are characters."""

    def make(kind="gpt2", length=900):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        folder = tmp_path_factory.mktemp(kind)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: number for number, token in enumerate([*alphabet, "<end>"])}
        tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokens.decoder = decoders.ByteLevel()
        transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>").save_pretrained(
            folder
        )
        torch.manual_seed(0)
        sizes = {"vocab_size": len(vocabulary), "bos_token_id": 256, "eos_token_id": 256}
        config = transformers.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=length, **sizes)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
        return str(folder)

    return make


@pytest.mark.parametrize(("pool", "batch_size"), [("last", 5), ("mean", 64)])
def test_a_facet_is_the_models_state_under_its_prompt(language, scenes, tmp_path, pool, batch_size):
    name = language()
    report = facets(
        name, str(scenes / "heldout"), tmp_path / "out", prompts=ASK, pool=pool, batch_size=batch_size
    )
    assert (report.facets, report.width, report.cut, report.damaged) == (2, WIDTH, 0, 0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    model = transformers.AutoModel.from_pretrained(name).eval()
    data, store = Dataset(scenes / "heldout"), Store(tmp_path / "out")
    for number in (0, 7, 23):
        record = data.record(number)
        (row,) = store.rows(digests([record.key]))
        stored_Fd = torch.tensor(store.vector("facets", row))
        for prompt, stored_d in zip(ASK, stored_Fd.view(2, WIDTH), strict=True):
            text = prompt.replace("{caption}", record.captions[0].text)
            with torch.no_grad():  # alone, so without padding
                state_Td = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            expected_d = state_Td[-1] if pool == "last" else state_Td.mean(0)
            torch.testing.assert_close(stored_d, expected_d, atol=1e-5, rtol=1e-5)


def test_captions_that_are_too_long_lose_their_last_sentences(language, scenes, tmp_path):
    captions = [Dataset(scenes / "heldout").record(n).captions[0] for n in range(24)]
    room = sorted(len(caption.text) for caption in captions)[11]
    report = facets(language(length=room), str(scenes / "heldout"), tmp_path / "out", prompts=["{caption}"])
    assert report.cut == sum(len(caption.text) > room for caption in captions)
    with pytest.raises(
        UserError, match="reads 5 tokens, too few for a prompt and the caption's first sentence"
    ):
        facets(language(length=5), str(scenes / "heldout"), tmp_path / "none")


def test_the_command_says_what_to_type_next_and_the_recipe_trains(
    language, scenes, tiny, tmp_path, monkeypatch, capsys
):
    import project

    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(ASK) + "\n\n")
    out = tmp_path / "out"
    command = ["facets", language(), str(scenes / "train"), "--out", str(out), "--prompts", "prompts.txt"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "96 images, 0 damaged ones left out" in said
    assert f"facets: 2 x {WIDTH} numbers an image, 0 without a caption" in said
    assert json.loads((out / "sidecar.json").read_text())["rows"] == 96
    (following,) = [line.removeprefix("next: ") for line in said.splitlines() if line.startswith("next: ")]
    printed = project.typed(following, *project.SMALL, "benchmark=none", "data.judge=[heldout]", "name=flame")
    assert "term facets (not exported)" in printed


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"prompts": ["In one word:"]}, r"a prompt says with \{caption\} where"),
        ({"pool": "first"}, "pool is 'first'; it is last or mean"),
        ({"model": "/no/model"}, "transformers cannot open '/no/model' as a language model"),
    ],
)
def test_what_cannot_be_asked_is_refused(language, scenes, tmp_path, more, words):
    arguments = {"model": language(), "prompts": ASK} | more
    with pytest.raises(UserError, match=words):
        facets(shards=str(scenes / "heldout"), out=tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_every_prompt_of_ours_asks_something_else():
    assert len(set(PROMPTS)) == 7
    assert all(prompt.count("{caption}") == 1 for prompt in PROMPTS)
