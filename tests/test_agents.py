"""Several agents in one session: who learns, whose tokens get which reward, and that frozen policies stay frozen."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mrlm_cli.envs import kuhn
from mrlm_cli.envs.host import NoJournal
from mrlm_cli.errors import CheckpointError, RecipeError
from mrlm_cli.recipe import compose
from mrlm_cli.recipe.derived import derive
from mrlm_cli.records import Completion, Episode
from mrlm_cli.training import loop
from mrlm_cli.training.collate import collate
from mrlm_cli.training.questions import probabilities
from mrlm_cli.training.stage import Stage, settled
from mrlm_cli.training.stopping import Stopper
from mrlm_cli.training.summary import episode_metrics
from mrlm_cli.training.trainer import Trainer
from tests.kit import tiny, trainer
from tests.test_resume import timeless
from tests.test_training_rollout import SCRIPT, fresh_conversations, never_cut, scene, spans

KUHN: dict[str, Any] = {
    "model": {"type": "scratch", "layers": 1, "hidden": 32, "heads": 2, "context": 32, "characters": "12JQKpb"},
    "environments": [{"type": "kuhn"}],
    "sampling": {"tasks_per_step": 24, "max_new_tokens": 2, "max_turns": 2},
    "evaluate": {"every": 0, "tasks": 6, "temperature": 1.0},
}
GAME = """
name: game
steps: 2
model: {type: scratch, layers: 1, hidden: 32, heads: 2, context: 32, characters: "12JQKpb"}
environments: [{type: kuhn}]
sampling: {max_new_tokens: 2}
algorithm: {type: ppo}
agents:
  first: {type: learner}
