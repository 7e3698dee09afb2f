"""Runs with low-rank adapters: what moves and what does not, checkpoints, chains, evaluation, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mrlm_cli import api, registry
from mrlm_cli.cli.app import main
from mrlm_cli.errors import CheckpointError, UserError
from mrlm_cli.policy import load, lora, pretrained
from mrlm_cli.policy.scorer import Scorer
from mrlm_cli.recipe import compose
from mrlm_cli.recipe.derived import derive
from mrlm_cli.records import Limits, Progress, Request
from mrlm_cli.training.annotate import annotate
from mrlm_cli.training.collate import collate
from mrlm_cli.training.loop import iteration, run
from mrlm_cli.training.stopping import Stopper
from mrlm_cli.training.trainer import Trainer
from tests.data_helpers import go_back, last_values
from tests.group_helpers import EXTRA, VARIANTS
from tests.kit import tiny, trainer
from tests.test_chains import digests
from tests.test_data_algorithms import recipe as on_data
from tests.test_resume import timeless
from tests.test_training_update import distance, gradient, padded

LORA = {"rank": 3, "alpha": 6.0}
KL = {"type": "ppo", "kl": {"coef": 0.1}}
GROUP: dict[str, Any] = {"sampling": {"tasks_per_step": 4, "episodes_per_task": 3, "max_new_tokens": 5}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # algorithm, other changes
    "ppo": (KL, {}),
    "critic": (KL, {"model": {"value": {"type": "separate"}}}),
    "grpo": ({"type": "grpo", "filter_flat": False, "kl": {"coef": 0.1}}, GROUP),
    "rloo": ({"type": "rloo", "kl": {"coef": 0.1}}, GROUP),
    "sft": ({"type": "sft"}, {}),
    "dpo": ({"type": "dpo"}, {}),
    "reward_model": ({"type": "reward_model"}, {}),
    "scoring_critic": ({"type": "reward_model"}, {"model": {"value": {"type": "separate"}}}),
    "online dpo": ({"type": "dpo"}, GROUP),
    "group": ({"type": "group"}, GROUP),
    **{
        name: ({"type": name, "filter_flat": False, **EXTRA.get(name, {})}, GROUP)
        for name in VARIANTS
        if name not in ("grpo", "rloo")
    },
}


def recipe(folder: Path, case: str, **changes: Any) -> Any:
    algorithm, own = CASES[case]
    model = {"lora": LORA, **own.get("model", {}), **changes.pop("model", {})}
    optimizer = {"lr": 1e-2, "tokens_per_micro_batch": 512}
    fields = {"optimizer": optimizer, **own, **changes, "model": model}
    if case in ("sft", "dpo", "reward_model", "scoring_critic"):
        return on_data(folder, algorithm, **fields)
    return tiny(algorithm=algorithm, **fields)


def trained(folder: Path, name: str, case: str = "ppo", **changes: Any) -> Path:
    """A run of three steps."""
    with trainer(folder / name, recipe(folder, case, **changes)) as made:
        run(made, Stopper())
    return folder / name


def bits(made: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.policy.named_parameters()}


def logits(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm.eval()(input_ids=torch.arange(3, 15)[None]).logits
    return found


def test_every_algorithm_is_tried_with_adapters() -> None:
    assert {algorithm["type"] for algorithm, _ in CASES.values()} == set(registry.BUILT_IN["algorithms"])


@pytest.mark.parametrize("case", CASES)
def test_only_adapters_and_heads_move(tmp_path: Path, case: str) -> None:
    with trainer(tmp_path / "run", recipe(tmp_path, case, evaluate={"every": 0, "tasks": 8})) as made:
        before = bits(made)
        run(made, Stopper())
        after, rows = bits(made), made.run.metrics()
        named = {name for name, _ in made._adam._named}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert named == {name for name in before if ".lora_" in name or name.startswith(("value.last", "value.head"))}
    # A reward model has no use for the policy's own trunk where its score comes from a critic.
    assert moved == {name for name in named if case != "scoring_critic" or name.startswith("value.")}
    if case in ("ppo", "critic", "grpo", "rloo"):
        assert rows[0]["kl"] == 0
        assert rows[-1]["kl"] != 0
    if case == "dpo":
        assert rows[0]["pair_margin"] == pytest.approx(0, abs=1e-6)
    kinds = ("critic", "scoring_critic")
    shared = before["lm.model.layers.0.self_attn.q_proj.base_layer.weight"]
    assert len([each for each in before.values() if torch.equal(each, shared)]) == 1  # one base, two sets of adapters
    assert any(name.startswith("value.trunk") for name in named) == (case in kinds)


@pytest.mark.parametrize("case", ["critic", "grpo", "dpo", "reward_model"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, case: str) -> None:
    changes = {"steps": 5, "checkpoint": {"every": 1, "keep": 9}, "evaluate": {"every": 2, "tasks": 8}}
    with trainer(tmp_path / "whole", recipe(tmp_path, case, **changes)) as made:
        run(made, Stopper())
        expected = [timeless(row) for row in made.run.metrics()]
    with trainer(tmp_path / "resumed", recipe(tmp_path, case, **changes)) as made:
        go_back(made, tmp_path / "whole", 3)
        run(made, Stopper())
        assert [timeless(row) for row in made.run.metrics()] == expected
    last = "checkpoints/step-000005"
    found = digests(tmp_path / "resumed" / last)
    assert found == digests(tmp_path / "whole" / last)
    assert "policy/adapter_model.safetensors" in found
    assert "policy/model.safetensors" not in found


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_gradient_depends_on_neither_micro_batch_nor_padding(tmp_path: Path, value: str) -> None:
    with trainer(tmp_path / "run", recipe(tmp_path, "ppo", model={"value": {"type": value}})) as made:
        iteration(made)  # away from B = 0, where the gradient of A is none
        batch = collate(made.source.episodes(1), "cpu")
        assert batch is not None
        needs = made.algorithm.needs
        given = {"temperature": 1.0, "budget": 512, "phase": lambda *_: None}
        batch, _ = annotate(batch, made.policy, made.reference, needs, **given)  # type: ignore[arg-type]
        batch, _ = made.algorithm.credit(batch, Progress(0, 3))
        made.policy.to(torch.float64)
        whole = gradient(made, batch, 10**6)
        assert float(whole.norm()) > 1e-3
        assert distance(gradient(made, batch, 1), whole) < 1e-10
        assert distance(gradient(made, batch, 40), whole) < 1e-10
        assert distance(gradient(made, padded(batch, 7), 10**6), whole) < 1e-10


def test_peft_and_transformers_read_a_checkpoint(tmp_path: Path) -> None:
    place = trained(tmp_path, "run")
    policy = place / "checkpoints/latest/policy"
    assert not (policy / "config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    plain = logits(base)
    theirs = logits(PeftModel.from_pretrained(base, policy))
    lm, tokenizer = pretrained.read(str(place))
    assert float((plain - theirs).abs().max()) > 1e-3
    torch.testing.assert_close(logits(lm), theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(policy)), theirs, rtol=0, atol=1e-5)
    assert tokenizer("12").input_ids == AutoTokenizer.from_pretrained(policy)("12").input_ids
    shutil.move(place, tmp_path / "moved")
    assert torch.equal(logits(pretrained.read(str(tmp_path / "moved"))[0]), logits(lm))


def test_a_whole_model_of_its_own_is_named_and_not_copied(tmp_path: Path) -> None:
    start = trained(tmp_path, "start", model={"lora": None})
    api.export(str(start), tmp_path / "models/start")
    model = {"type": "pretrained", "path": str(tmp_path / "models/start"), "lora": LORA}
    place = trained(tmp_path, "run", model=model)
    config = json.loads((place / "checkpoints/latest/policy/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "models/start")
    assert not (place / "base").exists()
    kept = trained(tmp_path, "kept", model={**model, "path": str(start)})
    assert torch.equal(logits(pretrained.read(str(kept / "base"))[0]), logits(pretrained.read(str(start))[0]))


@pytest.mark.parametrize("again", [None, LORA], ids=["full", "lora"])
def test_a_chain_starts_from_merged_adapters_with_no_distance(tmp_path: Path, again: dict[str, Any] | None) -> None:
    start = trained(tmp_path, "start", "sft")
    model = {"type": "pretrained", "path": str(start), "lora": again}
    merged = logits(pretrained.read(str(start))[0])
    with trainer(tmp_path / "next", recipe(tmp_path, "ppo", model=model, checkpoint={"every": 1})) as made:
        torch.testing.assert_close(logits(made.policy.lm), merged, rtol=0, atol=1e-6)
        run(made, Stopper())
        rows = made.run.metrics()
        now = logits(made.policy.lm)
    assert rows[0]["kl"] == 0
    assert rows[-1]["kl"] != 0
    torch.testing.assert_close(logits(pretrained.read(str(tmp_path / "next"))[0]), now, rtol=0, atol=1e-5)
    assert (tmp_path / "next/base").is_dir() == (again is not None)
    if again is None:
        return
    file = start / "checkpoints/latest/policy/adapter_model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="has no whole checkpoint: checkpoint step-"):
        pretrained.read(str(start))
    changed = {**model, "path": str(file.parent)}  # a model's directory alone has no manifest
    with (
        trainer(tmp_path / "other", recipe(tmp_path, "ppo", model=changed)) as made,
        pytest.raises(CheckpointError, match="the model that its adapters were trained on has changed since"),
    ):
        load.load_weights(made.policy, tmp_path / "next/checkpoints/latest")


def test_a_moving_reference_follows_what_the_adapters_do(tmp_path: Path) -> None:
    algorithm = {"type": "grpo", "filter_flat": False, "kl": {"coef": 0.1, "sync": {"every": 2, "rate": 1.0}}}
    moving = tiny(model={"lora": LORA}, algorithm=algorithm, optimizer={"lr": 1e-2}, **GROUP)
    with trainer(tmp_path / "run", moving) as made:
        assert made.reference is not None
        start = logits(made.reference.lm)
        iteration(made)
        assert torch.equal(logits(made.reference.lm), start)
        iteration(made)
        torch.testing.assert_close(logits(made.reference.lm), logits(made.policy.lm), rtol=0, atol=1e-5)
        assert not torch.equal(logits(made.reference.lm), start)
        assert torch.equal(logits(lora.without_adapters(made.policy.lm)), start)
        kept = logits(made.reference.lm)
        made.save()
    with trainer(tmp_path / "again", made.recipe) as other:
        other.load(tmp_path / "run/checkpoints/latest")
        assert other.reference is not None
        assert torch.equal(logits(other.reference.lm), kept)


@pytest.mark.parametrize("case", ["reward_model", "scoring_critic"])
def test_a_reward_model_with_adapters_scores_and_becomes_a_critic(tmp_path: Path, case: str) -> None:
    with trainer(tmp_path / "run", recipe(tmp_path, case)) as made:
        run(made, Stopper())
        episodes, batch, expected = last_values(made)
    assert max(expected) - min(expected) > 1e-3
    scores = Scorer(str(tmp_path / "run")).score([one.transcript for one in episodes])
    assert scores == pytest.approx(expected, abs=1e-5)
    value = {"type": "separate", "path": str(tmp_path / "run")}
    with trainer(tmp_path / "next", recipe(tmp_path, "ppo", model={"value": value})) as made:
        out = made.policy(batch.tokens, batch.lengths, batch.mask, temperature=1.0)
        assert out.final_values is not None
        assert out.final_values.tolist() == pytest.approx(expected, abs=1e-5)
        iteration(made)


def test_a_run_is_evaluated_by_what_it_learnt(tmp_path: Path) -> None:
    def by_the_door(name: str, made: Any) -> Path:
        (tmp_path / f"{name}.yaml").write_text(compose.dump(made))
        return api.train(api.load_recipe(tmp_path / f"{name}.yaml"), run_dir=tmp_path / name, plain=True)

    place = by_the_door("run", recipe(tmp_path, "ppo", steps=2, evaluate={"every": 1, "tasks": 8}))
    evaluation = api.evaluate(str(place))
    assert (evaluation.step, evaluation.tasks) == (2, 8)
    api.resume(place, ["steps=3"], plain=True)
    assert api.evaluate(str(place)).step == 3
    rows = by_the_door("rows", recipe(tmp_path, "dpo", data={"validation_share": 0.3}))
    assert api.evaluate(str(rows)).components["margin"].mean > 1e-3  # 0 without what was learnt


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_engine_samples_with_what_the_last_update_made(tmp_path: Path, precision: str) -> None:
    made_recipe = recipe(tmp_path, "grpo", hardware={"precision": precision})
    tokens = (3, 4, 5, 6)
    with trainer(tmp_path / "run", made_recipe) as made:

        def sampled(name: str) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor]:
            """The reply, its log-probs by the engine, and by the policy that the update moves."""
            (done,) = made.engine.generate([Request(name, tokens, b"k" * 16, Limits(6, 1.0, (), ()))])
            row = torch.tensor([tokens + done.tokens])
            score = torch.arange(row.shape[1])[None] >= len(tokens)
            with torch.no_grad():
                out = made.policy(row, torch.tensor([row.shape[1]]), score, temperature=1.0, values=False)
            return done.tokens, torch.tensor(done.logprobs), out.logprobs[0, len(tokens) :]

        before = sampled("before")
        for _ in range(3):
            iteration(made)
        after = sampled("after")
    tolerance = 1e-4 if precision == "float32" else 0.05
    for _, by_engine, by_policy in (before, after):
        torch.testing.assert_close(by_engine, by_policy, atol=tolerance, rtol=0)
    assert not torch.equal(before[1], after[1])


def test_derived_numbers_are_those_of_the_built_model(tmp_path: Path) -> None:
    for name, (value, targets) in enumerate([("shared", []), ("separate", []), ("separate", ["q_proj", "up_proj"])]):
        model = {"value": {"type": value, "head": "mlp"}, "lora": {"rank": 5, "targets": targets}}
        made_recipe = tiny(model=model, algorithm=KL)
        derived = derive(made_recipe)
        with trainer(tmp_path / str(name), made_recipe) as made:
            assert made.policy.value is not None
            assert derived.trained_parameters == sum(each.numel() for each in made._adam.parameters)
            assert derived.policy_parameters == sum(each.numel() for each in made.policy.lm.parameters())
            assert derived.value_parameters == sum(each.numel() for each in made.policy.value.parameters())
    big = {"hidden": 512, "layers": 8, "heads": 8, "mlp": 2048}
    with_adapters, without = (
        derive(tiny(model={**big, "lora": chosen}, algorithm=KL)).memory_estimate_mib for chosen in ({}, None)
    )
    assert with_adapters is not None
    assert without is not None
    assert with_adapters < without - 4 * 25 * 4 + 20  # gradients, two moments and the reference of 25 M parameters
    start = trained(tmp_path, "start", model={"lora": LORA})
    found = derive(tiny(model={"type": "pretrained", "path": str(start), "lora": LORA}, algorithm=KL))
    same = derive(tiny(model={"lora": LORA}, algorithm=KL))
    assert (found.policy_parameters, found.trained_parameters) == (same.policy_parameters, same.trained_parameters)


@pytest.mark.parametrize("adapters", [LORA, None], ids=["lora", "full"])
def test_export_gives_a_plain_transformers_directory(
    tmp_path: Path, adapters: dict[str, Any] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    place = trained(tmp_path, "run", model={"lora": adapters})
    lm, tokenizer = pretrained.read(str(place))
    assert main(["export", str(place), str(tmp_path / "out/plain")]) == 0
    assert "value function is left out" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out/plain")
    assert torch.equal(logits(plain), logits(lm))
    assert not [path for path in (tmp_path / "out/plain").iterdir() if "adapter" in path.name]
    assert AutoTokenizer.from_pretrained(tmp_path / "out/plain")("12").input_ids == tokenizer("12").input_ids
    checkpoint = str(place / "checkpoints/latest")
    assert main(["export", checkpoint, str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    rounded = {name: each.to(torch.bfloat16) for name, each in lm.named_parameters()}
    assert all(torch.equal(each, rounded[name]) for name, each in half.named_parameters())
    capsys.readouterr()
    for words, said in (
        ([str(place), str(tmp_path / "half")], "exists already"),
        ([str(tmp_path / "none"), str(tmp_path / "x")], "there is no directory"),
        ([str(place), str(tmp_path / "x"), "--dtype", "int8"], "expected one of float32, bfloat16, float16"),
    ):
        assert main(["export", *words]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x").exists()
    assert not [path for path in tmp_path.iterdir() if "half-" in path.name or "x-" in path.name]


def test_adapters_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    place = trained(tmp_path, "run")
    policy = place / "checkpoints/latest/policy"
    file, config = policy / lora.ADAPTER_FILE, policy / "adapter_config.json"
    tensors, settings = load_file(file), json.loads(config.read_text())

    def refused(match: str, kind: type[Exception] = CheckpointError) -> None:
        with pytest.raises(kind, match=match):
            pretrained.read(str(policy))  # which no manifest guards

    name = next(iter(tensors))
    save_file({key: each for key, each in tensors.items() if key != name}, file)
    refused("do not fit their base")
    save_file(tensors, file)
    sha256 = (policy / lora.BASE_FILE).read_text()
    (policy / lora.BASE_FILE).write_text("0")
    refused("has changed since, or is another one")
    (policy / lora.BASE_FILE).write_text(sha256)
    file.write_bytes(b"12345678")
    refused("cannot be read")
    file.unlink()
    refused("holds no adapter_model.safetensors")
    save_file(tensors, file)
    config.write_text(json.dumps({**settings, "peft_type": "IA3"}))
    refused("only LORA can be merged", UserError)
    shutil.rmtree(place / "base")
    config.write_text(json.dumps({**settings, "base_model_name_or_path": str(policy)}))
    refused("must be a whole model")
    config.write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    refused("does not say which model")
    config.write_text(json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "gone/away")}))
    refused("there is no", UserError)


def test_the_smoke_recipe_trains_what_it_says(tmp_path: Path) -> None:
    composed = api.load_recipe("lora_smoke", ["steps=1", "hardware.threads=1"])
    derived = derive(composed.recipe)
    assert (derived.trained_parameters, derived.policy_parameters) != (None, None)
    text = composed.path.read_text()
    assert f"{derived.trained_parameters:,} " in text
    place = api.train(composed, run_dir=tmp_path / "run", plain=True)
    assert (place / "base/config.json").is_file()
    assert (place / "checkpoints/latest/critic/trained.safetensors").is_file()
