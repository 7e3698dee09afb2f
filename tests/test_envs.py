"""The built-in environments: what they ask, what they pay, what they hold out; and an environment of one's own."""

import itertools
import json
import math
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlm_cli.envs import arithmetic, sentiment
from mrlm_cli.envs.arithmetic import Arithmetic
from mrlm_cli.envs.base import Environment
from mrlm_cli.envs.conformance import HOSTILE, SPLITS, problems
from mrlm_cli.envs.guess import Guess, binary_search_return
from mrlm_cli.envs.host import Host, NoJournal
from mrlm_cli.envs.sentiment import Sentiment
from mrlm_cli.envs.single import SingleReply
from mrlm_cli.envs.sort_digits import SortDigits
from mrlm_cli.envs.splits import split_classes
from mrlm_cli.errors import MissingExtra
from mrlm_cli.recipe import compose
from mrlm_cli.records import Message, Reply, Task, Turn
from mrlm_cli.registry import resolve
from mrlm_cli.strict import EnvironmentSettings

RECIPES = Path(__file__).parents[1] / "recipes"
CASES = [
    (SortDigits, {}),
    (SortDigits, {"digits": 2}),
    (SortDigits, {"digits": 9}),
    (Arithmetic, {}),
    (Arithmetic, {"operators": ["+", "-", "*"], "operands": 3, "low": 0, "high": 20, "form": "words"}),
    (Arithmetic, {"digits": 6, "operands": 2, "operators": ["-"], "prompt": "{expression}="}),
    (Guess, {}),
    (Guess, {"low": 0, "high": 999, "guesses": 3, "padded": True}),
    (Sentiment, {}),
]
NAMES = {SortDigits: "sort_digits", Arithmetic: "arithmetic", Guess: "guess", Sentiment: "sentiment"}


def make(kind: type[Environment], **fields) -> Environment:
    return kind(kind.Config.model_validate_json(json.dumps({"type": NAMES[kind], **fields})))


def reply(text: str, stop: str = "end") -> Reply:
    return Reply(Message("assistant", text), stop)


def ask(environment: Environment, task: Task, *replies: Reply) -> Turn:
    """The last turn of a session."""
    session = environment.open(task, 0)
    turn = session.start()
    for each in replies:
        assert not turn.done
        turn = session.step(each)
    return turn


def paid(turn: Turn) -> dict[str, float]:
    return dict(turn.rewards["policy"])


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_conformance(kind, fields):
    assert problems(make(kind, **fields)) == []


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_reply_earns_little(kind, text):
    environment = make(kind)
    for stop in ("end", "string", "length"):
        turn = ask(environment, environment.task("validation", 0), reply(text, stop))
        assert paid(turn).get("exact", 0.0) == (kind is Sentiment and "😀" in text)
        weights = environment.reward_weights(environment.config)
        earned = sum(weights[name] * value for name, value in paid(turn).items())
        assert -3.61 <= earned <= (1.0 if kind is Sentiment else 0.4)


@pytest.mark.parametrize("kind", NAMES)
def test_tasks_outside_the_split_are_refused(kind):
    environment = make(kind)
    for index in (-1, environment.size("test")):
        with pytest.raises(ValueError, match=str(index)):
            environment.task("test", index)


