"""Where layers have their keys and values: those with a sliding window have block tables of their own.

A block holds layers that lie side by side, as in `backend.tables`: all those without windows, or as many of the others.
Each such group has a table. If all layers have windows, the first stands for those without.
"""

from collections.abc import Sequence
from typing import Any

import torch

from slipstream.backend.steps import BLOCK_SIZE, LONE_TOKEN_SIZE, lay_out
from slipstream.backend.torch.hooks import Seat, computing
from slipstream.backend.torch.operators import AttentionShape, Step, Tensor
from slipstream.backend.torch.plain import PlainOperators
from slipstream.backend.torch.quantised import Weight
from slipstream.backend.torch.staging import Staging


def seated(windows: Sequence[int]) -> list[Seat]:
    """The table of each layer and its place in a block, by the tokens that layers see; 0 if all before."""
    full = [layer for layer, window in enumerate(windows) if not window] or [0]
    others = [layer for layer in range(len(windows)) if layer not in full]
    seats = {layer: divmod(number, len(full)) for number, layer in enumerate((*full, *others))}
    return [seats[layer] for layer in range(len(windows))]


def windows_of(model: Any) -> list[int]:
    """The tokens that each layer sees, its own included; 0 if all before, as with a window as long as the context.

    Classes differ in where they have it from, so it isn't read from a configuration: the model goes through a step, of
    which little is computed, and each layer asks for its attention.
    """
    asked, step = _Asked(), Step.of(lay_out([], LONE_TOKEN_SIZE, 1), BLOCK_SIZE, Staging(model.device))
    kv = torch.empty(0, 1, dtype=model.dtype, device=model.device)
    config = model.config.get_text_config()
    seats = [(0, 0)] * config.num_hidden_layers
    with torch.inference_mode(), computing(asked, step, kv, seats):
        model(input_ids=step.tokens, position_ids=step.positions, use_cache=False)
    return [window if window < config.max_position_embeddings else 0 for window in asked.windows]


class _Asked(PlainOperators):
    """Operators that note what windows they are asked for, in order, and leave out what takes long."""

    def __init__(self) -> None:
        self.windows: list[int] = []

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return x.new_zeros(*x.shape[:-1], weight.shape[0])

    def experts(self, module: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:  # noqa: ARG002
        return x

    def write(self, kv: Tensor, key: Tensor, value: Tensor, blocks: Tensor, slots: Tensor) -> None:
        pass

    def attend(self, query: Tensor, kv: Tensor, step: Step, shape: AttentionShape, sinks: Tensor | None) -> Tensor:  # noqa: ARG002
        self.windows.append(shape.window)
        return query
