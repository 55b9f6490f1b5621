"""The Trainer without a gradient: its loss, its step, accumulation, checkpoints; what it cannot take apart is told."""

import pytest
import torch
from torch import nn

import flipout
from flipout.evolution import ZerothOrder

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from flipout.evolution import ZerothOrderTrainer  # noqa: E402

WORDS, LENGTH = 11, 6


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


def language_model(**options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **options
    )
    return transformers.GPT2LMHeadModel(config)


def classifier():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=LENGTH, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def texts(rows=16):
    tokens = torch.randint(WORDS, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    for i, row in enumerate(labels):
        row[: i % 4] = -100  # some tokens count nothing
    return [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]


def classes(rows=16):
    tokens = torch.randint(WORDS, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row[0] % 3} for row in tokens]


def arguments(folder, **options):
    given = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "seed": 0,
        "disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.01, "optim": "sgd", "lr_scheduler_type": "linear",
        "logging_steps": 1, "max_grad_norm": 0.0, **options,
    }  # fmt: skip
    return transformers.TrainingArguments(**given)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("make", "rows"), [(language_model, texts), (classifier, classes)], ids=["tokens", "classes"])
@pytest.mark.parametrize("directions", ["example", 2])
def test_a_step_is_the_zeroth_order_gradient_of_the_models_own_loss(make, rows, directions, tmp_path):
    """In the limit of one example a batch, the loss needs no taking apart: the two agree."""
    settings = {"std": 0.05, "directions": directions, "seed": 7}
    model = make().eval()
    model.accepts_loss_kwargs = False  # the mean over the labels of each micro-batch
    trainer = ZerothOrderTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=1),
        train_dataset=rows(1),
        zeroth_order=settings,
    )
    other = make().eval()

    def losses(module, batch):
        positions = torch.arange(LENGTH).expand(batch["input_ids"].shape)
        if directions == "example":
            return module(**batch, position_ids=positions).loss.view(1)
        found = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(2)]
        logits = module(**{**batch, "position_ids": positions}).logits
        return torch.stack([own(other, logits[i : i + 1], each["labels"]) for i, each in enumerate(found)])

    trainer.train()
    batch = {name: value[None] for name, value in rows(1)[0].items()}
    ZerothOrder(other, **settings).backward(losses, batch)
    torch.optim.SGD(other.parameters(), lr=0.01).step()
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-4, atol=1e-6)


def own(model, logits, labels):
    kind = nn.functional.cross_entropy
    return kind(logits[0, :-1], labels[0, 1:]) if logits.dim() == 3 else kind(logits, labels)


def test_accumulated_micro_batches_are_one_batch(tmp_path):
    """The mean of many accumulated steps is that of whole batches: here by the loss, which does not depend on directions."""
    logged = []
    for size, steps in ((8, 1), (2, 4)):
        trainer = ZerothOrderTrainer(
            model=language_model(), train_dataset=texts(8), zeroth_order={"std": 1e-4},
            args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps),
        )  # fmt: skip
        trainer.train()
        logged.append(next(line["loss"] for line in trainer.state.log_history if "loss" in line))
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    plain = transformers.Trainer(
        model=language_model(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), train_dataset=texts(8),
        args=arguments(tmp_path, max_steps=1, per_device_train_batch_size=8),
    )  # fmt: skip
    plain.train()
    assert logged[0] == pytest.approx(next(line["loss"] for line in plain.state.log_history if "loss" in line), rel=1e-3)


def test_goes_on_from_a_checkpoint_to_the_same_bits_and_evaluates(tmp_path):
    def train(folder, resume=None):
        model = language_model()
        trainer = ZerothOrderTrainer(
            model=model, train_dataset=texts(), eval_dataset=texts(4), zeroth_order={"std": 0.01},
            args=arguments(folder, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, max_grad_norm=1.0),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        assert [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
        return weights(model)

    whole = train(tmp_path / "whole")
    assert torch.equal(train(tmp_path / "resumed", str(tmp_path / "whole/checkpoint-2")), whole)


def test_it_learns(tmp_path):
    row = {"input_ids": torch.arange(LENGTH), "labels": torch.arange(LENGTH)}
    trainer = ZerothOrderTrainer(
        model=language_model(), train_dataset=[row] * 64, zeroth_order={"std": 1e-3},
        args=arguments(tmp_path, max_steps=30, per_device_train_batch_size=64, optim="adamw_torch", learning_rate=0.02),
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < 0.75 * losses[0]


def test_losses_that_cannot_be_taken_apart_are_told(tmp_path):
    class More(transformers.GPT2LMHeadModel):
        def forward(self, input_ids=None, labels=None, **kwargs):
            found = super().forward(input_ids=input_ids, labels=labels, **kwargs)
            found.loss = found.loss + 1
            return found

    def train(model, rows, **options):
        ZerothOrderTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=rows, **options).train()

    with pytest.raises(flipout.ArgumentError, match="its loss has more in it"):
        train(More(language_model().config), texts())
    with pytest.raises(flipout.ArgumentError, match="compute_loss_func"):
        train(language_model(), texts(), compute_loss_func=lambda outputs, labels, **_: outputs.logits.mean())
    with pytest.raises(flipout.ArgumentError, match="std=-1"):
        train(language_model(), texts(), zeroth_order={"std": -1})
