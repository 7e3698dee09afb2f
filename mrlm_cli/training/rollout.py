"""Sessions and an engine make episodes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mrlm_cli.draws import draw_key, integer
from mrlm_cli.engines.base import Engine
from mrlm_cli.envs.host import Host, Ticket
from mrlm_cli.errors import SessionFailure
from mrlm_cli.policy.chat import Chat
from mrlm_cli.recipe.sections import Sampling
from mrlm_cli.records import Episode, EpisodeStop, Limits, Reply, Task, Transcript, Turn
from mrlm_cli.training.conversation import Conversation

EXCLUDED = "excluded: "  # a failure that begins so is an episode that never fitted, not a technical failure


@dataclass(frozen=True, slots=True)
class Draw:
    """What the episodes of one rollout are a function of, besides weights, task and sample."""

    seed: int
    stream: str  # "train", or the split of an evaluation
    step: int  # an evaluation draws the same at every step, so that two of them differ by the policy alone
    policy_step: int  # how many updates the policy has seen


@dataclass(slots=True)
class _Live:
    """A session under way."""

    name: str  # unique in the run, for the journal
    key: tuple[int | str, ...]  # what every draw in the session is a function of
    task: Task
    sample: int
    conversations: dict[str, Conversation] = field(default_factory=dict)
    rewards: list[tuple[str, int, str, float]] = field(default_factory=list)
    facts: dict[str, float] = field(default_factory=dict)
    speaker: str = ""
    stop: EpisodeStop | None = None
    failure: str | None = None

    def end(self, stop: EpisodeStop, failure: str | None = None) -> None:
        self.stop, self.failure = stop, failure


@dataclass(slots=True)
class _Cohort:
    sessions: list[_Live]
    ticket: Ticket


class Rollout:
    """Runs sessions to their end and returns their episodes, in the order of (task, sample, agent).

    Sessions in worker processes are cut into two cohorts, so that one decodes while the other's environments think;
    who belongs to which depends on counts only, never on a clock.
    """

    def __init__(
        self,
        host: Host,
        engine: Engine,
        chat: Chat,
        sampling: Sampling,
        *,
        bootstrap: bool,
        phase: Callable[[str, int, int], None],
    ) -> None:
        self._host = host
        self._engine = engine
        self._chat = chat
        self._sampling = sampling
        self._bootstrap = bootstrap
        self._phase = phase
        self._max_tokens = min(sampling.max_tokens or chat.context, chat.context)

    def episodes(self, tasks: Sequence[Task], samples: int, draw: Draw, temperature: float) -> list[Episode]:
        """`samples` episodes of each task."""
        limits = Limits(
            max_new_tokens=self._sampling.max_new_tokens,
            temperature=temperature,
            end_tokens=self._chat.end_tokens,
            stop_strings=self._sampling.stop,
        )
        sessions = [
            _Live(
                f"{draw.stream}/{draw.policy_step}/{task.env}/{task.id}/{number}.{sample}",
                (draw.seed, draw.stream, draw.step, number, task.env, task.id, sample),
                task,
                sample,
            )
            for number, task in enumerate(tasks)
            for sample in range(samples)
        ]
        waiting: deque[_Cohort] = deque()
        for members in self._cohorts(sessions):
            opened = [(one.name, one.task, integer(2**63, "session", *one.key)) for one in members]
            waiting.append(_Cohort(members, self._host.open(opened)))
        done = 0
        while waiting:
            cohort = waiting.popleft()
            self._phase(f"{draw.stream}: sampling", done, len(sessions))
            turns = self._host.collect(cohort.ticket)
            replies = self._advance(cohort, turns, draw, limits)
            over = [one for one in cohort.sessions if one.stop is not None]
            self._host.close([one.name for one in over])
            self._engine.free([talk.name for one in over for talk in one.conversations.values()])
            done += len(over)
            cohort.sessions = [one for one in cohort.sessions if one.stop is None]
            if cohort.sessions:
                cohort.ticket = self._host.step(replies)
                waiting.append(cohort)
        self._phase(f"{draw.stream}: sampling", done, len(sessions))
        return [episode for one in sessions for episode in self._episodes(one)]

    def _cohorts(self, sessions: list[_Live]) -> list[list[_Live]]:
        if len(sessions) < 2 or not any(self._host.thinks_apart(one.task.env) for one in sessions):
            return [sessions]
        middle = (len(sessions) + 1) // 2
        return [sessions[:middle], sessions[middle:]]

    def _advance(
        self, cohort: _Cohort, turns: Mapping[str, Turn | SessionFailure], draw: Draw, limits: Limits
    ) -> list[tuple[str, Reply]]:
        """Hear every session's turn, let the policy answer, and return the replies for sessions that go on."""
        speaking: list[tuple[_Live, Conversation]] = []
        for one in cohort.sessions:
            self._hear(one, turns[one.name])
            if one.stop is None:
                speaking.append((one, one.conversations[one.speaker]))
        completions = self._engine.generate([talk.request(limits) for _, talk in speaking]) if speaking else []
        replies = []
        for (one, talk), completion in zip(speaking, completions, strict=True):
            reply = talk.say(completion, draw.policy_step)
            if reply.stop == "length" and self._bootstrap:
                one.end("length")  # the same decision would have gone on: the environment is not asked to score it
            else:
                replies.append((one.name, reply))
        return replies

    def _hear(self, one: _Live, turn: Turn | SessionFailure) -> None:
        if isinstance(turn, SessionFailure):
            one.end("failed", str(turn))
            return
        acted = one.conversations.get(one.speaker)
        self._take_rewards(one, turn)
        one.facts.update(turn.facts)
        talk = self._conversation(one, turn.agent)
        if turn.done:
            if turn.truncated and self._bootstrap and turn.agent == one.speaker:
                talk.hear(turn.messages, turn.tools)  # V is asked at the next decision state
            else:
                talk.view.extend(turn.messages)
            cut = acted is not None and acted.last_stop == "length"
            one.end("length" if cut else "turns" if turn.truncated else "done")
        elif acted is not None and acted.last_stop == "length":
            talk.view.extend(turn.messages)
            one.end("length")
        elif talk.turn >= self._sampling.max_turns:
            if self._bootstrap:
                talk.hear(turn.messages, turn.tools)  # V is asked at the next decision state
            else:
                talk.view.extend(turn.messages)
            one.end("turns")
        elif not talk.hear(turn.messages, turn.tools):
            if talk.turn == 0:
                one.end("failed", f"{EXCLUDED}the prompt leaves no room in {self._max_tokens} tokens")
            else:
                one.end("length")
        one.speaker = turn.agent

    def _take_rewards(self, one: _Live, turn: Turn) -> None:
        environment = self._host.environments[one.task.env]
        weights = environment.reward_weights(environment.config)
        for agent, components in turn.rewards.items():
            talk = self._conversation(one, agent)
            for component, value in components.items():
                one.rewards.append((agent, max(0, talk.turn - 1), component, float(value)))
            talk.reward(sum(weights[component] * value for component, value in components.items()))

    def _conversation(self, one: _Live, agent: str) -> Conversation:
        if agent not in one.conversations:
            key = draw_key("reply", *one.key, agent)
            one.conversations[agent] = Conversation(self._chat, f"{one.name}/{agent}", key, self._max_tokens)
        return one.conversations[agent]

    def _episodes(self, one: _Live) -> list[Episode]:
        assert one.stop is not None
        transcript = Transcript(
            task=one.task,
            sample=one.sample,
            views={agent: tuple(talk.view) for agent, talk in one.conversations.items()},
            rewards=tuple(one.rewards),
            facts=one.facts,
            stop=one.stop,
            failure=one.failure,
        )
        agents = self._host.environments[one.task.env].agents
        talks = {agent: one.conversations.get(agent) for agent in agents if agent in one.conversations} or {
            agents[0]: None
        }
        return [
            Episode(
                id=f"{one.name}/{agent}",
                session=one.name,
                task=one.task,
                group=f"{one.task.env}/{one.task.id}/{agent}",
                sample=one.sample,
                agent=agent,
                tokens=tuple(talk.tokens) if talk else (),
                spans=tuple(talk.spans) if talk else (),
                logprobs=tuple(talk.logprobs) if talk else (),
                rewards=tuple(talk.rewards) if talk else (),
                transcript=transcript,
                stop=one.stop,
                ended=talk is not None and talk.last_stop in ("end", "string"),
                failure=one.failure,
            )
            for agent, talk in talks.items()
        ]