def test_classes_are_split_by_a_tenth_without_overlap():
    splits = split_classes([str(i) for i in range(1000)])
    assert {name: len(chosen) for name, chosen in splits.items()} == {"train": 800, "validation": 100, "test": 100}
    assert sorted(itertools.chain(*splits.values())) == list(range(1000))
    # A sample, not a pattern: all last digits are held out about equally.
    counts = Counter(i % 10 for i in splits["validation"])
    assert min(counts.values()) >= 3
    assert max(counts.values()) <= 20
    assert {i // 100 for i in splits["validation"]} == set(range(10))
    assert {name: len(chosen) for name, chosen in split_classes("abc").items()} == dict.fromkeys(splits, 1)
    with pytest.raises(ValueError, match="2 classes"):
        split_classes("ab")


# sort_digits


def test_sort_digits_gives_every_string_once_and_splits_by_multiset():
    environment = make(SortDigits, digits=3)
    digits = {s: [environment.task(s, i).data["digits"] for i in range(environment.size(s))] for s in SPLITS}
    assert sorted(itertools.chain(*digits.values())) == [f"{i:03}" for i in range(1000)]
    classes = {split: {"".join(sorted(each)) for each in strings} for split, strings in digits.items()}
    assert sum(len(each) for each in classes.values()) == len(set().union(*classes.values())) == 220
    assert [len(classes[split]) for split in SPLITS] == [176, 22, 22]


def test_sort_digits_is_large_enough():
    environment = make(SortDigits)
    sizes = {split: environment.size(split) for split in SPLITS}
    assert sum(sizes.values()) == 10**6
    assert sizes["train"] > 10_000
    for split in ("validation", "test"):
        first = [environment.task(split, i) for i in range(500)]
        assert len({task.data["digits"] for task in first}) == 500
        assert len({environment.canonical(task) for task in first}) > 250  # spread over the classes
    last = make(SortDigits, digits=12).task("train", 10**11)
    assert sorted(last.data["digits"]) == list(last.data["answer"])


@pytest.mark.parametrize(
    ("text", "stop", "match"),
    [
        ("025678", "end", 1.0),
        ("025678", "length", 6 / 7),
        ("025678", "string", 6 / 7),
        ("02567", "end", 5 / 7),
        ("0256789", "end", 6 / 8),
        ("0256789", "length", 6 / 7),
        ("", "end", 0.0),
        ("", "length", 0.0),
        ("750862", "end", 1 / 7),
        (" 025678", "end", 0.0),
        ("025678" + "x" * 93, "length", 6 / 99),
    ],
)
def test_sort_digits_pays_by_position_and_for_the_end(text, stop, match):
    environment = make(SortDigits)
    task = Task("t", "sort_digits", "train", 0, {"digits": "750862", "answer": "025678"})
    turn = ask(environment, task, reply(text, stop))
    assert ask(environment, task).messages == (Message("user", "sort 750862="),)
    assert turn.done
    assert paid(turn) == {"match": pytest.approx(match), "exact": float(match == 1.0)}


# arithmetic


@pytest.mark.parametrize("operators", ["+", "-", "*", "+-*"])
def test_arithmetic_gives_every_expression_once_and_splits_by_symmetry(operators):
    environment = make(Arithmetic, operators=list(operators), low=0, high=9, operands=3)
    owner: dict[str, str] = {}
    value: dict[str, int] = {}
    seen = []
    for split in SPLITS:
        for index in range(environment.size(split)):
            task = environment.task(split, index)
            numbers, chosen = task.data["numbers"], task.data["operators"]
            text = str(numbers[0]) + "".join(f"{o}{n}" for o, n in zip(chosen, numbers[1:], strict=True))
            seen.append(text)
            assert int(task.data["answer"]) == eval(text)
            form = environment.canonical(task)
            assert owner.setdefault(form, split) == split
            assert value.setdefault(form, eval(text)) == eval(text)
    assert len(seen) == len(set(seen)) == 1000 * len(operators) ** 2


@given(st.lists(st.integers(1, 30), min_size=2, max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_arithmetic_canonical_form_forgets_the_order(numbers, random):
    environment = make(Arithmetic)

    def form(numbers, operator):
        return environment.canonical(
            Task("", "", "train", 0, {"numbers": numbers, "operators": [operator] * (len(numbers) - 1)})
        )

    other = random.sample(numbers, len(numbers))
    assert form(numbers, "+") == form(other, "+")
    assert form(numbers, "*") == form(other, "*")
    assert (form(numbers, "-") == form(other, "-")) == (numbers[0] == other[0])


def test_arithmetic_holds_out_enough_and_no_pattern():
    environment = make(Arithmetic)
    sizes = [environment.size(split) for split in SPLITS]
    assert sum(sizes) == 2500
    assert min(sizes) >= 240
    answers = [int(environment.task("validation", i).data["answer"]) for i in range(environment.size("validation"))]
    assert 0.04 < sum(answer % 10 == 0 for answer in answers) / len(answers) < 0.2
    capped = make(Arithmetic, digits=6, operators=["-"])
    assert sum(capped.size(split) for split in SPLITS) == arithmetic.MOST_TASKS


@pytest.mark.parametrize(
    ("text", "stop", "shaped"),
    [
        ("42", "end", 1.0),
        (" 42\n", "end", 1.0),
        ("42", "string", 1.0),
        ("42", "length", 0.15),
        ("41", "end", 0.35),
        ("52", "end", 0.35),
        ("17", "end", 0.3),
        ("-42", "end", 0.3 + 0.1 * 2 / 3),
        ("042", "end", 0.3 + 0.1 * 2 / 3),
        ("17", "length", 0.0),
        ("42.", "end", 0.25),
        ("27 + 15 = 42", "end", 0.25),
        ("27 + 15 = 42", "length", 0.15),
        ("42 or 43", "end", 0.1),
        ("", "end", 0.1),
        ("", "length", 0.0),
        ("٤٢", "end", 0.1),
    ],
)
def test_arithmetic_pays(text, stop, shaped):
    environment = make(Arithmetic)
    task = Task("t", "arithmetic", "train", 0, {"numbers": [27, 15], "operators": ["+"], "answer": "42"})
    turn = ask(environment, task, reply(text, stop))
    assert ask(environment, task).messages[0].content == "What is 27 + 15? Answer with just the number."
    assert paid(turn) == {"shaped": pytest.approx(shaped), "exact": float(shaped == 1.0)}


def test_arithmetic_in_words():
    environment = make(Arithmetic, form="words", prompt="{expression} is", operators=["-", "*"], operands=4)
    task = Task("", "", "train", 0, {"numbers": [900_017, 40, 215, 3000], "operators": ["-", "*", "*"], "answer": ""})
    words = "nine hundred thousand seventeen minus forty times two hundred fifteen times three thousand is"
    assert ask(environment, task).messages[0].content == words


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"digits": 2, "low": 5}, "takes the place of low and high"),
        ({"low": 20, "high": 10}, "above high"),
        ({"low": 1, "high": 5}, "nothing to hold out"),
        ({"operators": ["+", "+"]}, "twice"),
        ({"operators": ["/"]}, "operators"),
        ({"prompt": "what?"}, "must contain {expression}"),
    ],
)
def test_arithmetic_refuses_settings_that_make_no_sense(fields, text):
    with pytest.raises(ValueError, match=text):
        make(Arithmetic, **fields)


