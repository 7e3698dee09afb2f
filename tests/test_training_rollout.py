"""Sessions become episodes: where rewards go, how episodes end, who draws what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mrlm_cli.envs.base import Environment, EnvironmentSettings, Session
from mrlm_cli.errors import NonFiniteError, UserError
from mrlm_cli.events import Listener
from mrlm_cli.records import Completion, Episode, Message, Reply, Request, Split, Task, Turn
from mrlm_cli.training import checkpoint
from mrlm_cli.training.collate import collate
from mrlm_cli.training.loop import run
from mrlm_cli.training.rollout import Draw, Rollout
from mrlm_cli.training.source import take
from mrlm_cli.training.stopping import Stopper
from mrlm_cli.training.summary import episode_metrics
from mrlm_cli.training.trainer import Trainer
from tests.kit import tiny, trainer

SCRIPT = '''
from mrlm_cli.envs.base import Environment, EnvironmentSettings
from mrlm_cli.records import Message, Task, Turn


class Session:
    """Every agent speaks `turns` times; reward 1 a turn to the speaker, 10 at the end to everyone."""

    def __init__(self, config, agents):
        self.config, self.agents, self.said = config, agents, 0

    def start(self):
        return Turn((Message("user", "rot="),), self.agents[0], rewards={self.agents[-1]: {"early": 100.0}})

    def step(self, reply):
        speaker = self.agents[self.said % len(self.agents)]
        self.said += 1
        if self.config.fail_at == self.said:
            raise ValueError("no more")
        done = self.said == self.config.turns * len(self.agents)
        rewards = {speaker: {"turn": 1.0}}
        if done:
            for agent in self.agents:
                rewards.setdefault(agent, {})["end"] = 10.0
        following = self.agents[self.said % len(self.agents)]
        first = self.said < len(self.agents)
        heard = Message("user", "rot=" if first else "tor ")
        return Turn((heard,), following, rewards=rewards, done=done, facts={"said": self.said})

    def close(self):
        pass


class Talk(Environment):
    class Config(EnvironmentSettings):
        turns: int = 2
        fail_at: int = 0

    components = {"turn": 1.0, "end": 1.0, "early": 1.0, "exact": 0.0}
    audited = True

    def size(self, split):
        return 5

    def task(self, split, index):
        return Task(f"{split}-{index}", self.config.label, split, index, {})

    def open(self, task, seed):
        return Session(self.config, self.agents)


class Pair(Talk):
    agents = ("left", "right")
'''


@contextmanager
def scene(
    tmp_path: Path, kind: str = "Talk", sampling: dict[str, Any] | None = None, **config: Any
) -> Iterator[Trainer]:
    (tmp_path / "talk.py").write_text(SCRIPT)
    recipe = tiny(
        tmp_path,
        environments=[{"type": f"./talk.py:{kind}", **config}],
        sampling={"tasks_per_step": 3, "max_new_tokens": 4, **(sampling or {})},
        optimizer={"minibatches": 1},
    )
    with trainer(tmp_path / "run", recipe, folder=tmp_path) as made:
        yield made


def spans(episode: Episode) -> list[tuple[str, int]]:
    return [(span.kind, span.turn) for span in episode.spans]


def never_cut(made: Trainer) -> None:
    """Let every reply end at its end token: the engine's last token becomes the end token."""
    generate, end = made.engine.generate, None

    def ended(requests: Any) -> list[Completion]:
        nonlocal end
        end = requests[0].limits.end_tokens[0]
        return [
            Completion((*one.tokens[:2], end), (*one.logprobs[:2], -1.0), "end") if one.stop == "length" else one
            for one in generate(requests)
        ]

    made.engine.generate = ended  # type: ignore[method-assign]
    made.engine.free = lambda conversations: None  # type: ignore[method-assign]


def fresh_conversations(made: Trainer) -> None:
    """Replies were edited, so the engine's cache of a conversation does not fit any more."""
    generate = made.engine.generate

    def renamed(requests: Any) -> list[Completion]:
        return generate(
            [Request(f"{r.conversation}/{len(r.tokens)}", r.tokens, r.draw_key, r.limits) for r in requests]
        )

    made.engine.generate = renamed  # type: ignore[method-assign]


