"""What the penalty costs of a training step, beside the way in which it is usually added.

    python benchmarks/penalty.py [--device cuda] [--threads 2] [--batch-size 32]

A step is forward, backward, and SGD with momentum on ResNet-18, batch 32 at 112x112 by default. Added to it are nothing; MAS as
`add_penalty_grad`; MAS decoupled, as `after_step`; and Avalanche's way, `loss + strength * sum over a Python loop over the
parameters of (importance * (theta - anchor)^2).sum()`. Steps of all ways take turns; seconds are medians. "Over the plain
step" compares whole steps; "of its step" is the time inside the call, within its step. Prints a table and JSON lines.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from mas_embed import MAS
from mas_embed.runtime.environment import describe_environment

SHAPE = (3, 112, 112)
CALLS = ("add_penalty_grad", "decoupled, after_step")  # whose time within a step can be told from the rest


@dataclass(frozen=True)
class Way:
    """A term of the loss, and what is called before and after the optimizer's step."""

    term: Callable[[], Tensor | float] = lambda: 0.0
    before: Callable[[], None] = lambda: None
    after: Callable[[torch.optim.Optimizer], None] = lambda optimizer: None


def ways(model: nn.Module, device: torch.device) -> dict[str, Way]:
    """Every way of adding the same penalty, by name."""
    inputs = torch.randn((4, *SHAPE), device=device)
    coupled, decoupled = MAS(model, strength=1e-3), MAS(model, strength=1e-3, decoupled=True)
    coupled.consolidate([inputs])
    decoupled.load_state_dict(coupled.state_dict())

    def term() -> Tensor:
        """As `avalanche.training.plugins.MASPlugin.before_backward` has it."""
        total = torch.zeros((), device=device)
        for name, parameter in model.named_parameters():
            distance = (parameter - coupled.anchor[name]).pow(2)
            total = total + (coupled.importance[name] * distance).sum()
        return coupled.strength * total

    return {
        "nothing": Way(),
        "add_penalty_grad": Way(before=coupled.add_penalty_grad),
        "decoupled, after_step": Way(after=decoupled.after_step),
        "autograd term (Avalanche)": Way(term=term),
    }


def step(
    model: nn.Module, inputs: Tensor, optimizer: torch.optim.Optimizer, way: Way, device: torch.device
) -> tuple[float, float]:
    """One training step; returns the seconds of all of it, and those within the two calls."""
    start = _now(device)
    (model(inputs).square().mean() + way.term()).backward()
    before = _now(device)
    way.before()
    middle = _now(device)
    optimizer.step()
    after = _now(device)
    way.after(optimizer)
    inside = (middle - before) + (_now(device) - after)
    optimizer.zero_grad()
    return _now(device) - start, inside


def measure(device: torch.device, rounds: int, batch_size: int) -> list[dict[str, Any]]:
    """A line a way: medians of rounds in which all take turns, after a round of warm-up."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(weights=None, num_classes=128).to(device)
    inputs = torch.randn((batch_size, *SHAPE), device=device)
    contestants = ways(model, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for round_index in range(rounds + 1):
        for name, way in contestants.items():
            seconds = step(model, inputs, optimizer, way, device)
            if round_index:
                taken[name].append(seconds)
    whole = {name: statistics.median(seconds for seconds, _ in values) for name, values in taken.items()}
    return [
        {
            "way": name,
            "seconds": whole[name],
            "over_plain": whole[name] / whole["nothing"] - 1,
            "share_inside": statistics.median(inside / seconds for seconds, inside in values)
            if name in CALLS
            else None,
            "batch_size": batch_size,
            "device": str(device),
        }
        for name, values in taken.items()
    ]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = measure(torch.device(arguments.device), arguments.rounds, arguments.batch_size)
    print("| added | milliseconds of a step | over the plain step | of its step |\n| --- | ---: | ---: | ---: |")
    for line in lines:
        inside = f"{line['share_inside']:.1%}" if line["share_inside"] is not None else ""
        print(f"| {line['way']} | {1000 * line['seconds']:.1f} | {line['over_plain']:+.1%} | {inside} |")
    print()
    for line in lines:
        print(json.dumps(line))
    print(json.dumps(describe_environment()))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
