"""The math environment: generators, files, where answers are found, when two are equal, and a checker that hangs."""

import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from mrlm_cli import api
from mrlm_cli.envs import math_answers
from mrlm_cli.envs.conformance import HOSTILE, SPLITS, problems
from mrlm_cli.envs.math import Math
from mrlm_cli.envs.math_answers import FORMS, anywhere, equal, extract, rational, verified
from mrlm_cli.envs.math_problems import LEVELS, TOPICS, Dice
from mrlm_cli.errors import MissingExtra, UserError
from mrlm_cli.records import Message, Reply


def make(**fields) -> Math:
    return Math(Math.Config.model_validate_json(json.dumps({"type": "math", **fields})))


def reply(text: str, stop: str = "end") -> Reply:
    return Reply(Message("assistant", text), stop)


def paid(environment: Math, task, text: str, stop: str = "end") -> dict[str, float]:
    session = environment.open(task, 0)
    session.start()
    return dict(session.step(reply(text, stop)).rewards["policy"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("levels", [[1], [2, 3], [4, 5]])
def test_conformance(form, levels):
    assert problems(make(form=form, levels=levels), tasks=40) == []


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_arithmetic_is_worth_what_python_says(level):
    for number in range(300):
        made = TOPICS["arithmetic"](level, Dice("test", level, number))
        expression = re.sub(r"([0-9]+)", r"Fraction(\1)", made.text.removeprefix("What is ").removesuffix("?"))
        assert eval(expression, {"Fraction": Fraction}) == Fraction(made.answer)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_linear_equations_hold_at_their_answer_alone(level):
    for number in range(300):
        made = TOPICS["algebra"](level, Dice("test", level, number))
        left, right = (re.sub(r"(\d)x", r"\1*x", side) for side in made.text.removeprefix("Solve for x: ").split(" = "))
        x = int(made.answer)
        assert eval(left, {"x": x}) == eval(right, {"x": x})
        assert eval(left, {"x": x + 1}) != eval(right, {"x": x + 1})


def test_systems_and_quadratics_have_their_answer_as_a_brute_force_finds_it():
    for number in range(30):
        made = TOPICS["algebra"](4, Dice("test", 4, number))
        equations = re.findall(r"(\S*x [+-] \S*y) = (-?\d+)", made.text)
        assert len(equations) == 2

        sides = [(re.sub(r"([0-9])([xy])", r"\1*\2", left), right) for left, right in equations]
        text = " and ".join(f"{left} == {right}" for left, right in sides)
        holds = eval(f"lambda x, y: {text}")
        solutions = [(x, y) for x in range(-40, 41) for y in range(-40, 41) if holds(x, y)]
        assert [x for x, _ in solutions] == [int(made.answer)]
        made = TOPICS["algebra"](5, Dice("test", 5, number))
        left = made.text.removeprefix("What is the larger solution of ").removesuffix(" = 0?").replace("^", "**")
        left = re.sub(r"(\d)x", r"\1*x", left)
        assert max(x for x in range(-50, 51) if eval(left, {"x": x}) == 0) == int(made.answer)


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_chains_of_steps_are_followed(level):
    for number in range(200):
        made = TOPICS["multi_step"](level, Dice("test", level, number))
        start, *steps = made.text.removesuffix(" What number do you get?").removesuffix(".").split(". ")
        value = Fraction(start.removeprefix("Start with "))
        assert len(steps) == level + 1
        for step in steps:
            amount = Fraction(next(iter(re.findall(r"\d+", step)), "0"))
            value = {
                "Add": value + amount,
                "Subtract": value - amount,
                "Multiply": value * amount,
                "Halve": value / 2,
            }[step.split()[0]]
        assert value == Fraction(made.answer)


def test_stories_are_worth_their_own_arithmetic():
    """Golden values, worked out by hand from the texts."""
    golden = {}
    for level in range(1, LEVELS + 1):
        made = TOPICS["word_problems"](level, Dice("golden", level))
        golden[made.text] = made.answer
        numbers = [int(number) for number in re.findall(r"(?<!/)\b\d+", made.text)]
        answer = int(made.answer)
        if "more" in made.text and level == 1:
            assert answer == sum(numbers)
        elif "away" in made.text:
            assert answer == numbers[0] - numbers[1]
        elif "boxes" in made.text:
            assert answer == numbers[0] * numbers[1]
        elif "dollars each" in made.text:
            assert answer == numbers[2] - numbers[0] * numbers[1]
        elif "pages" in made.text:
            assert answer == numbers[0] - numbers[1] * numbers[2]
        elif "bakers" in made.text:
            assert answer == numbers[0] * numbers[1] * numbers[2] - numbers[3]
        elif "nuts" in made.text:
            bags, full, loose, eaten, friends = numbers
            assert answer * friends == bags * full + loose - eaten
        elif "lamps" in made.text:
            part = int(re.search(r"1/(\d+)", made.text)[1])
            whole, price, rent = numbers[0], numbers[-2], numbers[-1]
            monday = whole / part
            assert answer == (monday + (whole - monday) / 2) * price - rent
        else:
            gap, total, factor, years = numbers
            second = (total - gap) / 2
            assert answer == total + factor * second + 3 * years
    assert len(golden) == LEVELS


def test_every_topic_is_drawn_and_splits_are_tenths():
    environment = make(levels=[3])
    sizes = {split: environment.size(split) for split in SPLITS}
    assert sizes["train"] > 8000
    assert sizes["validation"] == sizes["test"] == sum(sizes.values()) // 10
    kinds = Counter(environment.canonical(environment.task("test", i)).split()[0] for i in range(200))
    assert min(kinds[kind] for kind in ("arithmetic", "linear", "story", "steps")) >= 20
    seen = [{environment.canonical(environment.task(split, i)) for i in range(sizes[split])} for split in SPLITS]
    assert sum(map(len, seen)) == len(set().union(*seen)) == sum(sizes.values())


@pytest.mark.parametrize(
    ("text", "form", "answer"),
    [
        (r"so \boxed{1} and \boxed{\frac{3}{4}}.", "boxed", r"\frac{3}{4}"),
        (r"\boxed{ 7 }", "boxed", "7"),
        (r"\boxed{7", "boxed", None),
        ("boxed{7}", "boxed", None),
        ("<answer>4</answer> no, <answer> 5 </answer>", "tagged", "5"),
        ("<answer><answer>5</answer></answer>", "tagged", "5"),
        ("<answer>5", "tagged", None),
        ("<answer></answer>", "tagged", None),
        ("It is 3, then 1,234.50.", "last_number", "1,234.50"),
        ("10-5", "last_number", "5"),
        ("minus: -5.", "last_number", "-5"),
        ("3/4 of it", "last_number", "3/4"),
        ("12,34", "last_number", "34"),
        ("#### 72", "last_number", "72"),
        ("٣٤ and ²", "last_number", None),
        ("9" * 500, "last_number", None),
    ],
)
def test_answers_are_found(text, form, answer):
    assert extract(text, form) == answer


def test_the_form_that_is_asked_for_is_looked_at_first():
    text = r"<answer>1</answer> \boxed{2} 3"
    assert [anywhere(text, form) for form in FORMS] == ["2", "1", "3"]
    assert anywhere("just 5", "boxed") == "5"
    assert anywhere("nothing", "boxed") is None


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("42", "42.0", True),
        ("42", " $42$. ", True),
        ("1234", "1,234", True),
        ("1234", "12,34", False),
        ("1/2", ".5", True),
        ("1/2", r"\dfrac{2}{4}", True),
        ("-3/4", r"-\frac{3}{4}", True),
        ("5", "x = 5", True),
        ("5", "5/0", False),
        ("50", r"50\%", True),
        ("3", "2+1", False),
        ("3", "٣", False),
        ("3", "3 or 4", False),
        ("3", "1e999", False),
        ("0", "-0", True),
        (r"\text{Evelyn}", "Evelyn", True),
        (r"2\sqrt{2}", r"2 \sqrt{2}", True),
        (r"2\sqrt{2}", r"\sqrt{8}", False),
    ],
)
def test_equality(gold, answer, same):
    assert equal(gold, answer) is same


