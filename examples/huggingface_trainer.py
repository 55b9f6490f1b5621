"""Weight noise in a Hugging Face Trainer, on a GPT-2 built from a config: ``python examples/huggingface_trainer.py``.

The trainer owns the model, so it cannot be handed a wrapper: ``flipout.perturbed`` makes the weights random for the length of the
loss. The checkpoint is a plain one. Any causal model of transformers goes in its place.
"""

import argparse
import tempfile

import torch
import transformers

import flipout
from flipout.data import tiny_shakespeare

WINDOW = 64


class NoisyTrainer(transformers.Trainer):
    """Every sequence of a batch sees weights of its own in training; evaluation has the mean weights."""

    noise = flipout.MultiplicativeGaussian(0.1)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        with flipout.perturbed(model, self.noise):
            return super().compute_loss(model, inputs, *args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--data-dir", help="a folder with tinyshakespeare's input.txt")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    text = tiny_shakespeare(data_dir=options.data_dir, download=False)
    print(text.source)
    config = transformers.GPT2Config(
        vocab_size=len(text.vocabulary), n_positions=WINDOW, n_embd=options.width, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    rows = [{"input_ids": row, "labels": row} for row in text.train[: 2000 * WINDOW].view(-1, WINDOW)]
    held_out = [{"input_ids": row, "labels": row} for row in text.valid[: 50 * WINDOW].view(-1, WINDOW)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, per_device_train_batch_size=16, max_steps=options.steps, learning_rate=1e-3, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", seed=0,
        )  # fmt: skip
        trainer = NoisyTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=held_out)
        print(f"training loss {trainer.train().training_loss:.3f} nats, under noise")
        print(f"validation loss {trainer.evaluate()['eval_loss']:.3f} nats, of the mean weights")
        trainer.save_model(folder)
        plain = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    print("the checkpoint loads in plain transformers")


if __name__ == "__main__":
    main()
