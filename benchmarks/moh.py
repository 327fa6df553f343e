"""Heads left out against heads multiplied by zero in a mixture-of-head attention; for docs/notes/moh.md.

    python benchmarks/moh.py

One layer of 12 heads, 768 channels, float32, at 196, 784 and 3,136 tokens, with 75 and 50 % of the heads running,
beside dense attention. `uneven`: the router prefers some heads for all tokens of an image, as an unbalanced one would.
Outputs are compared before anything is timed. Six minutes on one core; few rounds fit the largest size, which wants
`--tokens 3136 --seconds 60`.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

from regard.benchmark import interleave
from regard.markdown import markdown_table
from regard.mixers import DenseAttention, MixtureOfHeadsAttention

DIM, HEADS = 768, 12
SHARES = {"75 %": (3, 6), "50 %": (2, 4)}


@dataclass(frozen=True)
class Arguments:
    seconds: float = 15.0
    """How long to measure one size, share and direction."""
    tokens: tuple[int, ...] = (196, 784, 3136)


def main(arguments: Arguments) -> int:
    rows = []
    for tokens in arguments.tokens:
        batch = max(1, 1568 // tokens)
        for share, (shared, routed) in SHARES.items():
            for uneven in (False, True):
                layers, x = _layers(shared, routed, uneven, batch, tokens)
                for direction in ("forward", "both"):
                    rows.append([f"B {batch}, N {tokens}", share, "uneven" if uneven else "even", direction])
                    rows[-1] += _measured(layers, x, direction, arguments.seconds)
                    print(*rows[-1], file=sys.stderr)
    heads = ["tokens", "heads", "router", "direction", "times zero, ms", "skipped against it", "dense against it"]
    print(f"{HEADS} heads, {DIM} channels, float32, {torch.get_num_threads()} threads\n\n{markdown_table(heads, rows)}")
    return 0


def _layers(shared: int, routed: int, uneven: bool, batch: int, tokens: int) -> tuple[dict[str, nn.Module], Tensor]:
    """The three layers with the same weights, and tokens; the two mixtures have been seen to agree."""
    torch.manual_seed(0)
    mixture = MixtureOfHeadsAttention(DIM, HEADS, shared=shared, routed=routed, skip=True)
    twin = MixtureOfHeadsAttention(DIM, HEADS, shared=shared, routed=routed, skip=False)
    twin.load_state_dict(mixture.state_dict())
    x = torch.randn(batch, tokens, DIM)
    if uneven:
        x = x + torch.randn(batch, 1, DIM)  # what all tokens of an image share sways them all alike
    with torch.no_grad():
        torch.testing.assert_close(mixture(x), twin(x), rtol=1e-4, atol=1e-5)
    return {"zero": twin, "skipped": mixture, "dense": DenseAttention(DIM, HEADS)}, x


def _measured(layers: dict[str, nn.Module], x: Tensor, direction: str, seconds: float) -> list[str]:
    def call(layer: nn.Module) -> Callable[[], object]:
        def forward() -> None:
            with torch.no_grad():
                layer(x)

        def both() -> None:
            layer(x).sum().backward()
            layer.zero_grad()

        return forward if direction == "forward" else both

    times = interleave({name: call(layer) for name, layer in layers.items()}, budget_seconds=seconds)
    ratios = [times[name].ratio(times["zero"]) for name in ("skipped", "dense")]
    told = [f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" for ratio in ratios]
    return [f"{1e3 * times['zero'].median:.0f}", *told]


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments, description=__doc__)))