def test_rewards_lie_on_the_last_chosen_token_of_the_turn_that_earned_them(tmp_path: Path) -> None:
    with scene(tmp_path) as made:
        fresh_conversations(made)
        never_cut(made)
        episodes = made.source.episodes(0)
    assert len(episodes) == 3
    for one in episodes:
        kinds = [kind for kind, _ in spans(one)]
        assert kinds[:3] == ["prompt", "chosen", "observation"]
        assert kinds[-1] == "chosen"
        chosen = [span for span in one.spans if span.kind == "chosen"]
        expected = [0.0] * len(one.tokens)
        expected[chosen[0].end - 1] = 101.0  # the turn's, and what came before the first action
        expected[chosen[1].end - 1] = 11.0
        assert list(one.rewards) == expected
        assert one.stop == "done"
        assert all(lp == 0 for t, lp in enumerate(one.logprobs) if t not in one.chosen)
        assert all(lp < 0 for t, lp in enumerate(one.logprobs) if t in one.chosen)
        assert [r[2] for r in one.transcript.rewards] == ["early", "turn", "turn", "end"]
        assert [m.role for m in one.transcript.views["policy"]] == ["user", "assistant", "user", "assistant", "user"]


def test_tokens_are_append_only(tmp_path: Path) -> None:
    seen: dict[str, tuple[int, ...]] = {}
    with scene(tmp_path, turns=3) as made:
        fresh_conversations(made)
        never_cut(made)
        generate = made.engine.generate

        def watched(requests: Any) -> list[Completion]:
            completions = generate(requests)
            for request, completion in zip(requests, completions, strict=True):
                before = seen.get(request.conversation, ())
                assert request.tokens[: len(before)] == before
                seen[request.conversation] = request.tokens + completion.tokens
            return completions

        made.engine.generate = watched  # type: ignore[method-assign]
        episodes = made.source.episodes(0)
    assert {one.tokens for one in episodes} == set(seen.values())


def test_two_agents_with_equal_views_draw_independently_and_are_reproducible(tmp_path: Path) -> None:
    with scene(tmp_path, "Pair", turns=1, sampling={"tasks_per_step": 8}) as made:
        fresh_conversations(made)
        never_cut(made)
        episodes = made.source.episodes(0)
        made.engine.load(made.policy.lm)
        made.source.load_state({"cursor": {"Pair": 0}})
        again = made.source.episodes(0)
    assert [one.agent for one in episodes] == ["left", "right"] * 8
    assert episodes == again
    pairs = list(zip(episodes[::2], episodes[1::2], strict=True))
    assert all(left.tokens[:4] == right.tokens[:4] for left, right in pairs)  # the same view
    assert sum(left.tokens != right.tokens for left, right in pairs) >= 7
    assert len({one.tokens for one in episodes}) >= 14
    assert all(left.group != right.group for left, right in pairs)


@pytest.mark.parametrize("bootstrap", [False, True])
def test_a_reply_cut_by_length_ends_the_episode(tmp_path: Path, bootstrap: bool) -> None:
    with scene(tmp_path, turns=5) as made:
        cut = {"tokens": 0}

        def always_cut(requests: Any) -> list[Completion]:
            cut["tokens"] = requests[0].limits.max_new_tokens
            return [Completion((5,) * cut["tokens"], (-1.0,) * cut["tokens"], "length") for _ in requests]

        made.engine.generate = always_cut  # type: ignore[method-assign]
        rollout = Rollout(
            made.source._rollout._host,
            made.engine,
            made.source._rollout._chat,
            made.recipe.sampling,
            bootstrap=bootstrap,
            phase=lambda *_: None,
        )
        tasks = [made.environments["Talk"].task("train", index) for index in range(2)]
        episodes = rollout.episodes(tasks, 1, Draw(0, "train", 0, 0), 1.0)
    for one in episodes:
        assert one.stop == "length"
        assert spans(one) == [("prompt", 0), ("chosen", 0)]
        assert sum(one.rewards) == (100.0 if bootstrap else 101.0)  # bootstrap does not ask for a score of a cut reply
    batch = collate(episodes, "cpu")
    assert batch is not None
    assert batch.truncated.all()
    assert not batch.ended.any()


