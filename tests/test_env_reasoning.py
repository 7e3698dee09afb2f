"""The reasoning environment: every usable task of reasoning-gym, its traps, its splits."""

import inspect
import json
import random
import re
from collections import Counter

import pytest

from mrlm_cli.envs import reasoning
from mrlm_cli.envs.conformance import SPLITS, problems
from mrlm_cli.envs.reasoning import UNUSABLE, Reasoning, split_of
from mrlm_cli.envs.reasoning_answers import EXPRESSIONS, LITERALS, harmless
from mrlm_cli.errors import MissingExtra, SessionFailure, UserError
from mrlm_cli.records import Message, Reply

pytest.importorskip("reasoning_gym")
from reasoning_gym.factory import DATASETS

USABLE = sorted(set(DATASETS) - set(UNUSABLE))
SLOW = {"futoshiki", "sokoban"}  # seconds a question


def make(tasks, **fields) -> Reasoning:
    tasks = tasks if isinstance(tasks, dict) else {tasks: 1.0}
    return Reasoning(Reasoning.Config.model_validate_json(json.dumps({"type": "reasoning", "tasks": tasks, **fields})))


def paid(environment, task, text: str, stop: str = "end") -> dict[str, float]:
    session = environment.open(task, 0)
    session.start()
    return dict(session.step(Reply(Message("assistant", text), stop)).rewards["policy"])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in USABLE]
)
def test_every_usable_task_pays_its_own_answer_and_no_junk(name):
    environment = make(name)
    task = environment.task("train", 3)
    assert split_of(task.data["question"]) == "train"
    assert Reasoning(environment.config).task("train", 3) == task
    assert paid(environment, task, environment.oracle(task)) == {"score": 1, "format": 1, "exact": 1}
    assert paid(environment, task, environment.oracle(task), "length")["exact"] == 0
    for text in (*reasoning.JUNK, "xyzzy", "\0", "lorem ipsum dolor sit amet"):
        score = paid(environment, task, f"<answer>{text}</answer>")["score"]
        assert score == 0 or (text not in reasoning.JUNK and score < 0.2) or text == task.data["answer"], text


@pytest.mark.parametrize("name", sorted(UNUSABLE))
def test_a_broken_task_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=f"the task {name} cannot be used: {UNUSABLE[name][:20]}"):
        make(name)


def test_the_reasons_for_refusing_are_true():
    """Where a later reasoning-gym mends a task, this says so."""
    from reasoning_gym import create_dataset

    for name in (name for name, why in UNUSABLE.items() if why.startswith("its scorer does not give")):
        dataset = create_dataset(name, seed=1, size=1)
        entry = dataset[0]
        assert dataset.score_answer(entry["answer"], entry) < 1, name
    dataset = create_dataset("game_of_life_halting", seed=1, size=1)
    assert dataset.score_answer("lorem ipsum", dataset[0]) == 1
    dataset = create_dataset("intermediate_integration", seed=1, size=60)
    assert any("Integral(" in entry["answer"] for entry in dataset)
    dataset = create_dataset("puzzle24", seed=1, size=20)
    assert all(dataset.score_answer("1 * 2 * 3 * 4", entry) == 1 for entry in dataset)


def test_every_scorer_that_evaluates_is_known():
    own = {"number_sorting"}  # evaluates its own answer, never the reply
    for name in USABLE:
        source = inspect.getsource(DATASETS[name][0].score_answer)
        evaluates = re.search(r"\beval\(|\bexec\(|parse_expr|sympify", source) is not None
        assert evaluates == (name in EXPRESSIONS or name in LITERALS or name in own), name


@pytest.mark.parametrize("name", [*EXPRESSIONS, *LITERALS])
def test_an_answer_is_never_run_as_a_program(name, tmp_path):
    from reasoning_gym import create_dataset

    dataset = create_dataset(name, seed=1, size=30)
    assert all(harmless(name, entry["answer"]) for entry in dataset)
    environment = make(name)
    task = environment.task("train", 0)
    path = tmp_path / "touched"
    file = "+".join(f"chr({ord(letter)})" for letter in str(path))
    for text in (
        f"open({str(path)!r}, 'w')", f"open({file}, chr(119))", f"[open({str(path)!r}, 'w')]",
        f"__import__('os').system('touch {path}')", f"exec({file})", "().__class__", "(lambda: 1)()", "x.diff",
        'entry["answer"]', "oracle_answer", "valid_solutions[0]", 'entry["metadata"]["valid_answers"][0]', "answer",
        "9**9**9**9", "((((9**99)**99)**99)**99)**99", "9**(9**9)", "x**999", "1 if 1 else 2", "x[0]", "exec(x)",
        "[" * 5000, "'a' * 9", "{" * 300,
    ):  # fmt: skip
        assert not harmless(name, text), text
        assert paid(environment, task, f"<answer>{text}</answer>")["score"] == 0, text
    assert not path.exists()


def test_what_an_answer_may_be_made_of():
    assert harmless("countdown", " (5 + 3)*2 - 4/ 2 ")
    assert not harmless("countdown", "2**3")
    assert not harmless("countdown", "x")
    assert harmless("polynomial_multiplication", "-3*x**2*y + (x - 1.5)**3")
    assert not harmless("simple_integration", "exp(x)")
    assert harmless("binary_matrix", "0 1\n1 0")
    assert harmless("binary_matrix", "[[0, 1], [1, 0]]")
    assert harmless("string_insertion", "['A', 'B']")
    assert harmless("chain_sum", "anything()")


