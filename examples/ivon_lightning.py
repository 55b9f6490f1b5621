"""Variational training at the price of Adam, in a Lightning module: ``python examples/ivon_lightning.py``.

The loss is the likelihood alone: the prior is in the step of the optimiser. ``predict`` asks the posterior at any time.
"""

import argparse
import tempfile

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flipout
from flipout import bayes
from flipout.data import embedded_mnist


class Classifier(lightning.LightningModule):
    def __init__(self, examples: int, steps: int) -> None:
        super().__init__()
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        self.net = flipout.Perturbed(model, flipout.Gaussian(0.1, learnable=True))
        self.examples, self.steps = examples, steps

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self):
        optimiser = bayes.IVON(
            self, lr=2.0, effective_sample_size=self.examples, betas=(0.9, 0.999), hess_init=0.1, weight_decay=1e-3
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.manual_seed(0)
    digits = embedded_mnist()
    train = TensorDataset(digits.train.inputs, digits.train.labels)
    model = Classifier(len(train), options.steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=options.steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(model, DataLoader(train, batch_size=128, shuffle=True))
    found = bayes.predict(model.net, digits.test.inputs, samples=16)
    right = (found.mean.argmax(1) == digits.test.labels).float().mean()
    loss = bayes.negative_log_likelihood(found, digits.test.labels)
    print(f"{digits.source}\non test images: accuracy {float(right):.3f}, negative log-likelihood {loss:.3f} nats")


if __name__ == "__main__":
    main()