@pytest.mark.parametrize("bootstrap", [False, True])
def test_a_turn_limit_truncates_and_bootstrap_appends_the_next_decision_state(tmp_path: Path, bootstrap: bool) -> None:
    algorithm = {"type": "ppo", "truncation": "bootstrap" if bootstrap else "terminal"}
    (tmp_path / "talk.py").write_text(SCRIPT)
    recipe = tiny(
        tmp_path,
        environments=[{"type": "./talk.py:Talk", "turns": 9}],
        sampling={"tasks_per_step": 3, "max_new_tokens": 4, "max_turns": 2},
        algorithm=algorithm,
    )
    with trainer(tmp_path / "run", recipe, folder=tmp_path) as made:
        fresh_conversations(made)
        never_cut(made)
        episodes = made.source.episodes(0)
    for one in episodes:
        assert one.stop == "turns"
        last = spans(one)[-1]
        assert last == (("observation", 2) if bootstrap else ("chosen", 1))
        assert sum(one.rewards) == 102.0
    batch = collate(episodes, "cpu")
    assert batch is not None
    assert batch.truncated.all()
    assert batch.ended.all()


def test_a_prompt_that_does_not_fit_is_excluded_by_name_and_counted(tmp_path: Path) -> None:
    with scene(tmp_path, sampling={"max_tokens": 5, "max_new_tokens": 4}) as made:
        made.source._rollout._max_tokens = 4
        episodes = made.source.episodes(0)
        means = episode_metrics(episodes, made.environments).means()
    assert all(one.stop == "failed" and "no room" in str(one.failure) for one in episodes)
    assert collate(episodes, "cpu") is None
    assert means["excluded_rate"] == 1
    assert means["failed_rate"] == 0
    assert "reward" not in means


def test_a_failed_session_is_counted_and_never_trained_on(tmp_path: Path) -> None:
    with scene(tmp_path, fail_at=2, turns=3) as made:
        fresh_conversations(made)
        never_cut(made)
        episodes = made.source.episodes(0)
        means = episode_metrics(episodes, made.environments).means()
    assert all(one.stop == "failed" and "no more" in str(one.failure) for one in episodes)
    assert means["failed_rate"] == 1
    assert collate(episodes, "cpu") is None


class _Counting(Environment):
    """Tasks are their index; nothing else is asked of it."""

    audited = True

    def size(self, split: Split) -> int | None:
        return 7 if split == "train" else None

    def task(self, split: Split, index: int) -> Task:
        return Task(f"{split}-{index}", "counting", split, index, {})

    def open(self, task: Task, seed: int) -> Session:
        raise AssertionError("no session is opened here")


def test_a_total_outage_of_an_environment_is_survived(tmp_path: Path) -> None:
    """No evaluation, no training on it, a saved stop after some steps, and a resume that goes on behind it."""
    warned: list[str] = []

    class Ear(Listener):
        def warned(self, text: str) -> None:
            warned.append(text)

    (tmp_path / "talk.py").write_text(SCRIPT)
    recipe = tiny(
        tmp_path,
        steps=9,
        environments=[{"type": "./talk.py:Talk", "fail_at": 1}],
        sampling={"tasks_per_step": 3, "max_new_tokens": 4},
        optimizer={"max_refused": 2},
    )
    with trainer(tmp_path / "run", recipe, Ear(), folder=tmp_path) as made, pytest.raises(NonFiniteError):
        run(made, Stopper())
    assert "every held-out episode failed" in warned[0]
    assert not made.run.has_evaluation(0)
    assert [row["failed_rate"] for row in made.run.metrics()] == [1, 1]
    assert checkpoint.state(made.run.checkpoints / "latest")["refused_in_a_row"] == 0
    assert checkpoint.state(made.run.checkpoints / "latest")["step"] == 2


