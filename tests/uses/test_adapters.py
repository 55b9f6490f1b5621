"""Posteriors over adapters: peft's on a small model of transformers, with what it promises of them."""

import copy

import pytest
import torch
from torch import nn

import flipout
from flipout import ArgumentError, bayes

peft = pytest.importorskip("peft", reason="needs peft: pip install --no-deps peft")
transformers = pytest.importorskip("transformers")


def classifier():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=12,
    )  # fmt: skip
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    return peft.get_peft_model(transformers.BertForSequenceClassification(config), lora)


def writer():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)


def tokens(rows=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (rows, 8), generator=g)
    return ids, (ids[:, 0] > 6).long() + (ids[:, 0] > 13).long()


def test_adapters_and_head_alone_are_random():
    net = bayes.random_adapters(classifier(), std=0.1)
    trained = {name for name, p in net.module.named_parameters() if p.requires_grad}
    assert set(net.noises) == trained
    assert any("lora_A" in name for name in trained)
    assert any("classifier" in name for name in trained)


@pytest.mark.parametrize("make", [classifier, writer], ids=["encoder", "decoder"])
def test_every_sequence_is_one_function(make):
    net, (ids, _) = bayes.random_adapters(make(), std=0.3).eval(), tokens(4)
    report = flipout.verify(net, input_ids=ids)
    assert report
    with net.hold(4) as draw, torch.no_grad():
        together = net(input_ids=ids).logits
        for n in range(4):
            torch.testing.assert_close(draw.module(n)(input_ids=ids[n : n + 1]).logits[0], together[n], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["ivon", "backprop"])
def test_training_moves_adapters_and_nothing_else(way):
    net, (ids, labels) = bayes.random_adapters(classifier(), std=0.05), tokens(48)
    before = copy.deepcopy(net.module.state_dict())
    if way == "ivon":
        optimiser = bayes.IVON(net, lr=2.0, effective_sample_size=48, temperature=0.01, betas=(0.9, 0.99), hess_init=0.1)
    else:
        optimiser = torch.optim.Adam(net.parameters(), 0.02)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(net(input_ids=ids).logits, labels)
        losses.append(loss.item())
        if way == "backprop":
            loss = bayes.elbo_loss(loss, bayes.kl_divergence(net, torch.distributions.Normal(0.0, 0.5)), 48, 0.1).loss
        loss.backward()
        optimiser.step()
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for name, value in net.module.state_dict().items():
        random = name in net.noises
        assert torch.equal(value, before[name]) is not random, name


def test_the_mean_merges_into_a_plain_model():
    net, (ids, _) = bayes.random_adapters(classifier(), std=0.3).eval(), tokens(4)
    for name, parameter in net.module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    expected = net(input_ids=ids).logits
    plain = copy.deepcopy(net.module).merge_and_unload()
    assert isinstance(plain, transformers.BertForSequenceClassification)
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_text_is_written_under_one_draw():
    net = bayes.random_adapters(writer(), std=0.5).eval()
    prompt = torch.full((4, 3), 7)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    with flipout.perturbed(net.module, bayes.fixed_noise(net), members=4, unmet="ignore") as draw:
        written = net.module.generate(input_ids=prompt, **options)
        alone = draw.module(2).generate(input_ids=prompt[:1], **{**options, "attention_mask": torch.ones(1, 3).long()})
    assert len({tuple(row.tolist()) for row in written}) > 1
    assert torch.equal(written[2, : alone.shape[1]], alone[0])


def test_refuses_models_without_adapters():
    with pytest.raises(ArgumentError, match="has no adapters"):
        bayes.random_adapters(nn.Linear(3, 2))
    model = classifier()
    with pytest.raises(ArgumentError, match="has no adapters"):
        bayes.random_adapters(copy.deepcopy(model).merge_and_unload())
    with pytest.raises(ArgumentError, match="chooses the parameters"):
        bayes.random_adapters(model, include="*")
    with pytest.raises(ArgumentError, match="not a str"):
        bayes.random_adapters("bert")
    with pytest.raises(ArgumentError, match="is trained"):
        bayes.random_adapters(model.requires_grad_(False))
    with pytest.raises(ArgumentError, match="Gaussian noise alone"):
        bayes.fixed_noise(flipout.Perturbed(nn.Linear(3, 2), flipout.Rademacher(0.1, learnable=True)))
