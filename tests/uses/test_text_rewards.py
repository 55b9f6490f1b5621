"""What a population writes as strings is what each member writes alone; rewards are checked; dice belong to their rows."""

import math
import pickle

import pytest
import torch
from text_tasks import dies, lengths

import flipout
from flipout.errors import EvaluationError
from flipout.evolution import EvolutionStrategy, TextRewards, character_tokenizer

transformers = pytest.importorskip("transformers")

from flipout.evolution.decoding import Sampling  # noqa: E402

TOKENIZER = character_tokenizer("abcdef ")
PROMPTS = ["a", "fed cab", "bad"]


def make(std=0.6, **options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(TOKENIZER), n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1, pad_token_id=0,
        initializer_range=std, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double().eval()


def count(prompts, texts):
    return [text.count("a") - text.count("f") / 2 for text in texts]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.5}, {"temperature": 2.0, "top_k": 5, "top_p": 0.9}], ids=str)
def test_the_population_writes_what_its_members_write(sampling):
    seen = []

    def reward(prompts, texts):
        seen.extend(zip(prompts, texts, strict=True))
        return count(prompts, texts)

    model, rewards = make(), TextRewards(TOKENIZER, reward, PROMPTS, 8, seed=2, **sampling)
    es = EvolutionStrategy(model, 0.2, 6, seed=1)
    fitness = es.evaluate(rewards)
    table, written = rewards.table, [text for _, text in seen]
    assert [prompt for prompt, _ in seen] == PROMPTS * 6
    assert len(set(written)) > 8
    assert any(len(text) < 8 for text in written)  # some end early
    assert fitness.tolist() == table.mean(1).tolist()
    seen.clear()  # in other chunks of prompts and of members: the same texts
    other = TextRewards(TOKENIZER, reward, PROMPTS, 8, seed=2, prompts_at_once=2, **sampling)
    assert torch.equal(EvolutionStrategy(model, 0.2, 6, seed=1, chunk=4).evaluate(other), fitness)
    assert [text for _, text in seen] == written
    if not sampling:
        for n in (1, 4):
            assert rewards.write(es.member(0, n), PROMPTS) == written[3 * n : 3 * n + 3]


def test_padding_changes_nothing():
    model, rewards = make(), TextRewards(TOKENIZER, count, PROMPTS, 6)
    together = rewards.write(model, PROMPTS)
    for prompt, text in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
        row = alone[0, ids.shape[1] :].tolist()
        assert text == TOKENIZER.decode(row[: row.index(1)] if 1 in row else row, skip_special_tokens=True)


def test_sampled_texts_follow_the_model():
    """The first token's frequencies against the softmax, by a z-score each; both members of a pair have the same dice."""
    model, seen = make(0.3), []

    def note(prompts, texts):
        seen.extend(texts)
        return [0.0] * len(texts)

    rewards = TextRewards(TOKENIZER, note, ["cab"] * 4000, 1, temperature=1.3)
    rewards.rewards(model)
    ids = torch.tensor([TOKENIZER("cab")["input_ids"]])
    law = (model(ids).logits[0, -1].detach() / 1.3).softmax(-1)
    for character in "abcdef ":
        p = float(law[TOKENIZER(character)["input_ids"][0]])
        assert abs(seen.count(character) / 4000 - p) / math.sqrt(p * (1 - p) / 4000) < 4.5
    seen.clear()
    EvolutionStrategy(model, 1e-9, 4).evaluate(TextRewards(TOKENIZER, note, PROMPTS, 9, temperature=1.0))
    first, second, third = seen[:3], seen[3:6], seen[6:9]
    assert first == second != third


def test_truncated_laws():
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    dice = (torch.arange(100, dtype=torch.float64) + 0.5) / 100

    def shares(**sampling):
        chosen = Sampling(1.0, **sampling).choose(scores.expand(100, 4), dice)
        return torch.bincount(chosen, minlength=4).tolist()

    assert shares() == [50, 30, 15, 5]
    assert [round(share, -1) for share in shares(top_k=2)] == [60, 40, 0, 0]
    assert shares(top_p=0.5) == [100, 0, 0, 0]
    assert shares(top_p=0.51)[2:] == [0, 0]
    for bad in ({"temperature": -1.0}, {"temperature": 1.0, "top_k": 0}, {"temperature": 1.0, "top_p": 0.0}):
        with pytest.raises(flipout.ArgumentError, match=list(bad)[-1]):
            Sampling(**bad)