# guess


def play(environment: Environment, task: Task) -> float:
    """The weighted return of bisection, through a real session."""
    weights = environment.reward_weights(environment.config)
    session, low, high, total = environment.open(task, 0), environment.config.low, environment.config.high, 0.0
    turn = session.start()
    while not turn.done:
        guess = (low + high) // 2
        turn = session.step(reply(str(guess)))
        total += sum(weights[name] * value for name, value in turn.rewards["policy"].items())
        if not turn.done:
            low, high = (low, guess - 1) if turn.messages[0].content == "<" else (guess + 1, high)
    return total


@pytest.mark.parametrize(
    ("fields", "expected"), [({}, 0.678125), ({"high": 16, "guesses": 5}, 0.7625), ({"guesses": 3}, None)]
)
def test_bisection_earns_what_is_said_and_nothing_earns_more(fields, expected):
    environment = make(Guess, **fields)
    count = environment.size("validation")
    mean = sum(play(environment, environment.task("validation", i)) for i in range(count)) / count
    assert binary_search_return(environment.config) == pytest.approx(mean)
    if expected is not None:
        assert mean == pytest.approx(expected)

    @cache
    def best(width: int, left: int) -> float:
        """The largest sum over the secrets of a range of equally likely ones, by dynamic programming."""
        if width == 0 or left == 0:
            return 0.0
        return max(
            1.0 - 0.1 * (width - 1) + best(below, left - 1) + best(width - 1 - below, left - 1)
            for below in range(width)
        )

    assert mean == pytest.approx(best(count, environment.config.guesses) / count)