def test_rationals_are_exact():
    assert rational("0.1") + rational("0.2") == rational("0.3") == Fraction(3, 10)
    assert rational("1" * 101) is None
    assert rational(".") is rational("") is rational("-") is None


def test_what_each_component_pays():
    environment = make(form="boxed")
    task = environment.task("test", 0)
    gold = task.data["answer"]
    wrong = str(Fraction(gold) + 1)
    assert paid(environment, task, f"\\boxed{{{gold}}}") == {"correct": 1, "format": 1, "exact": 1}
    assert paid(environment, task, f"\\boxed{{{gold}}}", "length") == {"correct": 1, "format": 0, "exact": 0}
    assert paid(environment, task, f"it is {gold}") == {"correct": 1, "format": 0, "exact": 0}
    assert paid(environment, task, f"{gold} \\boxed{{{wrong}}}") == {"correct": 0, "format": 1, "exact": 0}
    environment = make(form="last_number")
    assert paid(environment, task, f"it is {gold}.") == {"correct": 1, "format": 1, "exact": 1}
    assert paid(environment, task, f"{gold} it is") == {"correct": 1, "format": 0, "exact": 0}


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_replies_are_never_exact(text):
    for form in FORMS:
        environment = make(form=form)
        task = next(t for i in range(99) if (t := environment.task("test", i)).data["answer"] not in ("1", "16", "10"))
        assert paid(environment, task, text)["exact"] == 0


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_like_gsm8k_and_math(tmp_path):
    rows = [{"question": f"What is {n} and one?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1:,}"} for n in range(2000)]
    rows += [{"problem": f"Halve {n}.", "solution": f"So \\boxed{{\\frac{{{n}}}{{2}}}}", "level": 1} for n in range(50)]
    rows += [{"question": "what  IS 5 and one?", "answer": "6"}]  # the same problem again
    environment = make(path=write(tmp_path / "a.jsonl", rows))
    assert problems(environment) == []
    assert sum(environment.size(split) for split in SPLITS) == 2050
    answers = {}
    for split in SPLITS:
        for i in range(environment.size(split)):
            task = environment.task(split, i)
            answers[task.data["problem"]] = task.data["answer"]
    assert answers["What is 1999 and one?"] == "2,000"
    assert answers["Halve 7."] == r"\frac{7}{2}"
    held = write(tmp_path / "test.jsonl", [{"question": "Halve 7.", "answer": "3.5"}])
    environment = make(path=str(tmp_path / "a.jsonl"), test_path=held)
    assert problems(environment) == []
    assert [environment.size("test"), environment.size("train") + environment.size("validation")] == [1, 2049]


