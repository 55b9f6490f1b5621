"""What a population writes in one batched generate is what each member writes alone."""

import runpy
from pathlib import Path

import pytest
import torch

import flipout
from flipout.evolution import EvolutionStrategy, TokenReward

transformers = pytest.importorskip("transformers")

EXAMPLE = Path(__file__).parents[2] / "examples" / "es_language_model.py"


def small_model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=9, n_positions=12, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None, pad_token_id=8,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double().eval()


def test_the_population_writes_what_its_members_write():
    model, prompts, seen = small_model(), torch.randint(8, (3, 4)), []

    def reward(asked, written):
        seen.append((asked, written))
        return written.sum(1)

    es = EvolutionStrategy(model, 0.3, 8, seed=1)
    fitness = es.evaluate(TokenReward(reward, prompts, 5, pad_token_id=8))
    asked, written = seen[0]
    assert torch.equal(asked, prompts.repeat(8, 1))
    assert written.shape == (24, 5)
    assert len(written.unique(dim=0)) > 3  # members do differ
    for n in range(8):
        alone = es.member(0, n).generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=5, do_sample=False, pad_token_id=8
        )  # fmt: skip
        assert torch.equal(written[3 * n : 3 * n + 3], alone[:, 4:])
        assert fitness[n] == pytest.approx(float(alone[:, 4:].sum(1).float().mean()))


def test_prompts_may_change_with_the_generation_and_are_checked():
    evaluate = TokenReward(lambda asked, written: written.sum(1), lambda generation: torch.full((2, 3), generation), 2)
    assert [int(evaluate.prompts(generation)[0, 0]) for generation in range(2)] == [0, 1]
    es = EvolutionStrategy(small_model(), 0.3, 4)
    for bad in (torch.ones(3), torch.ones(2, 3), [[1, 2]]):
        with pytest.raises(flipout.ArgumentError, match="expected token ids"):
            es.evaluate(TokenReward(lambda asked, written: written.sum(1), bad, 2))


def test_the_example_learns_to_sort():
    before, after = runpy.run_path(str(EXAMPLE))["train"](generations=25, population=128, batch=16)
    assert after > max(before, 1 / 6)  # better than chance among six digits
