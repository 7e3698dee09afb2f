"""Random and hand-made batches for the tests of PPO, and the settings under which they are tried."""

import math

import torch

from mrlm_cli.algorithms.ppo import PPO
from mrlm_cli.records import Batch, PolicyOut, Progress

START = Progress(0, 10)
EVERYTHING = {
    "clip": [0.1, 0.3],
    "dual_clip": 1.5,
    "gamma": 0.9,
    "gae_lambda": 0.8,
    "gae_lambda_value": 0.95,
    "value_clip": 0.3,
    "entropy": {"coef": 0.1, "schedule": "linear", "floor": 0.1},
    "whiten_rewards": True,
    "reward_clip": [-1.0, 0.8],
    "reward_scale": True,
    "importance": {"high": 1.4},
}
SETTINGS = {
    "defaults": {},
    "plain": {"whiten_advantages": False, "gamma": 0.97},
    "kl in the reward": {"kl": {"coef": 0.2}, "missing_end_penalty": 0.5},
    "k2": {"kl": {"coef": 0.2, "form": "k2"}, "aggregation": "sequence"},
    "k3": {"kl": {"coef": 0.2, "form": "k3"}, "aggregation": "constant", "constant_length": 9},
    "k3+": {"kl": {"coef": 0.2, "form": "k3+"}, "truncation": "mask"},
    "bootstrap": {"truncation": "bootstrap", "gamma": 0.8},
    "everything": {**EVERYTHING, "kl": {"coef": 0.05, "target": 1.0, "horizon": 50}, "missing_end_penalty": 0.2},
    "everything, masked": {**EVERYTHING, "truncation": "mask", "aggregation": "sequence"},
}


def ppo(**settings):
    return PPO(PPO.Config(type="ppo", **settings))


def make_batch(seed=0, rows=6, width=14, dtype=torch.float64):
    """Random multi-turn episodes of different lengths; a reward ends each run of chosen tokens; one row chose none."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(width // 2, width + 1, (rows,), generator=generator)
    lengths[0] = width
    mask = torch.rand(rows, width, generator=generator) < 0.6
    mask &= (torch.arange(width) > 0) & (torch.arange(width) < lengths[:, None])
    mask[-1] = False
    run_ends = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    old = -normal(rows, width).abs()
    where = mask.to(dtype)
    return Batch(
        tokens=torch.randint(0, 9, (rows, width), generator=generator),
        lengths=lengths,
        mask=mask,
        score=mask,
        logprobs=(old + normal(rows, width, scale=0.3)) * where,
        rewards=normal(rows, width) * run_ends,
        weights=where,
        mass=where.sum(1),
        episode=torch.arange(rows),
        group=torch.arange(rows),
        unit=torch.arange(rows),
        truncated=torch.arange(rows) % 3 == 0,
        ended=torch.arange(rows) % 6 != 0,
        old_logprobs=old * where,
        ref_logprobs=(old + normal(rows, width, scale=0.5)) * where,
        values=normal(rows, width) * where,
        final_values=normal(rows),
    )


def make_out(batch, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def normal(scale):
        x = scale * torch.randn(batch.mask.shape, generator=generator, dtype=torch.float64)
        return x.to(batch.rewards.dtype) * batch.mask

    return PolicyOut(
        logprobs=(batch.old_logprobs + normal(0.4)).requires_grad_(),
        entropy=normal(1.0).abs().requires_grad_(),
        values=(batch.values + normal(0.5)).requires_grad_(),
        final_values=None,
    )


def one_row(rewards, *, truncated=False, ended=True, logprob_gap=0.0, value=0.0, final=0.0):
    """One episode: a prompt token, then every token chosen; log π − log π_ref is `logprob_gap` everywhere."""
    width = len(rewards) + 1
    mask = torch.tensor([[False] + [True] * len(rewards)])
    zero = torch.zeros(1, width, dtype=torch.float64)
    return Batch(
        tokens=torch.zeros(1, width, dtype=torch.int64),
        lengths=torch.tensor([width]),
        mask=mask,
        score=mask,
        logprobs=zero,
        rewards=torch.tensor([[0.0, *rewards]], dtype=torch.float64),
        weights=mask.double(),
        mass=mask.double().sum(1),
        episode=torch.tensor([0]),
        group=torch.tensor([0]),
        unit=torch.tensor([0]),
        truncated=torch.tensor([truncated]),
        ended=torch.tensor([ended]),
        old_logprobs=zero,
        ref_logprobs=zero - logprob_gap * mask.double(),
        values=zero + value * mask.double(),
        final_values=torch.tensor([final], dtype=torch.float64),
    )


def each_field(batch, change):
    fields = {name: getattr(batch, name) for name in batch.__dataclass_fields__}
    return Batch(**{name: change(x) for name, x in fields.items() if x is not None})


def spread(numbers):
    mean = math.fsum(numbers) / len(numbers)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1))
