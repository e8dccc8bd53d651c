"""Each training stage runs, and a killed stage ends like an uninterrupted one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from demo import data, export, progress, train_text, train_transformer, vae
from demo.data import Resolution
from demo.progress import Log, remaining_steps, warm_flat_cosine
from demo.text import T5_PAD, build_text_encoders, tokenize
from demo.transformer import build, pad_bias

TINY = Resolution((32, 48), scenes=4, share=1.0, batch=2)


class Killed(Exception):
    pass


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "train.log")


@pytest.fixture
def always_saved(monkeypatch):
    monkeypatch.setattr(progress, "SAVE_SECONDS", 0.0)


def weights(module):
    return torch.cat([value.flatten().float() for value in module.state_dict().values()])


def walk(path, kill_at=None, total=6):
    """Train one layer a little; return its weights."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 3)
    optimiser = torch.optim.Adam(layer.parameters())
    parts = {"layer": layer, "optimiser": optimiser}
    for step in remaining_steps(total, path, parts, seed=5):
        optimiser.zero_grad()
        layer(torch.randn(4, 3)).square().mean().backward()
        optimiser.step()
        if step == kill_at:
            raise Killed
    return weights(layer)


def test_a_killed_loop_ends_like_an_uninterrupted_one(tmp_path, always_saved):
    with pytest.raises(Killed):
        walk(tmp_path / "killed.pt", kill_at=3)
    torch.testing.assert_close(
        walk(tmp_path / "killed.pt"), walk(tmp_path / "unbroken.pt"), rtol=0, atol=0
    )


def test_a_finished_loop_does_nothing(tmp_path):
    walk(tmp_path / "done.pt")
    before = (tmp_path / "done.pt").stat().st_mtime_ns
    walk(tmp_path / "done.pt", kill_at=0)
    assert (tmp_path / "done.pt").stat().st_mtime_ns == before


def test_the_learning_rate_rises_stays_and_falls():
    rates = [warm_flat_cosine(step, 100, warm=10, flat=0.4) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[10:40] == [1.0] * 30
    assert all(later < earlier for earlier, later in pairwise(rates[40:]))
    assert rates[-1] < 0.01


def test_vae_and_data_and_folder(tmp_path, log):
    phases = (vae.Phase(2, 32, 2), vae.Phase(1, 128, 2))
    codec = vae.train(tmp_path, log, phases, measured=8)
    again = vae.train(tmp_path, log, phases, measured=8)
    torch.testing.assert_close(weights(codec), weights(again), rtol=0, atol=0)
    codec.save_pretrained(tmp_path / "vae")
    examples = data.make(tmp_path, log, (TINY,), processes=1)[TINY]
    assert examples.latents.shape == (4, 6, 32)
    clean, tokens = examples.pick(2)
    assert clean.shape == (2, 6, 32) and tokens.clip.shape == tokens.t5.shape == (2, 24)
    size = export.save(
        codec, train_transformer.Model(build(), build_text_encoders()), tmp_path / "out"
    )
    assert 1_000_000 < size < 8_000_000


def test_text_training_runs_and_resumes(tmp_path, log):
    first = train_text.train(tmp_path, log, steps=2)
    again = train_text.train(tmp_path, log, steps=2)
    torch.testing.assert_close(
        weights(first.text_encoder_2), weights(again.text_encoder_2), rtol=0, atol=0
    )


def examples_of_noise():
    text = build_text_encoders()
    tokens = tokenize(text.tokenizer, text.tokenizer_2, ["a red star"] * 24)
    torch.manual_seed(1)
    latents = torch.randn(4, 6, 32)
    return data.Examples(latents, tokens.clip.view(4, 6, -1), tokens.t5.view(4, 6, -1))


def trained(work, log, score=None):
    torch.manual_seed(2)
    work.mkdir(exist_ok=True)
    text, resolutions = build_text_encoders(), {TINY: examples_of_noise()}
    return train_transformer.train(
        work, log, text, resolutions, steps=2, score=score, compiled=False
    )


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_transformer_training_survives_a_kill(tmp_path, log, always_saved, monkeypatch):
    calls = []

    def kill(_model):
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return "scored"

    unbroken = trained(tmp_path / "unbroken", log)
    monkeypatch.setattr(train_transformer, "SCORE_EVERY", 1)
    with pytest.raises(Killed):
        trained(tmp_path / "killed", log, score=kill)
    resumed = trained(tmp_path / "killed", log)
    for name, module in resumed.modules.items():
        torch.testing.assert_close(weights(module), weights(unbroken.modules[name]))


@torch.no_grad()
def test_words_and_pads_do_not_attend_to_each_other():
    text = build_text_encoders()
    few = tokenize(text.tokenizer, text.tokenizer_2, ["a red star", "two words"]).t5
    many = torch.cat([few, torch.full((2, 40), T5_PAD)], dim=1)
    narrow, wide = text.words(few), text.words(many)
    torch.testing.assert_close(wide[:, :24], narrow, rtol=1e-4, atol=1e-5)
    pads = wide[many == T5_PAD]
    torch.testing.assert_close(pads, pads[:1].expand_as(pads), rtol=1e-4, atol=1e-5)


def test_pad_bias_makes_few_pads_weigh_like_many():
    text = build_text_encoders()
    tokens = tokenize(text.tokenizer, text.tokenizer_2, ["a red star"]).t5
    bias = pad_bias(tokens)
    assert (bias[tokens != T5_PAD] == 0).all()
    weight = bias[tokens == T5_PAD].exp().sum().item()
    assert 1.99 < weight < 512.01
