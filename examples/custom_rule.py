"""Teaching flipout an operation that it does not know, in ten lines: ``python examples/custom_rule.py``."""

import torch
from torch import nn

import flipout


class Periodic(nn.Module):
    """Features cos(ω x) with learned frequencies, through an operation that has no rule: torch.outer."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.frequency = nn.Parameter(torch.arange(1.0, features + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [N] to [N, features]
        return torch.outer(x, self.frequency).cos()


def main() -> None:
    net = flipout.Perturbed(nn.Sequential(Periodic(8), nn.Linear(8, 1)), flipout.Gaussian(0.1))
    x = torch.linspace(-1, 1, 64)
    try:
        net(x)
    except flipout.MissingRuleError as error:
        print(f"before: {error}\n")

    @flipout.rule(torch.outer, flipout.Estimator)  # for every estimator
    def outer(x, weight):
        return x[:, None] * weight.dense()  # a row of the weight for each row of x

    print("after:", tuple(net(x).shape))
    with net.hold(members=64) as draw:  # the rule is right if every row agrees with that member's own module
        alone = torch.cat([draw.module(n)(x[n : n + 1]) for n in range(64)])
        print("largest difference from each member alone:", float((net(x) - alone).abs().max()))


if __name__ == "__main__":
    main()
