"""The value function: a head on the policy's trunk, or a critic with a trunk of its own. fp32 throughout."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mrlm_cli.policy.trunk import States, run_trunk


class ValueHead(nn.Module):
    """hidden [N,H] -> values [N], in the head's own precision (fp32) whatever the hidden state's or autocast's.

    `linear` is one layer; `mlp` has one hidden layer of width H with tanh before it, drawn with std 1/sqrt(H). The last
    layer starts at zero, so that V = 0, or is drawn with std 1/sqrt(H + 1) (`normal`; Stiennon et al. 2020, appendix
    B.1). All biases start at zero.
    """

    def __init__(
        self, width: int, head: Literal["linear", "mlp"], init: Literal["zero", "normal"], generator: torch.Generator
    ) -> None:
        super().__init__()
        self.hidden = nn.utils.skip_init(nn.Linear, width, width) if head == "mlp" else None
        self.last = nn.utils.skip_init(nn.Linear, width, 1)
        with torch.no_grad():
            if self.hidden is not None:
                self.hidden.weight.normal_(0, width**-0.5, generator=generator)
                self.hidden.bias.zero_()
            if init == "normal":
                self.last.weight.normal_(0, (width + 1) ** -0.5, generator=generator)
            else:
                self.last.weight.zero_()
            self.last.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = hidden.to(self.last.weight.dtype)
            if self.hidden is not None:
                hidden = torch.tanh(self.hidden(hidden))
            values: Tensor = self.last(hidden).squeeze(-1)
            return values


class Critic(nn.Module):
    """A separate value function: a trunk (a transformers base model, no LM head) and a value head."""

    def __init__(self, trunk: nn.Module, head: ValueHead) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def states(self, tokens: Tensor, lengths: Tensor, precision: str, wanted: Tensor) -> States:
        """tokens [B,T], lengths [B], wanted bool [B,T] -> hidden states of the critic's own trunk."""
        return run_trunk(self.trunk, tokens, lengths, precision, wanted)