def test_conformance_of_a_mixture_with_parameters():
    tasks = {"chain_sum": 3, "lcm": 1, "leg_counting": 1}
    assert problems(make(tasks, settings={"chain_sum": {"max_terms": 3}}, form="bare"), tasks=30) == []
    environment = make(tasks)
    drawn = Counter(environment.task("train", i).data["task"] for i in range(400))
    assert 200 <= drawn["chain_sum"] <= 280
    assert min(drawn["lcm"], drawn["leg_counting"]) >= 50


def test_splits_share_no_question_even_of_a_small_task():
    environment = make("coin_flip")
    seen = {split: {environment.canonical(environment.task(split, i)) for i in range(150)} for split in SPLITS}
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))
    drawn = [
        (task.data["block"], task.data["place"])
        for split in SPLITS
        for task in (environment.task(split, i) for i in range(150))
    ]
    assert len(set(drawn)) == 450  # no two from the same draw


def test_a_task_that_draws_from_the_global_generator_asks_the_same_again():
    environment = make("list_functions")
    before = random.getstate()
    for index in range(40):  # one in seventeen is of the kind that does
        task = environment.task("train", index)
        reasoning._entry.cache_clear()
        assert environment.task("train", index) == task
        reasoning._entry.cache_clear()
        environment.open(task, 0)
    assert random.getstate() == before


def test_questions_share_datasets_which_take_long_to_make():
    environment = make("coin_flip")
    reasoning._dataset.cache_clear()
    for index in range(2 * reasoning.TOGETHER):
        environment.task("train", index)
    assert reasoning._dataset.cache_info().misses == 2


def test_a_question_is_made_once_for_all_sessions_of_its_task():
    environment = make("number_sorting")
    task = environment.task("train", 7)
    made = reasoning._entry.cache_info().misses
    assert paid(environment, task, environment.oracle(task))["exact"] == 1
    environment._entry("number_sorting", task.data["block"], task.data["place"])["metadata"].clear()  # by a scorer, say
    assert paid(environment, task, environment.oracle(task))["exact"] == 1
    assert reasoning._entry.cache_info().misses == made


def test_the_parts_of_a_mixture_are_its_tasks():
    environment, alone = make({"chain_sum": 1, "lcm": 1}), make("lcm")
    tasks = [environment.task("test", index) for index in range(20)]
    assert [environment.part(task) for task in tasks] == [task.data["task"] for task in tasks]
    assert {environment.part(task) for task in tasks} == {"chain_sum", "lcm"}
    assert alone.part(alone.task("test", 0)) == ""


class Scorer:
    """A task with a scorer that answers as it is told."""

    def __init__(self, score):
        self.score = score

    def score_answer(self, answer, entry):
        if answer in reasoning.JUNK:
            return 0.3
        return self.score() if callable(self.score) else self.score


def boom():
    raise KeyError("x")


@pytest.mark.parametrize(("score", "worth"), [(1.0, 1), (True, 1), (0.5, 0.5), (0.3, 0), (0.05, 0), (0, 0), (boom, 0)])
def test_what_a_scorer_says_is_worth(score, worth):
    got = make("chain_sum")._rewards("x", Scorer(score), {}, Reply(Message("assistant", "<answer>7</answer>"), "end"))
    assert got == {"score": worth, "format": 1, "exact": float(worth == 1)}


@pytest.mark.parametrize("score", [None, float("nan"), 1.5, -0.1, "1", float("inf")])
def test_a_scorer_that_says_no_score_fails_the_session(score):
    with pytest.raises(SessionFailure, match="the scorer of x gave"):
        make("chain_sum")._rewards("x", Scorer(score), {}, Reply(Message("assistant", "<answer>7</answer>"), "end"))


def test_the_form_decides_where_the_answer_stands():
    tagged, bare = make("chain_sum"), make("chain_sum", form="bare")
    task = tagged.task("test", 0)
    answer = task.data["answer"]
    assert paid(tagged, task, answer) == {"score": 0, "format": 0, "exact": 0}
    assert paid(bare, task, answer) == {"score": 1, "format": 1, "exact": 1}
    assert paid(bare, task, f"<answer>{answer}</answer>") == {"score": 1, "format": 0, "exact": 0}


def test_a_generator_that_changes_its_mind_fails_the_session():
    environment = make("chain_sum")
    task = environment.task("test", 0)
    changed = type(task)(task.id, task.env, task.split, task.index, {**task.data, "question": "another"})
    with pytest.raises(SessionFailure, match="another question"):
        environment.open(changed, 0)


def test_wrong_names_and_parameters_are_told():
    with pytest.raises(UserError, match="did you mean chain_sum"):
        make("chain_sums").size("train")
    with pytest.raises(UserError, match="refuses the settings of chain_sum"):
        make("chain_sum", settings={"chain_sum": {"terms": 3}}).size("train")
    with pytest.raises(ValueError, match="decided by the split"):
        make("chain_sum", settings={"chain_sum": {"seed": 3}})
    with pytest.raises(ValueError, match="not among tasks"):
        make("chain_sum", settings={"lcm": {}})


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(reasoning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"mrlm\[reasoning\]"):
        make("chain_sum")