def test_guess_answers_and_pays_each_turn():
    environment = make(Guess)
    task = Task("t", "guess", "train", 0, {"secret": 20, "game": 0})
    missed = {"cost": 1.0, "wasted": 0.0}
    turn = ask(environment, task)
    assert [message.content for message in turn.messages] == ["1-32?"]
    for text, answer, rewards in [
        ("16", ">", missed),
        ("24", "<", missed),
        ("04", ">", missed),
        (" 4\n", ">", missed),
        ("0", "?", {"invalid": 1.0}),
        ("33", "?", {"invalid": 1.0}),
        ("020", "?", {"invalid": 1.0}),
        ("1x", "?", {"invalid": 1.5}),
        ("", "?", {"invalid": 2.0}),
        ("²", "?", {"invalid": 2.0}),
        ("٢٠", "?", {"invalid": 2.0}),
    ]:
        turn = ask(environment, task, reply(text))
        assert ([message.content for message in turn.messages], turn.done) == ([answer], False)
        assert spent(turn) == rewards
    won = ask(environment, task, reply("16"), reply("020"), reply("20"))
    assert (spent(won), won.done, won.facts) == ({"win": 1.0, "exact": 1.0}, True, {"guesses": 3.0})
    lost = ask(environment, task, *[reply("1")] * 6)
    assert (spent(lost), lost.done, lost.messages, lost.facts) == ({"cost": 1.0, "wasted": 1.0}, True, (), {})
    cut = ask(environment, task, reply("1"), reply("20", "length"))
    assert (paid(cut), cut.done) == ({"invalid": 10.0}, True)


def spent(turn: Turn) -> dict[str, float]:
    """What a turn of guessing was paid, but for what it told."""
    return {name: value for name, value in paid(turn).items() if name != "narrowed"}


@pytest.mark.parametrize("guesses", ["16 24 22 20", "20", "1 32 15 20", "16 16 x 30 5 20", "32 31 30 29 28 20"])
def test_guess_pays_for_the_bits_that_an_answer_told(guesses):
    environment = make(Guess)
    session = environment.open(Task("t", "guess", "train", 0, {"secret": 20, "game": 0}), 0)
    possible, told = set(range(1, 33)), 0.0
    for guess in guesses.split():
        turn = session.step(reply(guess))
        answer = turn.messages[0].content if turn.messages else "="
        before = len(possible)
        if answer != "?":
            number = int(guess)
            possible &= {each for each in possible if ("<=>")[(each > number) - (each < number) + 1] == answer}
            assert paid(turn)["narrowed"] == pytest.approx(math.log(before / len(possible)) / math.log(32))
        told += paid(turn).get("narrowed", 0.0)
    assert possible == {20}
    assert told == pytest.approx(1.0)
    assert environment.reward_weights(environment.config)["narrowed"] == 0.0


@pytest.mark.parametrize(
    ("guesses", "wasted"),
    [
        ("16 24 22", "000"),
        ("16 15", "01"),
        ("16 16", "01"),
        ("24 25", "01"),
        ("16 24 10 23 30 21", "001010"),
        ("x 9 8", "-01"),
    ],
)
def test_guess_names_a_guess_that_was_ruled_out(guesses, wasted):
    environment = make(Guess)
    session = environment.open(Task("t", "guess", "train", 0, {"secret": 20, "game": 0}), 0)
    seen = [paid(session.step(reply(guess))) for guess in guesses.split()]
    assert [each.get("wasted") for each in seen] == [None if mark == "-" else float(mark) for mark in wasted]


def test_guess_can_ask_for_numbers_of_one_width():
    environment = make(Guess, padded=True)
    task = Task("t", "guess", "train", 0, {"secret": 4, "game": 0})
    assert "win" in paid(ask(environment, task, reply("04")))
    assert paid(ask(environment, task, reply("4"))) == {"invalid": 1.0}
    assert paid(ask(environment, task, reply("004"))) == {"invalid": 1.0}


