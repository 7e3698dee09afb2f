"""Gymnasium: environments of that library whose observations can be told and whose actions can be said."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, get_args

from pydantic import Field, model_validator

from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.global_random import OwnRandom
from mrlm_cli.errors import MissingExtra, UserError
from mrlm_cli.records import Message, Reply, Split, Task, Turn
from mrlm_cli.registry import function
from mrlm_cli.strict import EnvironmentSettings, Names, Strings

_SPLITS: tuple[Split, ...] = get_args(Split)
_COLOURED = re.compile(r"\x1b\[[0-9;]+m(.*?)\x1b\[0m", re.DOTALL)

Observe = Callable[[Any, Any], str]
"""f(observation, environment) -> what the policy is told."""
Act = Callable[[str, Any], Any]
"""f(reply, environment) -> action; raises ValueError with a reason for the policy where the reply is none."""


class Gymnasium(Environment):
    """An environment of Gymnasium 1.x (extra `gymnasium`): its registered ones by id, or yours by path.

    Components: `reward`, what a step pays, so that an episode has the sum; `invalid`, 1 for a reply that is no action;
    `exact`, 1 at the end of an episode that succeeded, as `success_reward` or `success_info` says.

    How an observation is told: by your `observe_path`; else the text that it draws, where it is made with `settings:
    {render_mode: ansi}` (what is coloured there stands in square brackets); else the observation itself, of a Text or
    Discrete space. How a reply is read: by your `act_path`; else as a name in `actions` or a number of a Discrete
    space, or as the text of a Text space, blanks around it aside. A reply that is no action does not reach the
    environment: it is told why, and may try again, `mistakes` times in an episode; then the episode ends there.

    A terminated episode is done; one that Gymnasium truncates (`settings: {max_episode_steps: 50}`) is treated as a
    limit of turns, so `algorithm.truncation: bootstrap` values what would have followed.

    Splits have seeds of their own for `reset`, without end; an environment that ignores its seed, or always begins in
    the same place, shows the same in every split. Chance within an episode follows the task's seed alone, that of
    Python's and numpy's global generators too.
    """

    class Config(EnvironmentSettings):
        """Which environment, and how it is told."""

        id: Annotated[str, Field(min_length=1, max_length=200)] | None = None
        """Id in Gymnasium's table, such as FrozenLake-v1, or package.module:Name-v0, which imports the module first."""
        path: Annotated[Annotated[str, Field(pattern=":")] | None, Names("function")] = None
        """In place of id: ./my_game.py:MyGame beside the recipe, or package.module:MyGame, a class of gymnasium.Env."""
        settings: dict[str, Any] = Field(default_factory=dict)
        """Parameters with which it is made, such as {is_slippery: false, render_mode: ansi}."""
        prompt: Annotated[str, Field(max_length=10_000)] = ""
        """What is told first, before the first observation: the rules, and how to answer."""
        observe_path: Annotated[Annotated[str, Field(pattern=":")] | None, Names("function")] = None
        """./my_game.py:observe, a function of (observation, environment) that gives the text."""
        act_path: Annotated[Annotated[str, Field(pattern=":")] | None, Names("function")] = None
        """./my_game.py:act, a function of (reply, environment) that gives the action, or raises ValueError."""
        actions: Strings = ()
        """Names of the actions of a Discrete space in their order; without them a reply is the number."""
        mistakes: Annotated[int, Field(ge=0, le=100)] = 0
        """Replies in an episode that may be no action before one more of them ends it."""
        success_reward: float | None = None
        """An episode succeeded if its rewards add up to this or more."""
        success_info: Annotated[str, Field(min_length=1)] | None = None
        """In place of success_reward: an episode succeeded if the last step's info has a true value under this key."""

        @model_validator(mode="after")
        def _fits(self) -> Gymnasium.Config:
            if (self.id is None) == (self.path is None):
                raise ValueError("give either id or path")
            if (self.success_reward is None) == (self.success_info is None):
                raise ValueError("give either success_reward or success_info: what is an exactly right episode?")
            if self.actions and self.act_path is not None:
                raise ValueError("actions has no effect beside act_path")
            if len(set(self.actions)) != len(self.actions):
                raise ValueError("actions must differ")
            return self

        @property
        def needed_extras(self) -> tuple[str, ...]:
            """See Strict."""
            return ("gymnasium",)

    components: ClassVar[dict[str, float]] = {"reward": 1.0, "invalid": -1.0, "exact": 0.0}
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if importlib.util.find_spec("gymnasium") is None:
            raise MissingExtra("the environment gymnasium", "gymnasium")
        self._checked = False

    def size(self, split: Split) -> None:
        """There is no end of seeds. Raises UserError for an environment that cannot be made, told or answered."""
        if not self._checked:  # sizes are asked for often
            GymnasiumSession(self.config, 0).close()
            self._checked = True

    def task(self, split: Split, index: int) -> Task:
        """Episode number `index` of the split: its seed. Raises ValueError for a negative index."""
        if index < 0:
            raise ValueError(f"{split} has no task {index}")
        seed = index * len(_SPLITS) + _SPLITS.index(split)
        return Task(f"{split}/{index}", self.config.label, split, index, {"seed": seed})

    def open(self, task: Task, seed: int) -> GymnasiumSession:
        """An episode; it depends on the task's seed alone."""
        return GymnasiumSession(self.config, task.data["seed"])


