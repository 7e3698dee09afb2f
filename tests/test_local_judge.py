"""A frozen model as a judge: what it says is what the slow engine says, alone and in company, and after a resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mrlm_cli import registry
from mrlm_cli.envs.host import NoJournal
from mrlm_cli.errors import MrlmError
from mrlm_cli.policy import load
from mrlm_cli.recipe.sections import ScratchModel
from mrlm_cli.records import Limits, Message, Request, Task, Transcript
from mrlm_cli.rewards.base import Failure
from mrlm_cli.rewards.conformance import problems
from mrlm_cli.rewards.firewall import Scorers
from mrlm_cli.rewards.judge import shown
from mrlm_cli.rewards.local_judge import LocalJudge
from mrlm_cli.training import loop
from mrlm_cli.training.stopping import Stopper
from tests.kit import tiny, trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A policy with random weights, but for a 7 that outweighs all else wherever it points the right way."""
    section = ScratchModel(type="scratch", layers=1, hidden=32, heads=2, context=600, characters="0123456789")
    for seed in range(12):
        path = tmp_path_factory.mktemp("judge")
        policy, chat = load.build(section, seed=seed, device="cpu", precision="float32", gradient_checkpointing=False)
        with torch.no_grad():
            policy.lm.get_input_embeddings().weight[chat.tokenizer.convert_tokens_to_ids("7")] *= 50
        load.save(policy, chat.tokenizer, path)
        if any(each.isdigit() for each in reference(str(path / "policy"), transcript("1"))):
            return str(path / "policy")
    raise AssertionError("no model writes a digit")


def config(model: str, **fields) -> LocalJudge.Config:
    given = {"type": "local_judge", "path": model, "pattern": "([0-9])", "instruction": "0", "high": 9.0, **fields}
    return LocalJudge.Config(**given)


def transcript(text: str) -> Transcript:
    task = Task("train/0", "e", "train", 0, {})
    return Transcript(task, 0, {"policy": (Message("user", "12="), Message("assistant", text))}, (), {}, "done")


def reference(model: str, one: Transcript, instruction: str = "0") -> str:
    """The reply, by transformers' own generate."""
    from mrlm_cli.recipe.sections import PretrainedModel

    policy, chat = load.build(
        PretrainedModel(type="pretrained", path=model),
        seed=0, device="cpu", precision="float32", gradient_checkpointing=False, values=False,
    )  # fmt: skip
    kind = registry.resolve("engines", "generate")
    engine = kind(kind.Config(type="generate"), decode=chat.decode, precision="float32", check=lambda: None)
    engine.load(policy.lm)
    messages = (Message("system", instruction), Message("user", shown(one, "policy")))
    prompt = tuple(token for _, tokens in chat.open(messages) for token in tokens)
    limits = Limits(max_new_tokens=16, temperature=0.0, end_tokens=chat.end_tokens)
    (said,) = engine.generate([Request("a", prompt, b"", limits)])
    return chat.read(said.tokens, said.stop).content


def test_it_says_what_the_slow_engine_says(model) -> None:
    sessions = [(str(n), transcript(text)) for n, text in enumerate(["1", "4567", "99 99", "1" * 40, "1" * 2000])]
    with Scorers([config(model, max_failed=1.0)], folders=[], workers=2, journal=NoJournal()) as scorers:
        *given, long = [one["local_judge"] for one in scorers.score(sessions)]
        again = [one["local_judge"] for one in scorers.score(sessions[::-1])]
    assert again == [long, *given[::-1]]
    assert isinstance(long, Failure)
    assert "longer than the judge can see (600 tokens)" in long.text
    read = 0
    for (_, one), outcome in zip(sessions, given, strict=False):
        text = reference(model, one)
        digits = [each for each in text if each.isdigit()]
        if isinstance(outcome, Failure):
            assert outcome.text == f"the judge's reply holds no rating: {text!r}"
            assert not digits
        else:
            assert outcome == {"policy": float(digits[0])}
            read += 1
    assert read


def test_conformance(model) -> None:
    reward = LocalJudge(config(model, pattern="^(?s:.*?)([0-9])|()$"))
    reward.prepare()
    found = problems(reward, [transcript("12"), transcript("345")])
    assert not [each for each in found if "scored again" in each or "order" in each]


def test_a_run_repeats_its_ratings_to_the_bit(model, tmp_path) -> None:
    runs = []
    for name in ("one", "two"):
        recipe = tiny(
            rewards=[{"type": "local_judge", "path": model, "pattern": "([0-9])", "high": 9.0, "max_failed": 1.0}],
            sampling={"tasks_per_step": 4},
            steps=2,
            hardware={"worker_processes": 1},
        )
        with trainer(tmp_path / name, recipe) as made:
            loop.run(made, Stopper())
            runs.append([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    timed = ("seconds", "memory")
    first, second = [
        [{k: v for k, v in row.items() if not any(t in k for t in timed) and "per_second" not in k} for row in rows]
        for rows in runs
    ]
    assert first == second
    assert "reward/local_judge" in first[0] or first[0]["failed/local_judge"] > 0


def test_a_model_that_is_not_there_stops_the_run(tmp_path) -> None:
    with (
        Scorers([config(str(tmp_path / "no/where"))], folders=[], workers=1, journal=NoJournal()) as scorers,
        pytest.raises(MrlmError, match=r"cannot start: .*where"),
    ):
        scorers.score([("a", transcript("1"))])


def test_another_model_in_its_place_is_another_judge(model, tmp_path) -> None:
    place = Path(shutil.copytree(model, tmp_path / "model"))
    before = LocalJudge(config(str(place))).fingerprint()
    assert before == LocalJudge(config(model)).fingerprint()
    weights = bytearray((place / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (place / "model.safetensors").write_bytes(weights)
    after = LocalJudge(config(str(place))).fingerprint()
    single = LocalJudge(config(str(place / "model.safetensors"))).fingerprint()  # as a .gguf file would be
    assert len({before, after, single, None}) == 4
    assert LocalJudge(config("some/hub-id")).fingerprint() is None