def test_zscores_are_per_prompt_over_the_whole_population():
    def reward(prompts, texts):  # one prompt's rewards are a hundred times larger
        return [(100 if prompt == "a" else 1) * len(text) for prompt, text in zip(prompts, texts, strict=True)]

    rewards = TextRewards(TOKENIZER, reward, PROMPTS, 8, temperature=1.0)
    es = EvolutionStrategy(make(), 0.2, 8, chunk=2, fitness_shaping=rewards.zscore)
    es.step(rewards)
    table = rewards.table
    assert table.shape == (8, 3)
    z = (table - table.mean(0)) / table.std(0, unbiased=False)
    torch.testing.assert_close(rewards.zscore(table.mean(1)), z.mean(1))
    with pytest.raises(flipout.ArgumentError, match="shapes the fitness"):
        rewards.zscore(torch.ones(8))
    flat = TextRewards(TOKENIZER, lambda p, texts: [float(prompt == "a") for prompt in p], PROMPTS, 2)
    flat(make(), _members())
    assert flat.zscore(flat.table.mean(1)).tolist() == [0.0] * 4


def _members():
    with EvolutionStrategy(make(), 0.1, 4).ask() as members:
        return members


def test_prompts_with_answers_and_prompts_of_a_generation():
    def reward(prompts, texts):
        return [float(prompt["answer"]) for prompt in prompts]

    rewards = TextRewards(
        TOKENIZER, reward, lambda generation: [{"prompt": "a", "answer": generation}, {"prompt": "b", "answer": 1}], 2
    )
    assert rewards.rewards(make(), generation=3).tolist() == [3, 1]


def test_rewards_in_other_processes():
    here, there = (TextRewards(TOKENIZER, lengths, PROMPTS, 5, processes=n) for n in (0, 2))
    try:
        assert torch.equal(here.rewards(make()), there.rewards(make()))
        pickle.loads(pickle.dumps(there))
        there._rewarder.reward = dies
        with pytest.raises(EvaluationError, match="has died"):
            there.rewards(make())
    finally:
        there.close()
    with pytest.raises(flipout.ArgumentError, match="top level of a module"):
        TextRewards(TOKENIZER, lambda p, t: [0] * len(t), PROMPTS, 5, processes=1)


def boom(prompts, texts):
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("reward", "error", "told"),
    [
        (boom, EvaluationError, "boom raised KeyError on 3 texts"),
        (lambda p, t: [math.nan, 1.0, 1.0], flipout.ArgumentError, "returned nan for 1 of 3 texts"),
        (lambda p, t: "good", flipout.ArgumentError, "returned a str"),
        (lambda p, t: ["good"] * 3, flipout.ArgumentError, "not a number for each of 3"),
        (lambda p, t: [1.0, 2.0], flipout.ArgumentError, r"returned \(2,\) numbers for 3"),
        (lambda p, t: None, flipout.ArgumentError, "returned a NoneType"),
        ("len", flipout.ArgumentError, "reward='len' is a str"),
    ],
)
def test_rewards_that_are_none_are_told(reward, error, told):
    with pytest.raises(error, match=told):
        TextRewards(TOKENIZER, reward, PROMPTS, 2).rewards(make())


def test_models_and_prompts_that_do_not_fit_are_told():
    bert = transformers.BertModel(
        transformers.BertConfig(vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).eval()
    good = TextRewards(TOKENIZER, count, PROMPTS, 4)
    for model, told in ((bert, "cannot write"), (make().train(), "training mode"), (make(attn_pdrop=0.1).train(), "model.eval")):
        with pytest.raises(flipout.ArgumentError, match=told):
            good.rewards(model)
    with pytest.raises(flipout.ArgumentError, match=r"prompt 1 has 15 tokens, and with max_new_tokens=4 .* 16 positions"):
        good.rewards(make(), ["a", "b" * 15])
    with pytest.raises(flipout.ArgumentError, match="prompt 0, '', has no tokens"):
        good.rewards(make(), [""])
    other = TextRewards(character_tokenizer("abcdefghijkl"), count, ["l"], 2)
    with pytest.raises(flipout.ArgumentError, match="tokenizer is of another model"):
        other.rewards(make())
    for bad in ("abc", [], [1], [{"text": "a"}]):
        with pytest.raises(flipout.ArgumentError, match="prompt"):
            TextRewards(TOKENIZER, count, bad, 2).rewards(make())
    plain = character_tokenizer("abc")
    plain.pad_token = None
    with pytest.raises(flipout.ArgumentError, match="no padding token"):
        TextRewards(plain, count, PROMPTS, 2)
    TextRewards(plain, count, PROMPTS, 2, pad_token_id=1)
    with pytest.raises(flipout.ArgumentError, match="do_sample= is set"):
        TextRewards(TOKENIZER, count, PROMPTS, 2, do_sample=True)