"""


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in module.parameters()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def legal(made: Trainer, *words: str) -> None:
    """Every reply becomes the next of `words` and ends, engine by engine: a policy that plays."""
    chat = made.source._rollout._chat
    engines = [made.engine, *made.source._rollout._engines.values()]
    for engine in dict.fromkeys(engines):

        def generate(requests: Any) -> list[Completion]:
            said = [chat.reply(words[(len(r.tokens) > 4) % len(words)]) for r in requests]
            return [Completion(tokens, (-1.0,) * len(tokens), "end") for tokens in said]

        engine.generate = generate  # type: ignore[method-assign]


def test_a_reward_goes_to_the_most_recent_token_of_an_agent_that_did_not_just_act(tmp_path: Path) -> None:
    with scene(tmp_path, "Pair") as made:
        fresh_conversations(made)
        never_cut(made)
        episodes = made.source.episodes(0)
    assert [one.agent for one in episodes] == ["left", "right"] * 3
    # said: left 1, right 1, left 1, right 1 and done, with 10 for both; right has 100 before anyone spoke
    by_turn = {"left": (1.0, 11.0), "right": (101.0, 11.0)}
    for one in episodes:
        chosen = [span for span in one.spans if span.kind == "chosen"]
        expected = [0.0] * len(one.tokens)
        for span, value in zip(chosen, by_turn[one.agent], strict=True):
            expected[span.end - 1] = value
        assert list(one.rewards) == expected
        assert set(one.transcript.views) == {"left", "right"}


def test_roles_never_share_a_group(tmp_path: Path) -> None:
    with trainer(
        tmp_path / "run",
        tiny(**KUHN | {"sampling": {"tasks_per_step": 12, "max_new_tokens": 2, "episodes_per_task": 2}}),
    ) as made:
        legal(made, "p", "p")
        episodes = made.source.episodes(0)
    assert len(episodes) == 48
    batch = collate(episodes, "cpu")
    assert batch is not None
    groups: dict[int, list[Episode]] = {}
    for row, group in enumerate(batch.group.tolist()):
        groups.setdefault(group, []).append(episodes[int(batch.episode[row])])
    assert len(groups) == 24
    for ones in groups.values():
        assert len({(one.task.id, one.agent) for one in ones}) == 1
    assert {sum(one.rewards) for one in episodes if one.agent == "first"} == {1.0, -1.0}
    for first, second in zip(episodes[::2], episodes[1::2], strict=True):
        assert sum(first.rewards) == -sum(second.rewards)


@pytest.mark.parametrize("kind", ["frozen", "scripted"])
def test_only_learners_make_episodes_and_the_others_views_are_kept(tmp_path: Path, kind: str) -> None:
    other = {"type": "frozen"} if kind == "frozen" else {"type": "scripted", "player": "equilibrium"}
    with trainer(tmp_path / "run", tiny(**KUHN, agents={"second": other})) as made:
        if kind == "frozen":
            legal(made, "p")
        else:
            never_cut(made)
            made.engine.generate = _saying(made, "b")  # type: ignore[method-assign]
        episodes = made.source.episodes(0)
        means = episode_metrics(episodes, made.environments).means()
    assert [one.agent for one in episodes] == ["first"] * 24
    assert means["episodes"] == 24
    for one in episodes:
        assert [message.role for message in one.transcript.views["second"]] == ["user", "assistant"]
        assert {agent for agent, *_ in one.transcript.rewards} == {"first", "second"}
        chips = {agent: value for agent, _, name, value in one.transcript.rewards if name == "chips"}
        assert chips["first"] == -chips["second"] == sum(one.rewards)
    if kind == "scripted":  # it never calls with the jack, always with the king
        said = {one.task.data["cards"][1]: one.transcript.views["second"][1].content for one in episodes}
        assert (said["J"], said["K"]) == ("p", "b")


def _saying(made: Trainer, word: str) -> Any:
    tokens = made.source._rollout._chat.reply(word)
    return lambda requests: [Completion(tokens, (-1.0,) * len(tokens), "end") for _ in requests]


def test_a_frozen_agent_is_the_policy_as_it_started_and_never_moves(tmp_path: Path) -> None:
    recipe = tiny(**KUHN, agents={"second": {"type": "frozen"}}, steps=2, optimizer={"lr": 0.05})
    with trainer(tmp_path / "run", recipe) as made:
        frozen = made.source._rollout._others["second"].policy  # type: ignore[union-attr]
        begun, start = weights(made.policy.lm), weights(frozen.lm)
        loop.run(made, Stopper())
        assert same(begun, start)
        assert same(weights(frozen.lm), start)
        assert not same(weights(made.policy.lm), begun)
        assert not any(tensor.requires_grad for tensor in frozen.parameters())
        engine = made.source._rollout._others["second"].engine  # type: ignore[union-attr]
        assert engine is not made.engine
        checkpoint = made.run.checkpoints / "latest" / "policy"
    # A checkpoint as frozen agent; and the start again, where the policy is a later one.
    later = tiny(**KUHN, agents={"second": {"type": "frozen", "path": str(checkpoint)}, "first": {"type": "learner"}})
    with trainer(tmp_path / "later", later) as made:
        assert same(weights(made.source._rollout._others["second"].policy.lm), weights(made.policy.lm)) is False  # type: ignore[union-attr]
        loop.iteration(made)
        with pytest.raises(CheckpointError, match="frozen agent"):
            made.load(checkpoint.parent)
    model = tiny(model={"type": "pretrained", "path": str(checkpoint)}).model
    evaluated = settled(recipe.model_copy(update={"model": model}))
    quiet: Any = {"journal": NoJournal(), "check": lambda: None, "phase": lambda *_: None, "values": False}
    with Stage(evaluated, (), start=recipe.model, **quiet) as stage:
        assert same(weights(stage.frozen["second"].lm), start)
        assert not same(weights(stage.policy.lm), start)


def test_a_cut_reply_of_a_frozen_agent_is_the_environments_to_judge(tmp_path: Path) -> None:
    changes = {"agents": {"first": {"type": "frozen", "max_new_tokens": 1}}, "algorithm": {"truncation": "bootstrap"}}
    with trainer(tmp_path / "run", tiny(**KUHN, **changes)) as made:
        episodes = made.source.episodes(0)
    # The frozen first player is always cut and forfeits; the learner never spoke, and its session is no truncation.
    assert {one.stop for one in episodes} == {"done"}
    assert {one.transcript.views["first"][-1].role for one in episodes} == {"assistant"}
    assert collate(episodes, "cpu") is None


def test_who_was_cut_is_cut_and_the_other_came_to_its_end(tmp_path: Path) -> None:
    with trainer(tmp_path / "run", tiny(**KUHN)) as made:
        chat = made.source._rollout._chat

        def generate(requests: Any) -> list[Completion]:
            good, bad = chat.reply("p"), (5, 5)
            return [
                Completion(good, (-1.0,) * 2, "end")
                if r.conversation.endswith("first")
                else Completion(bad, (-1.0,) * 2, "length")
                for r in requests
            ]

        made.engine.generate = generate  # type: ignore[method-assign]
        episodes = made.source.episodes(0)
    assert {(one.agent, one.stop, one.ended) for one in episodes} == {
        ("first", "done", True),
        ("second", "length", False),
    }
    assert {sum(one.rewards) for one in episodes if one.agent == "first"} == {1.0}


def test_a_limit_of_turns_brings_every_learner_to_its_next_decision_under_bootstrap(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(SCRIPT)
    recipe = tiny(
        tmp_path,
        environments=[{"type": "./talk.py:Pair", "turns": 9}],
        sampling={"tasks_per_step": 2, "max_new_tokens": 4, "max_turns": 1},
        algorithm={"type": "ppo", "truncation": "bootstrap"},
    )
    with trainer(tmp_path / "run", recipe, folder=tmp_path) as made:
        fresh_conversations(made)
        generate = made.engine.generate
        made.engine.generate = (
            lambda requests: [  # type: ignore[method-assign]
                Completion(one.tokens[:2], one.logprobs[:2], "string") for one in generate(requests)
            ]
        )
        made.engine.free = lambda conversations: None  # type: ignore[method-assign]
        episodes = made.source.episodes(0)
    for one in episodes:
        assert one.stop == "turns"
        # left hears what comes next; right, who would be asked later, has its reply closed and nothing more
        tail = [("observation", 1)] if one.agent == "left" else []
        assert spans(one) == [("prompt", 0), ("chosen", 0), ("scaffold", 1), *tail]


@pytest.mark.parametrize("agents", [{}, {"right": {"type": "frozen", "temperature": 0.7, "stop": list("01234sort")}}])
def test_the_cached_engine_says_what_the_reference_engine_says(tmp_path: Path, agents: dict[str, Any]) -> None:
    (tmp_path / "talk.py").write_text(SCRIPT)
    found = []
    for engine in ("cached", "generate"):
        recipe = tiny(
            tmp_path,
            environments=[{"type": "./talk.py:Pair", "turns": 2}],
            sampling={"tasks_per_step": 6, "max_new_tokens": 6, "stop": list("0123456789sort")},
            agents=agents,
            engine={"type": engine},
        )
        with trainer(tmp_path / engine, recipe, folder=tmp_path) as made:
            found.append(made.source.episodes(0))
    cached, reference = found
    assert [(one.id, one.tokens, one.spans) for one in cached] == [(one.id, one.tokens, one.spans) for one in reference]
    assert [one.transcript for one in cached] == [one.transcript for one in reference]
    assert sum(one.stop == "done" for one in cached) >= len(cached) / 2  # several turns each
    assert len(cached) == (6 if agents else 12)


@pytest.mark.parametrize(
    "agents", [{}, {"second": {"type": "frozen"}}, {"first": {"type": "scripted", "player": "random"}}]
)
def test_a_resumed_run_of_two_agents_has_the_same_bits(tmp_path: Path, agents: dict[str, Any]) -> None:
    recipe = tiny(**KUHN, agents=agents, steps=4, checkpoint={"every": 2, "keep": 9}, optimizer={"lr": 0.01})
    with trainer(tmp_path / "whole", recipe) as made:
        loop.run(made, Stopper())
        expected, wanted = weights(made.policy), made.run.metrics()
        halfway = made.run.checkpoints / "step-000002"
    with trainer(tmp_path / "half", recipe) as made:
        for row in wanted[:2]:
            made.run.append_metrics(row["step"], {name: value for name, value in row.items() if name != "step"})
        made.load(halfway)
        loop.run(made, Stopper())
        assert same(weights(made.policy), expected)
        rest = made.run.metrics()
    assert [timeless(row) for row in rest] == [timeless(row) for row in wanted]


@pytest.mark.parametrize(
    ("line", "where", "what"),
    [
        ("third: {type: learner}", ":10:3 agents.third", "no environment here has such a role"),
        ("secnd: {type: frozen}", ":10:3 agents.secnd", "did you mean second?"),
        ("second: {type: frosen}", ":10:18 agents.second.type", "did you mean frozen?"),
        ("second: {type: scripted, player: nobody}", ":10:36 agents.second.player", "equilibrium, random"),
        ("second: {type: scripted, player: randm}", ":10:36 agents.second.player", "did you mean random?"),
        ("second: {type: frozen, temprature: 1}", ":10:26 agents.second.temprature", "did you mean"),
        ("second: frozen", ":10:11 agents.second", "expected a mapping"),
        ("first: {type: frozen}\n  second: {type: frozen}", ":8:1 agents", "no role of kuhn learns"),
    ],
)
def test_wrong_agents_are_refused_at_their_line(tmp_path: Path, line: str, where: str, what: str) -> None:
    text = GAME.replace("  first: {type: learner}\n", "") if line.startswith("first") else GAME
    (tmp_path / "game.yaml").write_text(f"{text}  {line}\n")
    with pytest.raises(RecipeError) as caught:
        compose.load(tmp_path / "game.yaml")
    assert where in str(caught.value)
    assert what in str(caught.value)


def test_agents_of_a_recipe_survive_the_way_to_yaml_and_back(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text("class Bot:\n    pass\n")
    (tmp_path / "older").mkdir()
    text = GAME + "  second: {type: scripted, player: ./bot.py:Bot}\n"
    (tmp_path / "game.yaml").write_text(text)
    loaded = compose.load(tmp_path / "game.yaml").recipe
    assert loaded.agents["second"].player == f"{tmp_path}/bot.py:Bot"  # type: ignore[union-attr]
    (tmp_path / "again.yaml").write_text(compose.dump(loaded))
    assert compose.load(tmp_path / "again.yaml").recipe == loaded
    (tmp_path / "game.yaml").write_text(GAME + "  second: {type: frozen, path: ./older}\n")
    loaded = compose.load(tmp_path / "game.yaml").recipe
    assert loaded.agents["second"].path == f"{tmp_path}/older"  # type: ignore[union-attr]


def test_a_players_mistake_fails_its_session_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(
        "class Bot:\n"
        "    def __init__(self, task, agent, seed):\n"
        "        self.card = task.data['cards'][agent == 'second']\n"
        "    def reply(self, view):\n"
        "        assert view[0].content[1] == self.card\n"
        "        return {'J': 'p', 'Q': None}[self.card]\n"
    )
    game = {**KUHN, "environments": [{"type": "kuhn", "max_failed": 1.0}]}
    recipe = tiny(tmp_path, **game, agents={"first": {"type": "scripted", "player": "./bot.py:Bot"}})
    with trainer(tmp_path / "run", recipe, folder=tmp_path) as made:
        made.engine.generate = _saying(made, "p")  # type: ignore[method-assign]
        episodes = made.source.episodes(0)
        means = episode_metrics(episodes, made.environments).means()
    failures = {one.task.data["cards"][0]: one.failure for one in episodes}
    assert failures["J"] is None
    assert "must reply with a string" in str(failures["Q"])
    assert "KeyError" in str(failures["K"])
    assert means["failed_rate"] == pytest.approx(sum(one.task.data["cards"][0] != "J" for one in episodes) / 24)


def test_a_player_that_hangs_fails_its_session_and_is_not_asked_again_on_replay(tmp_path: Path) -> None:
    (tmp_path / "bot.py").write_text(
        "import os, time\n"
        "class Bot:\n"
        "    def __init__(self, task, agent, seed):\n"
        "        self.card = task.data['cards'][0]\n"
        "        assert (task.env, agent) == ('kuhn', 'first')\n"
        "    def reply(self, view):\n"
        "        if self.card == 'K':\n"
        "            time.sleep(3600)\n"
        "        return 'p'\n"
    )
    hardware = {"threads": 1, "device": "cpu", "deadline": 1.0, "worker_processes": 1}
    sampling = {"tasks_per_step": 4, "max_new_tokens": 2}
    roles = {"first": {"type": "scripted", "player": "./bot.py:Bot"}}
    recipe = tiny(tmp_path, **{**KUHN, "sampling": sampling}, agents=roles, hardware=hardware)
    with trainer(tmp_path / "run", recipe, folder=tmp_path) as made:
        cursor = made.source.state()
        episodes = made.source.episodes(0)
        made.source.load_state(cursor)
        begun = time.monotonic()
        assert made.source.episodes(0) == episodes
        again = time.monotonic() - begun
    kings = [one for one in episodes if one.task.data["cards"][0] == "K"]
    assert kings
    assert all(str(one.failure).startswith("agent first: no answer within ") for one in kings)
    assert all(one.failure is None for one in episodes if one not in kings)
    assert again < len(kings)


def test_derived_numbers_count_an_episode_for_each_learner() -> None:
    def derived(**agents: Any) -> Any:
        return derive(tiny(**KUHN, agents=agents))

    both, one = derived(), derived(second={"type": "scripted", "player": "random"})
    assert (both.episodes_per_step, one.episodes_per_step) == (48, 24)
    assert both.tokens_per_step_at_most == 2 * one.tokens_per_step_at_most
    frozen = derived(second={"type": "frozen"})
    assert frozen.episodes_per_step == 24
    assert frozen.memory_estimate_mib >= one.memory_estimate_mib


@pytest.mark.slow
def test_credit_in_a_game_leads_to_the_best_response(tmp_path: Path) -> None:
    """PPO in the second seat against coin flips comes to the best that can be won there: about 15 s."""
    recipe = tiny(
        model={"type": "scratch", "layers": 1, "hidden": 64, "heads": 4, "context": 32, "characters": "12JQKpb"},
        environments=[{"type": "kuhn"}],
        sampling={"tasks_per_step": 384, "max_new_tokens": 2, "max_turns": 2},
        agents={"first": {"type": "scripted", "player": "random"}},
        optimizer={"lr": 0.003, "minibatches": 4, "tokens_per_micro_batch": 8192},
        algorithm={"type": "ppo", "entropy": {"coef": 0.05}},
        steps=60,
    )
    coin = dict.fromkeys(kuhn.INFORMATION_SETS, 0.5)
    with trainer(tmp_path / "run", recipe) as made:
        game, chat = made.environments["kuhn"], made.source._rollout._chat

        def won() -> float:
            asked = probabilities(game.questions(), made.policy, chat, temperature=1.0, budget=4096)
            shares = zip(kuhn.INFORMATION_SETS, asked[::2], asked[1::2], strict=True)
            return -kuhn.value(coin, {key: bets / (passes + bets) for key, passes, bets in shares})

        assert won() < 0
        for _ in range(recipe.steps):
            loop.iteration(made)
        assert won() > 0.95 * kuhn.best_response(coin, 1)