def test_breaking_a_game_off_never_pays_better_than_losing_it():
    environment = make(Guess)
    weights = environment.reward_weights(environment.config)
    guesses = environment.config.guesses
    lost = guesses * weights["cost"]
    for misses in range(guesses):
        replies = [reply("1")] * misses + [reply("1", "length")]
        turn = ask(environment, environment.task("train", 9), *replies)
        assert misses * weights["cost"] + paid(turn)["invalid"] * weights["invalid"] < lost


def test_guess_says_that_it_holds_nothing_out():
    environment = make(Guess)
    assert not environment.held_out
    assert [environment.task("test", i).data["secret"] for i in range(32)] == list(range(1, 33))
    secrets = Counter(environment.task("train", i).data["secret"] for i in range(0, environment.size("train"), 7))
    assert set(secrets) == set(range(1, 33))
    assert all(kind.held_out for kind in (SortDigits, Arithmetic, Sentiment))


# sentiment


def test_sentiment_scores_the_continuation_alone():
    environment = make(Sentiment)
    good, bad = "wonderful and very friendly.", "terrible, dirty and sad."
    for opening in ("It was awful, horrible and bad, and", "It was great, and"):
        task = Task("", "", "train", 0, {"opening": opening})
        assert ask(environment, task).messages[0].content == f"Continue this review: {opening}"
        assert paid(ask(environment, task, reply(good)))["positive"] == pytest.approx(0.7841, abs=0.02)
        assert paid(ask(environment, task, reply(good, "length")))["exact"] == 1.0
        assert paid(ask(environment, task, reply(bad)))["positive"] < -0.7
        assert paid(ask(environment, task, reply(""))) == {"positive": 0.0, "exact": 0.0}
    mild = paid(ask(environment, task, reply("fine.")))
    assert 0 < mild["positive"] < sentiment.EXACT_ABOVE
    assert mild["exact"] == 0.0
    assert ask(make(Sentiment, instruction=""), task).messages[0].content == "It was great, and"
    late = paid(ask(environment, task, reply("x " * 600 + good)))
    assert late["positive"] == 0.0


def test_sentiment_counts_distinct_bigrams():
    environment = make(Sentiment)
    task = environment.task("train", 0)
    assert ask(environment, task, reply("good Good good good")).facts == {"distinct_bigrams": pytest.approx(1 / 3)}
    assert ask(environment, task, reply("a b c d")).facts == {"distinct_bigrams": 1.0}
    assert ask(environment, task, reply("good")).facts == {}


def test_sentiment_has_many_openings_and_a_split_of_its_own_for_each():
    environment = make(Sentiment)
    openings = {s: {environment.task(s, i).data["opening"] for i in range(environment.size(s))} for s in SPLITS}
    assert {split: len(each) for split, each in openings.items()} == {"train": 1024, "validation": 128, "test": 128}
    assert len(set().union(*openings.values())) == 1280


def test_sentiment_names_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    sentiment._scorer.cache_clear()
    with pytest.raises(MissingExtra, match=r"pip install 'mrlm\[sentiment\]'"):
        make(Sentiment)
    monkeypatch.undo()
    make(Sentiment)


# an environment of one's own


def test_the_example_of_an_environment_keeps_its_word_and_runs_in_a_worker():
    composed = compose.load(RECIPES / "my_env_ppo.yaml")
    (config,) = composed.recipe.environments
    kind = resolve("environments", config.type, composed.folders)
    assert problems(kind(config), tasks=100) == []
    with Host([config], folders=composed.folders, workers=1, deadline=20.0, journal=NoJournal()) as host:
        environment = host.environments["MyEnvironment"]
        task = environment.task("validation", 0)
        turn = host.collect(host.open([("s", task, 0)]))["s"]
        assert turn.messages[0].content == f"{task.data['word']}="
        turn = host.collect(host.step([("s", reply(environment.oracle(task) + "a"))]))["s"]
        assert paid(turn) == {"match": pytest.approx(4 / 6), "exact": 0.0}
    lines = (RECIPES / "my_env.py").read_text().splitlines()
    assert 35 <= sum(bool(line.strip()) for line in lines) <= 55


