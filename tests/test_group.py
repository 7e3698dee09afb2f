"""The group methods detail by detail, with numbers worked out by hand."""

import math

import pytest
import torch
from pydantic import ValidationError

from mrlm_cli import registry
from mrlm_cli.algorithms.group_settings import GroupSettings
from mrlm_cli.errors import CheckpointError, RecipeError
from mrlm_cli.recipe import compose
from mrlm_cli.records import Episode, PolicyOut, Span
from tests.group_helpers import EXTRA, VARIANTS, group, make_groups
from tests.ppo_helpers import START, make_batch, make_out

GOLDEN = {
    "grpo": (0.0355834849, {}),
    "dr_grpo": (-0.0232891664, {"constant_length": 16}),
    "dapo": (-0.2558792577, {}),
    "gspo": (-0.0002474524, {}),
    "cispo": (0.5248191147, {}),
    "rloo": (-0.1346732550, {}),
    "reinforce++": (0.0026063207, {}),
    "reinforce++_baseline": (0.0220158089, {}),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers_of_another_implementation(name):
    """Made by executing the advantage and loss lines of TRL 1.16's GRPO and RLOO trainers on the same float64 inputs.

    Its deviation of a group is rounded to float32, hence the tolerance. Its CISPO was given epsilon_high = 5, which is
    1 + 4 here. Those of REINFORCE++ are of verl 0.9.1's advantages, policy loss (token mean, no dual clip) and KL.
    """
    i = torch.arange(12, dtype=torch.float64).reshape(4, 3)
    mask = torch.nn.functional.pad(torch.arange(3) < torch.tensor([3, 2, 3, 1])[:, None], (1, 0))
    wide = lambda x: torch.nn.functional.pad(x, (1, 0), value=5.0)  # noqa: E731
    rewards = torch.tensor([[0, 0, 0, 1.0], [0, 0, 0, 0], [0, 0, 0, 0.5], [0, -0.5, 0, 0]], dtype=torch.float64)
    old = -(1 + torch.sin(i))
    batch = make_batch(rows=4, width=4).replace(
        mask=mask,
        rewards=rewards,
        old_logprobs=wide(old),
        ref_logprobs=wide(-(1 + torch.cos(i))),
        group=torch.tensor([0, 0, 1, 1]),
    )
    expected, extra = GOLDEN[name]
    algorithm = group(type=name, **extra)
    batch, _ = algorithm.credit(batch, START)
    out = PolicyOut(wide(old + 0.5 * torch.cos(3 * i)), wide(old), None, None)
    loss = algorithm.loss(out, batch, START)[0]["mass"] / batch.mass.sum()
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def scored(scores, groups, **settings):
    """Advantages of episodes of one chosen token each."""
    rows = len(scores)
    mask = torch.tensor([[False, True]] * rows)
    zero = torch.zeros(rows, 2, dtype=torch.float64)
    batch = make_batch(rows=rows, width=2).replace(
        mask=mask,
        rewards=zero + torch.tensor(scores, dtype=torch.float64)[:, None] * mask,
        old_logprobs=zero,
        group=torch.tensor(groups),
        truncated=torch.zeros(rows, dtype=torch.bool),
    )
    credited, sums = group(**{"type": "group", **settings}).credit(batch, START)
    return credited.advantages[:, 1].tolist(), sums.means()


def test_baselines_by_hand():
    scores, groups = [3.0, 0.0, 0.0, 1.0, 2.0], [0, 0, 0, 1, 1]
    assert scored(scores, groups, baseline="none")[0] == scores
    assert scored(scores, groups, baseline="group")[0] == pytest.approx([2, -1, -1, -0.5, 0.5])
    assert scored(scores, groups, baseline="leave_one_out")[0] == pytest.approx([3, -1.5, -1.5, -1, 1])
    assert scored(scores, groups, baseline="batch")[0] == pytest.approx([1.8, -1.2, -1.2, -0.2, 0.8])


def test_scales_by_hand():
    scores, groups = [3.0, 0.0, 0.0, 1.0, 2.0], [0, 0, 0, 1, 1]
    first, second = math.sqrt(3) + 0.5, math.sqrt(0.5) + 0.5
    found, _ = scored(scores, groups, scale="group", scale_eps=0.5)
    assert found == pytest.approx([2 / first, -1 / first, -1 / first, -0.5 / second, 0.5 / second])
    found, _ = scored(scores, groups, scale="batch", scale_eps=0.5, baseline="none")
    assert found == pytest.approx([x / (math.sqrt(6.8 / 4) + 0.5) for x in scores])
    found, _ = scored(scores, groups, scale="group", scale_eps=0.5, baseline="leave_one_out")  # that of the scores
    assert found[0] == pytest.approx(3 / first)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
def test_an_episode_without_siblings_has_advantage_zero_and_is_counted(baseline, whiten):
    found, measured = scored([7.0, 1.0, 0.0, 3.0], [5, 0, 0, 6], baseline=baseline, whiten=whiten)
    assert found[0] == found[3] == 0
    assert found[1] == -found[2] > 0
    assert measured["lone_episodes"] == 2
    alone, measured = scored([7.0], [0], baseline="batch", whiten=whiten, scale="batch")
    assert alone == [0]
    assert measured["lone_episodes"] == 1


def two_agents(scores, agents, **settings):
    """Advantages of episodes of one chosen token each, of two agents."""
    rows = len(scores)
    mask = torch.tensor([[False, True]] * rows)
    batch = make_batch(rows=rows, width=2).replace(
        mask=mask,
        rewards=torch.tensor(scores, dtype=torch.float64)[:, None] * mask,
        old_logprobs=torch.zeros(rows, 2, dtype=torch.float64),
        group=torch.arange(rows) // 2,
        truncated=torch.zeros(rows, dtype=torch.bool),
        agent=torch.tensor(agents),
    )
    return group(**{"type": "group", **settings}).credit(batch, START)[0].advantages[:, 1].tolist()


def test_opposing_roles_share_no_batch_statistics():
    """Mirrored roles: over all rows their mean is 0, which would be no baseline for either of them."""
    scores, agents = [3.0, -3.0, 1.0, -1.0, 2.0, -2.0], [0, 1, 0, 1, 0, 1]
    assert two_agents(scores, agents, baseline="batch") == pytest.approx([1, -1, -1, 1, 0, 0])
    assert two_agents(scores, agents, baseline="batch", scale="batch", scale_eps=1e-9) == pytest.approx(
        [1, -1, -1, 1, 0, 0]
    )
    assert two_agents(scores, agents, baseline="none", whiten=True) == pytest.approx([1, -1, -1, 1, 0, 0])
    same = two_agents(scores, [4] * 6, baseline="batch", whiten=True)
    assert same == pytest.approx(scored(scores, [0, 0, 1, 1, 2, 2], baseline="batch", whiten=True)[0])


def test_flat_groups_are_measured():
    _, measured = scored([1.0, 1.0, 1.0, 0.0, 5.0], [0, 0, 1, 1, 2])
    assert measured["flat_rate"] == 0.5
    assert "flat_rate" not in scored([1.0, 2.0], [0, 1], baseline="none")[1]


def test_equal_scores_give_no_advantage_whatever_the_scale():
    for scale in ("none", "group", "batch"):
        found, _ = scored([0.1] * 7, [0] * 7, scale=scale)
        assert found == pytest.approx([0] * 7, abs=1e-11)


@pytest.mark.parametrize(
    ("scores", "groups", "settings", "expected"),
    [
        ([1.0, 1.0, 0.0, 0.0], [0, 0, 1, 1], {"baseline": "batch", "scale": "group"}, [0.5, 0.5, -0.5, -0.5]),
        ([2.0, 0.0, 3.0], [0, 0, 1], {"baseline": "none", "scale": "group"}, [2 / (2**0.5 + 1e-4), 0, 3]),
        ([3.0, 3.0, 3.0], [0, 0, 1], {"baseline": "none", "scale": "batch"}, [3, 3, 3]),
    ],
)
def test_scores_without_spread_are_not_divided(scores, groups, settings, expected):
    assert scored(scores, groups, **settings)[0] == pytest.approx(expected)


def test_the_kl_of_a_score_is_in_the_baseline_and_that_of_a_reward_is_not():
    batch = make_groups()
    kl = (batch.old_logprobs - batch.ref_logprobs).masked_fill(~batch.mask, 0)
    plain, _ = group(type="group").credit(batch, START)
    joined, _ = group(type="group", kl={"coef": 0.5, "form": "score"}).credit(batch, START)
    apart, _ = group(type="group", kl={"coef": 0.5, "form": "reward"}).credit(batch, START)
    rows, sums = [0, 2, 3, 6], kl.sum(1)
    first = batch.mask.int().argmax(1)
    for row in rows:
        moved = joined.advantages[row, first[row]] - plain.advantages[row, first[row]]
        assert moved.item() == pytest.approx(-0.5 * (sums[row] - sums[rows].mean()).item())
        whole = apart.advantages[row, first[row]] - plain.advantages[row, first[row]]
        assert whole.item() == pytest.approx(-0.5 * sums[row].item())


@pytest.mark.parametrize("name", VARIANTS)
def test_at_the_first_optimizer_step_the_gradient_is_minus_advantage_times_weight(name):
    """The ratio is 1, so that all objectives agree; over tokens of an episode, sequence ratios share the gradient."""
    algorithm = group(type=name, **{"kl": {"coef": 0.0}, **EXTRA.get(name, {})})
    batch, _ = algorithm.credit(make_groups(), START)
    logprobs = batch.old_logprobs.clone().requires_grad_()
    found, sums = algorithm.loss(PolicyOut(logprobs, batch.values, None, None), batch, START)
    (slope,) = torch.autograd.grad(found["mass"], logprobs)
    expected = -batch.advantages * batch.weights
    if name == "rloo":
        expected = expected * batch.mask.sum(1, keepdim=True)  # the log-prob of an episode is a sum, not a mean
    torch.testing.assert_close(slope, expected)
    measured = sums.means()
    assert [measured[each] for each in ("approx_kl", "clip_fraction", "policy_moved")] == [0, 0, 0]


def test_masked_episodes_neither_train_nor_count_in_a_baseline():
    batch = make_groups()
    found, _ = group(type="group", truncation="mask").credit(batch, START)
    assert batch.truncated.any()
    assert found.mass[batch.truncated].tolist() == [0] * int(batch.truncated.sum())
    assert not found.advantages[batch.truncated].any()
    without, _ = group(type="group").credit(batch.rows((~batch.truncated).nonzero().flatten()), START)
    width = without.advantages.shape[1]
    assert torch.equal(found.advantages[~batch.truncated][:, :width], without.advantages)


def episode(reward, stop="done", chosen=True):
    spans = (Span(0, 1, "prompt", 0), *([Span(1, 2, "chosen", 0, 0)] if chosen else []))
    rewards = (0.0, reward) if chosen else (0.0, 0.0)
    return Episode("e", "s", None, "g", 0, "policy", (1, 2), spans, (0.0, 0.0), rewards, None, stop, True)


@pytest.mark.parametrize(
    ("group_of", "reason"),
    [
        ([episode(1.0), episode(0.0)], None),
        ([episode(1.0), episode(1.0)], "same reward"),
        ([episode(0.3), episode(0.1 + 0.2)], "same reward"),
        ([episode(1.0), episode(0.0, "failed")], "fewer than two"),
        ([episode(1.0), episode(0.0, chosen=False)], "fewer than two"),
        ([episode(0.0, "failed"), episode(0.0, "failed")], None),  # no news about the task: it stays a failure
        ([episode(1.0), episode(0.0, "length")], None),
        ([episode(math.nan), episode(0.0)], None),  # refused later, by name
    ],
)
def test_flat_groups_are_left_out(group_of, reason):
    found = group(type="dapo").keep(group_of)
    assert (found is None) if reason is None else (reason in found)
    assert group(type="grpo").keep(group_of) is None


def test_masked_episodes_do_not_save_a_flat_group():
    kept = [episode(1.0), episode(1.0), episode(0.0, "length")]
    assert group(type="dapo").keep(kept) is None
    assert "same reward" in group(type="dapo", truncation="mask").keep(kept)


def test_variants_change_defaults_only():
    for name in VARIANTS:
        owner = registry.resolve("algorithms", name)
        assert set(owner.Config.model_fields) == set(GroupSettings.model_fields)
        base = owner.__mro__[1]
        assert {each for each in vars(owner) if not each.startswith("__")} == {"Config"}
        assert base is registry.resolve("algorithms", "group")
        for field, info in owner.Config.model_fields.items():
            assert info.description == GroupSettings.model_fields[field].description
        again = group(type=name, kl={"coef": 0.7}, **EXTRA.get(name, {})).config.kl.form
        assert again == group(type=name, **EXTRA.get(name, {})).config.kl.form  # a variant's KL keeps its form


def test_entropy_and_stop():
    algorithm = group(type="group", entropy={"coef": 0.5}, target_kl=0.05)
    batch, _ = algorithm.credit(make_groups(), START)
    out = make_out(batch)
    found, measured = algorithm.loss(out, batch, START)
    assert found["tokens"].item() == pytest.approx(-0.5 * out.entropy[batch.mask].sum().item())
    assert measured.means()["entropy"] == pytest.approx(out.entropy[batch.mask].mean().item())
    assert [algorithm.stop({"approx_kl": kl}) for kl in (0.05, 0.0501)] == [False, True]
    assert not group(type="group").stop({"approx_kl": 9.0})


def test_foreign_state_is_refused():
    algorithm = group(type="group")
    algorithm.load_state(algorithm.state())
    with pytest.raises(CheckpointError, match="no group method"):
        algorithm.load_state({"kl_coef": 1.0})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"type": "dr_grpo"}, "constant_length"),
        ({"type": "group", "constant_length": 5}, "constant_length"),
        ({"type": "cispo", "clip": None}, "cispo needs"),
        ({"type": "cispo", "dual_clip": 3.0}, "dual_clip"),
        ({"type": "group", "clip": None, "dual_clip": 3.0}, "dual_clip"),
        ({"type": "group", "scale_eps": 0.0}, "scale_eps"),
        ({"type": "rloo", "scale_eps": 1e-3}, "scale_eps has no meaning with scale none"),
        ({"type": "group", "overlong": {"limit": 5, "buffer": 6}}, "at most limit = 5"),
        ({"type": "group", "kl": {"coef": 0.1, "form": "k1"}}, "form"),
        ({"type": "group", "kl": {"sync": {"every": 1}}}, "coef above 0"),
        ({"type": "grpo", "kl": {"sync": {"every": 0}}}, "every"),
        ({"type": "grpo", "kl": {"sync": {"every": 1, "rate": 0.0}}}, "rate"),
        ({"type": "group", "importance": {"low": 1.0}}, "low"),
        ({"type": "group", "importance": {"high": 0.5}}, "high"),
        ({"type": "group", "truncation": "bootstrap"}, "truncation"),
    ],
)
def test_bad_settings_are_refused(settings, text):
    with pytest.raises(ValidationError, match=text):
        group(**settings)


