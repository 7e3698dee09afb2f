"""Settings under which the group methods are tried, and batches of groups."""

import torch

from mrlm_cli import registry
from tests.ppo_helpers import make_batch

VARIANTS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "reinforce++_baseline")
EXTRA = {"dr_grpo": {"constant_length": 9}}
SETTINGS = {
    **{name: {"type": name, **EXTRA.get(name, {})} for name in VARIANTS},
    "no baseline, no clip": {"type": "group", "baseline": "none", "clip": None},
    "batch baseline and scale": {"type": "group", "baseline": "batch", "scale": "batch", "ratio": "sequence_sum"},
    "leave one out, scaled": {"type": "rloo", "scale": "group", "scale_eps": 0.01, "kl": {"coef": 0.3}},
    "everything": {
        "type": "dapo",
        "dual_clip": 1.2,
        "whiten": True,
        "kl": {"coef": 0.2, "form": "k3+"},
        "entropy": {"coef": 0.1, "schedule": "linear"},
        "overlong": {"limit": 8, "buffer": 5, "penalty": 0.7},
        "importance": {"low": 0.8, "high": 1.3},
    },
    "masked": {
        "type": "cispo",
        "truncation": "mask",
        "ratio": "sequence_mean",
        "kl": {"coef": 0.2, "form": "reward"},
        "importance": {"level": "sequence", "form": "mask", "low": 0.5, "high": 3.0},
    },
}


def group(**settings):
    owner = registry.resolve("algorithms", settings["type"])
    return owner(owner.Config(**settings))


def make_groups(seed=0, dtype=torch.float64):
    """Nine random episodes: groups of 4, 3, 1 and, of a row that chose no token, 1; truncation as it falls."""
    batch = make_batch(seed, rows=9, dtype=dtype)
    return batch.replace(group=torch.tensor([5, 0, 5, 5, 0, 2, 5, 0, 7]), truncated=torch.arange(9) % 4 == 1)