class Broken(Environment):
    """An environment that keeps its word; each test below breaks one thing."""

    components = {"exact": 1.0}  # noqa: RUF012

    def size(self, split):
        return 3

    def task(self, split, index):
        return Task(f"{split}/{index}", self.config.label, split, index, {"n": index + 3 * SPLITS.index(split)})

    def open(self, task, seed):
        return SingleReply("?", lambda given: ({"exact": float(given.message.content == self.oracle(task))}, {}))

    def oracle(self, task):
        return f"<{task.data['n']}>"


def _broken(name: str, value) -> list[str]:
    kind = type("Changed", (Broken,), {name: value})
    return problems(kind(EnvironmentSettings(type="broken", rewards={"style": 1.0} if name == "rewards" else {})))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("components", {}, "declares no reward"),
        ("components", {"exact": math.inf}, "the weight of 'exact' is inf"),
        ("rewards", None, "rewards names 'style'"),
        ("agents", (), "agents is empty"),
        ("Config", dict, "must inherit EnvironmentSettings"),
        ("size", lambda self, split: 0, "size is 0"),
        ("task", lambda self, s, i: Task(s, "broken", s, i, {}), "two tasks have the same id"),
        ("task", lambda self, s, i: Task(f"{s}{i}", "other", s, i, {}), "env, split or index is 'other'"),
        (
            "task",
            lambda self, s, i: Task(f"{s}{i}", "broken", s, i, {"me": id(self)}),
            "another instance gives another",
        ),
        ("task", lambda self, s, i: Task(f"{s}{i}", "broken", s, i, {"t": (1, 2)}), "does not come back from JSON"),
        ("task", lambda self, s, i: Task(f"{s}{i}", "broken", s, i, {"t": {1}}), "TypeError"),
        ("task", lambda self, s, i: Task(f"{s}{i}", "broken", s, i, {"n": i}), "the same but for a symmetry"),
        ("canonical", lambda self, task: "all", "the same but for a symmetry"),
        (
            "task",
            lambda self, s, i: Task(str(i), "broken", s, i, {"n": s + str(i)}),
            "two splits have a task of this id",
        ),
        ("open", lambda self, task, seed: SingleReply("?", lambda r: ({"exact": float("nan")}, {})), "'exact' is nan"),
        (
            "open",
            lambda self, task, seed: SingleReply("?", lambda r: ({"exact": int(r.message.content)}, {})),
            "ValueError",
        ),
        ("open", lambda self, task, seed: Random(), "two sessions of one task and seed differ"),
        ("open", lambda self, task, seed: Endless(), "not done after"),
        ("oracle", lambda self, task: "wrong", "the oracle's answer has exact = 0.0"),
    ],
)
def test_conformance_finds_what_is_broken(name, value, text):
    if name == "oracle":
        kind = type(
            "Changed", (Broken,), {"open": lambda self, task, seed: SingleReply("?", lambda r: ({"exact": 0}, {}))}
        )
        found = problems(kind(EnvironmentSettings(type="broken")))
    else:
        found = _broken(name, value)
    assert any(text in each for each in found), found


def test_conformance_finds_nothing_in_what_is_whole():
    assert problems(Broken(EnvironmentSettings(type="broken"))) == []


class Random:
    """A session that depends on more than its task, seed and replies."""

    count = itertools.count()

    def start(self):
        return Turn((Message("user", str(next(self.count))),))

    def step(self, given):
        return Turn(done=True)

    def close(self):
        pass


class Endless:
    """A session without an end."""

    def start(self):
        return Turn((Message("user", "?"),))

    step = lambda self, given: Turn()  # noqa: E731

    def close(self):
        pass