RECIPE = """name: pair
steps: 1
model: {{type: scratch, layers: 1, hidden: 32, heads: 2, context: 64}}
environments: [{{type: sort_digits, digits: 2}}]
sampling:
  tasks_per_step: 2
  episodes_per_task: {number}
  max_new_tokens: 4
algorithm: {algorithm}
"""


@pytest.mark.parametrize(
    ("algorithm", "refused"),
    [
        ("{type: grpo}", True),
        ("{type: rloo}", True),
        ("{type: reinforce++_baseline}", True),
        ("{type: reinforce++}", False),
        ("{type: reinforce++, filter_flat: true}", True),
        ("{type: group, baseline: batch}", False),
        ("{type: group, baseline: batch, scale: group}", True),
        ("{type: ppo}", False),
    ],
)
def test_one_episode_a_task_is_refused_at_its_line_where_episodes_are_compared(tmp_path, algorithm, refused):
    path = tmp_path / "pair.yaml"
    path.write_text(RECIPE.format(number=1, algorithm=algorithm))
    if refused:
        with pytest.raises(RecipeError, match=r"pair\.yaml:7:\d+ sampling\.episodes_per_task: got 1; .*at least 2"):
            compose.load(path)
    else:
        compose.load(path)
    path.write_text(RECIPE.format(number=2, algorithm=algorithm))
    compose.load(path)
