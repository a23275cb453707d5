"""The operators of ntkcl in a model of your own: adapters beside a frozen encoder of torch's.

python examples/adapter_in_any_model.py
"""

import torch
from torch.nn import functional as F

from ntkcl.ops import parallel_adapter


class Adapted(torch.nn.Module):
    """A frozen layer of any transformer, and an adapter beside it that begins as nothing."""

    def __init__(self, layer: torch.nn.Module, width: int, rank: int = 16) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = torch.nn.Linear(width, rank)
        self.up = torch.nn.Linear(rank, width)
        torch.nn.init.zeros_(self.up.weight)
        torch.nn.init.zeros_(self.up.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = self.down.weight, self.down.bias, self.up.weight, self.up.bias
        return self.layer(x) + parallel_adapter(x, *weights, scale=0.5)


def main() -> None:
    torch.manual_seed(0)
    width, classes = 64, 4
    layers = (torch.nn.TransformerEncoderLayer(width, 4, 128, 0.0, batch_first=True) for _ in "ab")
    encoder = torch.nn.Sequential(*(Adapted(layer, width) for layer in layers))
    head = torch.nn.Linear(width, classes)

    # Sequences of tokens around a direction of their class.
    labels = torch.arange(64) % classes
    directions = torch.randn(classes, width)
    tokens = torch.randn(64, 10, width) + directions[labels].unsqueeze(1)

    everything = [*encoder.parameters(), *head.parameters()]
    trained = [p for p in everything if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    counts = [sum(p.numel() for p in parameters) for parameters in (trained, everything)]
    print("{:,} of {:,} parameters are trained".format(*counts))
    for step in range(10):
        loss = F.cross_entropy(head(encoder(tokens)[:, 0]), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 3 == 0:
            print(f"step {step}  loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
