"""AdamW over named parameters: who decays, who has which learning rate, and a state that is saved by name."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mrlm_cli.errors import CheckpointError
from mrlm_cli.policy.model import Policy
from mrlm_cli.recipe.sections import Optimizer
from mrlm_cli.records import Progress
from mrlm_cli.schedules import factor


class Adam:
    """torch's fused AdamW with a schedule, and safetensors in and out.

    Weight decay is left off norms, biases and heads: every parameter of fewer than two dimensions, the value head,
    and the LM head, tied or not (a tied one is the embedding).
    """

    def __init__(self, policy: Policy, settings: Optimizer, value_lr: float | None) -> None:
        self._settings = settings
        self._named = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
        head = policy.lm.get_output_embeddings().weight
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self._named:
            plain = parameter.ndim < 2 or parameter is head or name.startswith("value.head")
            decay = 0.0 if plain else settings.weight_decay
            lr = value_lr if value_lr is not None and name.startswith("value.") else settings.lr
            groups.setdefault((lr, decay), []).append(parameter)
        self._adam = torch.optim.AdamW(
            [
                {"params": parameters, "lr": lr, "peak": lr, "weight_decay": decay}
                for (lr, decay), parameters in groups.items()
            ],
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        # torch would make the moments at the end of the first update, in memory that its activations had: the next
        # update's would then have to be asked for anew.
        for parameter in self.parameters:
            self._adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter, in the order of names."""
        return [parameter for _, parameter in self._named]

    def schedule(self, progress: Progress) -> float:
        """Set the learning rates of a step; returns the policy's."""
        scale = factor(self._settings.schedule, progress, floor=self._settings.floor, warmup=self._settings.warmup)
        for group in self._adam.param_groups:
            group["lr"] = group["peak"] * scale
        return self._settings.lr * scale

    def zero(self) -> None:
        """Drop all gradients; a parameter without one is not touched by `step`, not even by weight decay."""
        self._adam.zero_grad(set_to_none=True)

    def clip(self) -> torch.Tensor:
        """The global norm of the gradient, which is then scaled down to the limit. Non-finite norms scale nothing."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        limit = self._settings.max_grad_norm
        if limit is not None and torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_(
                [parameter for parameter in self.parameters if parameter.grad is not None], limit, norm
            )
        return norm

    def step(self) -> None:
        """One update."""
        self._adam.step()

    def save(self, path: Path) -> None:
        """Moments and step counts by parameter name."""
        tensors = {}
        for name, parameter in self._named:
            for key, value in self._adam.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.contiguous()
        save_file(tensors, path)

    def load(self, path: Path) -> None:
        """Take back what `save` wrote, into fresh allocations. Raises CheckpointError if it fits another model."""
        tensors = load_file(path)
        for name, parameter in self._named:
            state = {key: tensors.pop(f"{key}/{name}", None) for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is None for value in state.values()):
                continue  # never updated yet, as the policy is while only its value function is trained
            for key, value in state.items():
                if value is None or (key != "step" and value.shape != parameter.shape):
                    raise CheckpointError(f"{path}: the optimizer state of {name} does not fit this model")
            self._adam.state[parameter] = {
                key: value.to(parameter.device, copy=True) for key, value in state.items() if value is not None
            }
        if tensors:
            raise CheckpointError(f"{path}: optimizer state for unknown parameters, such as {next(iter(tensors))}")
