"""A Bayesian-looking Lightning module in one line: ``python examples/lightning_module.py``.

``self.net`` is a wrapped module like any other: training draws weights for every example, validation has their means.
"""

import argparse
import tempfile

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flipout
from flipout.data import embedded_mnist


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        self.net = flipout.Perturbed(model, flipout.MultiplicativeGaussian(0.5), include="*weight")

    def training_step(self, batch, _):
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def validation_step(self, batch, _):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.manual_seed(0)
    digits = embedded_mnist()
    train, test = (TensorDataset(part.inputs, part.labels) for part in (digits.train, digits.test))
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_steps=options.steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, num_sanity_val_steps=0,
        )  # fmt: skip
        net = Classifier()
        trainer.fit(net, DataLoader(train, batch_size=128, shuffle=True))
        (found,) = trainer.validate(net, DataLoader(test, batch_size=500), verbose=False)
    print(f"{digits.source}\naccuracy of the mean weights on test images: {found['accuracy']:.3f}")


if __name__ == "__main__":
    main()