class GymnasiumSession:
    """One episode."""

    def __init__(self, config: Gymnasium.Config, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._chance = OwnRandom(seed)
        self._total = 0.0
        self._mistakes = 0
        with self._chance:
            self._environment = _made(config)
        try:
            self._observe = _observe(config, self._environment)
            self._act = _act(config, self._environment)
        except UserError:
            self.close()
            raise

    def start(self) -> Turn:
        """The prompt and the first observation."""
        with self._chance:
            observation, _ = self._environment.reset(seed=self._seed)
            told = self._observe(observation, self._environment)
        return Turn((Message("user", f"{self._config.prompt}\n{told}" if self._config.prompt else told),))

    def step(self, reply: Reply) -> Turn:
        """What follows the action, or why the reply is none."""
        with self._chance:
            try:
                action = self._act(reply.message.content, self._environment)
            except ValueError as error:
                return self._refused(str(error))
            observation, reward, terminated, truncated, info = self._environment.step(action)
            told = self._observe(observation, self._environment)
        self._total += float(reward)
        done = bool(terminated or truncated)
        rewards = {"reward": float(reward)}
        if done:
            rewards["exact"] = float(self._succeeded(info))
        return Turn(
            () if terminated else (Message("user", told),),
            rewards={"policy": rewards},
            done=done,
            truncated=bool(truncated and not terminated),
        )

    def close(self) -> None:
        """Let the environment free what it holds."""
        self._environment.close()

    def _refused(self, reason: str) -> Turn:
        self._mistakes += 1
        if self._mistakes > self._config.mistakes:
            return Turn(rewards={"policy": {"invalid": 1.0, "exact": 0.0}}, done=True)
        return Turn((Message("user", reason),), rewards={"policy": {"invalid": 1.0}})

    def _succeeded(self, info: dict[str, Any]) -> bool:
        if self._config.success_info is not None:
            return bool(info.get(self._config.success_info))
        assert self._config.success_reward is not None
        return self._total >= self._config.success_reward


def _made(config: Gymnasium.Config) -> Any:
    """The environment. Raises UserError where Gymnasium refuses the id or the settings."""
    import gymnasium

    try:
        if config.id is not None:
            return gymnasium.make(config.id, **config.settings)
        assert config.path is not None
        settings = dict(config.settings)
        steps = settings.pop("max_episode_steps", None)
        made = function(config.path)(**settings)
        if not isinstance(made, gymnasium.Env):
            raise UserError(f"{config.path} gives a {type(made).__name__}, not a gymnasium.Env")
        return made if steps is None else gymnasium.wrappers.TimeLimit(made, steps)
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        raise UserError(f"gymnasium cannot make {config.id or config.path}: {error}") from error


def _observe(config: Gymnasium.Config, environment: Any) -> Observe:
    """How observations become text. Raises UserError where nothing says how."""
    from gymnasium.spaces import Discrete, Text

    if config.observe_path is not None:
        return function(config.observe_path)
    if environment.render_mode == "ansi":
        return lambda observation, made: _COLOURED.sub(r"[\1]", str(made.render())).strip("\n")
    if isinstance(environment.observation_space, Text | Discrete):
        return lambda observation, made: str(observation)
    kind = type(environment.observation_space).__name__
    raise UserError(
        f"observations of {config.id or config.path} are of a {kind} space, which has no text of its own: give "
        "observe_path, or settings: {render_mode: ansi} if it can draw itself so"
    )


def _act(config: Gymnasium.Config, environment: Any) -> Act:
    """How replies become actions. Raises UserError where nothing says how."""
    from gymnasium.spaces import Discrete, Text

    space = environment.action_space
    if config.act_path is not None:
        return function(config.act_path)
    if isinstance(space, Discrete):
        first, count = int(space.start), int(space.n)
        names = config.actions or tuple(str(first + number) for number in range(count))
        if len(names) != count:
            raise UserError(f"{config.id or config.path} has {count} actions; actions names {len(names)}")
        numbers = {name: first + number for number, name in enumerate(names)}
        return lambda reply, made: _named(reply, numbers)
    if config.actions:
        raise UserError(f"actions is for a Discrete space; {config.id or config.path} has a {type(space).__name__} one")
    if isinstance(space, Text):
        return lambda reply, made: _contained(reply, space)
    raise UserError(
        f"actions of {config.id or config.path} are of a {type(space).__name__} space: give act_path, a function of "
        "(reply, environment) that gives the action"
    )


def _named(reply: str, numbers: dict[str, int]) -> int:
    number = numbers.get(reply.strip())
    if number is None:
        raise ValueError(f"That is no action. Answer with one of: {', '.join(numbers)}.")
    return number


def _contained(reply: str, space: Any) -> str:
    text = reply.strip()
    if not space.contains(text):
        raise ValueError(
            f"That is no action. Answer with {space.min_length} to {space.max_length} characters of: "
            f"{''.join(sorted(space.character_set))}"
        )
    return text