def test_the_readmes_example_trains(tmp_path, monkeypatch):
    """Its rows and its recipe as they stand, on a model that is small."""
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = page.split("\n## Your own problems\n")[1].split("\n## ")[0]
    rows = [json.loads(line) for line in section.split("```json\n")[1].split("```")[0].splitlines()]
    write(tmp_path / "my_problems.jsonl", rows)
    recipe = section.split("```yaml\n")[1].split("```")[0]
    small = "{type: scratch, layers: 1, hidden: 32, heads: 2, context: 512, tokenizer: bytes}"
    (tmp_path / "my_math.yaml").write_text(recipe.replace("{type: pretrained, path: models/smollm2-135m}", small))
    monkeypatch.chdir(tmp_path)
    few = ["steps=1", "sampling.max_new_tokens=8", "hardware={threads: 1, precision: float32}"]
    environment = Math(api.load_recipe("my_math.yaml").recipe.environments[0])
    tasks = [environment.task(split, i) for split in SPLITS for i in range(environment.size(split))]
    answers = {task.data["problem"]: task.data["answer"] for task in tasks}
    assert [answers[next(iter(row.values()))] for row in rows] == ["31", r"\frac{3}{4}", "85"]
    assert api.evaluate_script("scripted:oracle", "my_math.yaml", few).components["exact"].mean == 1.0
    run = api.train(api.load_recipe("my_math.yaml", few), plain=True)
    (line,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert line["failed_rate"] == 0.0
    assert {"reward/math/correct", "reward/math/format"} <= set(line)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"question": f"Say {n}.", "answer": f"#### {n}"} for n in range(30)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert problems(make(path=str(tmp_path / "a.parquet"))) == []
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a parquet file"):
        make(path=str(tmp_path / "b.parquet")).size("train")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{]\n", "a.jsonl:1 is not a line of JSON"),
        ("[1]\n", "a.jsonl:1 is not a JSON object"),
        ('{"answer": "1"}\n', "a.jsonl:1: expected a text"),
        ('{"question": "x"}\n', "a.jsonl:1: expected `answer`"),
        ("", "holds no problem"),
        ('{"question": "x", "answer": "1"}\n', "1 problems"),
    ],
)
def test_broken_files_are_named(tmp_path, text, match):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=match):
        make(path=str(tmp_path / "a.jsonl")).size("train")


def test_last_number_needs_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": f"{n}", "answer": "x^2"} for n in range(9)])
    with pytest.raises(UserError, match=r"a\.jsonl:1: the answer 'x\^2' is no number"):
        make(path=path, form="last_number").size("train")


def test_math_verify_knows_more_and_takes_no_unevaluated_expression():
    pytest.importorskip("math_verify")
    assert verified(r"2\sqrt{2}", r"\sqrt{8}")
    assert verified("3", "3 apples")
    assert not verified("3", "2+1")
    assert not verified("-3", "2-5")
    assert not verified("3", "4")
    assert not verified(r"\sqrt{2}", "")


def test_boxes_and_things_in_them_may_change_places_only_within_a_split():
    environment = make(topics=["word_problems"])
    owner: dict[tuple[int, ...], str] = {}
    seen = 0
    for split in SPLITS:
        for index in range(environment.size(split)):
            words = environment.task(split, index).data["problem"]
            if " boxes. " in words:
                seen += 1
                numbers = tuple(sorted(int(word) for word in words.split() if word.isdigit()))
                assert owner.setdefault(numbers, split) == split, words
    assert seen > 100


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(math_answers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"mrlm\[math\]"):
        make(checker="math_verify")