def test_a_reply_that_ended_is_not_called_cut_when_the_next_message_does_not_fit(tmp_path: Path) -> None:
    with scene(tmp_path, turns=3, sampling={"max_tokens": 12}) as made:
        fresh_conversations(made)
        never_cut(made)
        episodes = made.source.episodes(0)
    assert {one.stop for one in episodes} == {"length"}
    batch = collate(episodes, "cpu")
    assert batch is not None
    assert batch.truncated.all()
    assert batch.ended.all()


def test_a_task_of_another_name_is_refused(tmp_path: Path) -> None:
    with scene(tmp_path) as made:
        environment = made.environments["Talk"]
        with pytest.raises(UserError, match="must be a Task of env 'other'"):
            take(environment, "other", "train", 0)
        environment.task = lambda split, index: {}[index]  # type: ignore[method-assign]
        with pytest.raises(UserError, match="KeyError"):
            take(environment, "Talk", "train", 0)


def test_each_epoch_takes_every_training_task_once_in_another_order(tmp_path: Path) -> None:
    from mrlm_cli.recipe.sections import Sampling
    from mrlm_cli.training.source import RolloutSource

    taken: list[int] = []

    class Noting:
        def episodes(self, tasks: list[Task], *_: object) -> list[Episode]:
            taken.extend(task.index for task in tasks)
            return []

    environment = _Counting(EnvironmentSettings(type="counting"))
    source = RolloutSource(
        Noting(),  # type: ignore[arg-type]
        {"counting": environment},
        Sampling(tasks_per_step=5),
        seed=3,
        keep=lambda group: None,
    )
    for step in range(3):
        source.episodes(step)
    state = source.state()
    source.episodes(3)
    epochs = [taken[:7], taken[7:14]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    later = taken[15:20]
    del taken[:]
    source.load_state(state)
    source.episodes(3)
    assert taken == later


def test_messages_of_a_reply_are_what_the_environment_hears(tmp_path: Path) -> None:
    heard: list[Reply] = []
    with scene(tmp_path, turns=1) as made:
        host = made.source._rollout._host
        step = host.step

        def watched(replies: list[tuple[str, Reply]]) -> object:
            heard.extend(reply for _, reply in replies)
            return step(replies)

        host.step = watched  # type: ignore[method-assign, assignment]
        episodes = made.source.episodes(0)
        decode = made.source._rollout._chat.decode
    for one, reply in zip(episodes, heard, strict=True):
        text = decode(one.tokens[one.chosen[0] :])
        assert reply.message.role == "assistant"
        assert text.startswith(reply.message.content)
        assert one.transcript.views["policy"][1] == reply.message == Message("assistant", reply.message.content)
    assert Turn().agent == "policy"


def test_while_the_environments_of_one_half_think_the_other_half_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, tuple[str, ...]]] = []
    with scene(tmp_path, turns=3, sampling={"tasks_per_step": 5, "max_turns": 3}) as made:  # sessions in workers
        fresh_conversations(made)
        never_cut(made)
        rollout = made.source._rollout  # type: ignore[union-attr]
        host, generate = rollout._host, made.engine.generate
        step, collect = host.step, host.collect

        def stepped(replies: Any) -> Any:
            events.append(("asked", tuple(name for name, _ in replies)))
            return step(replies)

        def collected(ticket: Any) -> Any:
            events.append(("awaited", tuple(entry.session for entry in ticket.entries)))
            return collect(ticket)

        def decoded(requests: Any) -> list[Completion]:
            events.append(("decoded", tuple(one.conversation.rpartition("/")[0] for one in requests)))
            return generate(requests)

        monkeypatch.setattr(host, "step", stepped)
        monkeypatch.setattr(host, "collect", collected)
        made.engine.generate = decoded  # type: ignore[method-assign]
        episodes = made.source.episodes(0)
    names = tuple(one.session for one in episodes)
    one, two = names[:3], names[3:]
    turn = [("awaited", one), ("decoded", one), ("asked", one), ("awaited", two), ("decoded", two), ("asked", two)]
    assert events == [*turn * 3, ("awaited", one), ("awaited", two)]
