"""Who speaks for the roles that do not learn: frozen policies with an engine of their own, and scripted players."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mrlm_cli import registry
from mrlm_cli.engines.base import Engine
from mrlm_cli.envs.base import Environment, Player
from mrlm_cli.envs.players import Playing, label
from mrlm_cli.envs.wire import describe_exception
from mrlm_cli.errors import SessionFailure
from mrlm_cli.policy import load
from mrlm_cli.policy.chat import Chat
from mrlm_cli.policy.model import Policy
from mrlm_cli.recipe import agents
from mrlm_cli.recipe.schema import Recipe
from mrlm_cli.recipe.sections import ModelSection, PretrainedModel
from mrlm_cli.records import Limits, Message, Reply, ReplyStop
from mrlm_cli.strict import EnvironmentSettings


@dataclass(frozen=True, slots=True)
class Frozen:
    """A policy that never moves. Roles of the same model share policy and engine."""

    policy: Policy
    engine: Engine
    chat: Chat
    limits: Limits


@dataclass(frozen=True, slots=True)
class Scripted:
    """A program, one new player for each session. Only an audited environment's own ones run in this process."""

    name: str

    def apart(self, environment: Environment) -> bool:
        """Whether the player needs a worker process and a deadline."""
        return not (environment.in_process and self.name in environment.players)


@dataclass(frozen=True, slots=True)
class Scored:
    """A reward of the recipe, asked in the middle of a session about what the role was shown since it last spoke."""

    reward: str


Other = Frozen | Scripted | Scored


class Script:
    """A scripted agent's view of one session: what a Conversation is for a policy, without tokens.

    `make` gives a player of this process; None for a reward, and for a player in a worker process, which are asked
    about what was `unheard`.
    """

    def __init__(self, name: str, other: Scripted | Scored, make: Callable[[], Player] | None) -> None:
        self.name = name
        self.other = other
        self.view: list[Message] = []
        self.turn = 0  # replies given so far
        self.last_stop: ReplyStop | None = None
        self.make = make
        self._player: Player | None = None
        self._told = 0

    def hear(self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]]) -> bool:
        """Take in what the agent sees before it speaks; there is always room."""
        self.view.extend(messages)
        return True

    def reward(self, value: float) -> None:
        """The transcript keeps it; nobody learns from it."""

    def unheard(self) -> list[Message]:
        """What the agent saw since it spoke last."""
        return self.view[self._told :]

    def ask(self) -> str:
        """The reply of a player in this process. Raises SessionFailure for whatever the player does wrong."""
        assert self.make is not None
        try:
            if self._player is None:
                self._player = self.make()
            return self._player.reply(tuple(self.view))
        except Exception as error:  # a bug of a player fails its session alone
            raise SessionFailure(f"the scripted player fails: {describe_exception(error)}") from error

    def say(self, text: str) -> Reply:
        """The player's reply, taken down."""
        message = Message("assistant", text)
        self.view.append(message)
        self._told = len(self.view)
        self.turn += 1
        self.last_stop = "end"
        return Reply(message, "end")


def players(
    recipe: Recipe, others: Mapping[str, Other], environments: Mapping[str, Environment], folders: Sequence[Path]
) -> list[EnvironmentSettings]:
    """Settings of the sessions in which players that need a worker process speak, a role and environment each."""
    return [
        Playing.Config(
            type="mrlm_cli.envs.players:Playing",
            name=label(role, settings.label),
            max_failed=settings.max_failed,
            player=other.name,
            role=role,
            environment=settings.type,
            settings=settings.model_dump_json(),
            folders=[str(folder.resolve()) for folder in folders],
        )
        for role, other in others.items()
        if isinstance(other, Scripted)
        for settings in recipe.environments
        if role in environments[settings.label].roles(settings) and other.apart(environments[settings.label])
    ]


def others(recipe: Recipe, start: ModelSection, folders: Sequence[Path], check: Callable[[], None]) -> dict[str, Other]:
    """Role → who speaks for it, of a settled recipe, for the roles that do not learn.

    `start` is the model from which the run started: a frozen agent without a path is that policy, made anew, so that it
    is the same when a checkpoint is evaluated. Raises what `load.build` raises.
    """
    found: dict[str, Other] = {}
    built: dict[str | None, tuple[Policy, Chat, Engine]] = {}
    for role, agent in recipe.agents.items():
        if isinstance(agent, agents.Scripted):
            found[role] = Scripted(agent.player)
        elif isinstance(agent, agents.Scorer):
            found[role] = Scored(agent.reward)
        elif isinstance(agent, agents.Frozen):
            if agent.path not in built:
                built[agent.path] = _build(agent, recipe, start, folders, check)
            policy, chat, engine = built[agent.path]
            section = agent.chat or start.chat
            chat = Chat(chat.tokenizer, section, vocabulary=chat.vocabulary, context=chat.context)
            sampling = recipe.sampling
            limits = Limits(
                max_new_tokens=agent.max_new_tokens or sampling.max_new_tokens,
                temperature=sampling.temperature if agent.temperature is None else agent.temperature,
                end_tokens=chat.end_tokens,
                stop_strings=agent.stop,
            )
            found[role] = Frozen(policy, engine, chat, limits)
    return found


def _build(
    agent: agents.Frozen, recipe: Recipe, start: ModelSection, folders: Sequence[Path], check: Callable[[], None]
) -> tuple[Policy, Chat, Engine]:
    chat = agent.chat or start.chat
    as_loaded = start.model_copy(update={"lora": None})
    model = as_loaded if agent.path is None else PretrainedModel(type="pretrained", path=agent.path, chat=chat)
    policy, door = load.build(
        model,
        seed=recipe.seed,
        device=recipe.hardware.device,
        precision=recipe.hardware.precision,
        gradient_checkpointing=False,
        values=False,
    )
    engine: Engine = registry.resolve("engines", recipe.engine.type, folders)(
        recipe.engine, decode=door.decode, precision=recipe.hardware.precision, check=check
    )
    return policy.requires_grad_(False), door, engine
