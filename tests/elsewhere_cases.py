"""Run by test_elsewhere, in a process of its own: decoding, training, scoring and saving on another device."""

import copy

import pytest
import torch

from mrlm_cli.engines.cached import llama
from mrlm_cli.events import Listener
from mrlm_cli.kernels import logprobs
from mrlm_cli.training import loop
from tests.data_helpers import chats, jsonl, pair_row
from tests.elsewhere import NAME, Elsewhere, Refused, Watched, registered, working
from tests.engine_helpers import cached, decode, prompt, reference, request
from tests.engine_helpers import tiny as small
from tests.kit import tiny, trainer
from tests.test_graphs import adapted, decoder, eagerly, model, turned

registered()


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch):
    with working(monkeypatch):
        yield


def there(*sizes):
    return torch.ones(*sizes, device=NAME)


def talk(module, engine):
    """Ragged prompts in fewer slots than rows, ends, both kinds of temperature, a second turn, then new weights."""
    said = []
    tokens = {name: prompt(name, 3 + 5 * number) for number, name in enumerate("abcd")}
    for turn in range(2):
        asked = [
            request(name, tokens[name], 3 + 2 * number, float(number != turn), ends=(5, 6))
            for number, name in enumerate("abcd")
        ]
        said += engine.generate(asked, decode)
        tokens = {row.conversation: row.tokens + done.tokens for row, done in zip(asked, said[-4:], strict=True)}
    turned(module)
    engine.load(module)
    return said + engine.generate([request("e", prompt("e", 9), 6)], decode)


@pytest.mark.parametrize(
    ("make", "precision", "close"), [(adapted, "float32", 2e-5), (lambda: model("qwen3"), "bfloat16", 0.02)]
)
def test_a_captured_step_is_the_devices_alone(make, precision, close):
    """No tensor of the host's in it, no look from the host; and what it says is what the host's own says."""
    families = []

    def family():
        families.append(Watched())
        return families[-1]

    module = make()
    mine = copy.deepcopy(module).to(NAME)
    found = talk(mine, decoder(mine, family, precision, slots=3))
    for here, other in zip(found, talk(module, decoder(module, eagerly, precision, slots=3)), strict=True):
        assert (here.tokens, here.stop) == (other.tokens, other.stop)
        assert here.logprobs == pytest.approx(other.logprobs, abs=close)
    assert [each.captures for each in families] == [3]  # of one, two and three rows; new weights lie where the old lay


@pytest.mark.parametrize(
    "slip",
    [
        lambda x: x.mul_(x.max().item()),
        lambda x: x.mul_(2 if (x > 0).any() else 3),
        lambda x: x.sub_(min(x.tolist())),
        lambda x: x.copy_(x.cpu()),
        lambda x: x.add_(torch.tensor(1.0)),
        lambda x: x.add_(torch.tensor([1.0], device=NAME)),
        lambda x: x[torch.tensor([0])].neg_(),
        lambda x: x[x > 0].neg_(),
        lambda x: x.index_fill_(0, (x > 0).nonzero()[:, 0], 1.0),
        lambda x: torch.arange(3),
    ],
)
def test_what_a_capture_refuses(slip):
    slip(there(3))  # where nothing is captured, it may
    with pytest.raises(Refused):
        Watched()(lambda: slip(there(3)))


@pytest.mark.parametrize("slip", [lambda x: x * float(x.amax()), lambda x: x * torch.ones(())])
def test_a_slip_in_the_step_is_refused(slip, monkeypatch):
    engine = decoder(model().to(NAME), Watched)
    attend = llama.LlamaForward._attend
    monkeypatch.setattr(llama.LlamaForward, "_attend", lambda *given: slip(attend(*given)))
    with pytest.raises(Refused):
        engine.generate([request("a", prompt("a", 9), 4)], decode)


def test_devices_do_not_mix():
    for mixed in (
        lambda: there(3, 2) + torch.ones(2),
        lambda: there(3, 2) @ torch.ones(2, 3),
        lambda: torch.cat([there(2), torch.ones(2)]),
        lambda: torch.nn.functional.embedding(torch.tensor([0]), there(3, 2)),
        lambda: there(3, 2).index_select(0, torch.tensor([0])),
    ):
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            mixed()
    assert (there(2) * torch.tensor(2.0)).tolist() == [2, 2]
    assert there(2)[torch.tensor([1, 0, 0])].tolist() == [1, 1, 1]


GRPO = {"algorithm": {"type": "grpo", "kl": {"coef": 0.05}}, "sampling": {"episodes_per_task": 4, "tasks_per_step": 4}}
NARROW = {"precision": "bfloat16"}
CASES = {
    "ppo": {
        "algorithm": {
            "type": "ppo",
            "kl": {"coef": 0.05, "target": 1.0},
            "truncation": "bootstrap",
            "importance": {},
            "reward_scale": True,
            "whiten_rewards": True,
        },
        "sampling": {"max_new_tokens": 3, "temperature": 0.7},
        "optimizer": {"passes": 2, "minibatches": 2},
    },
    "ppo with a critic, narrow, checkpointing": {
        "algorithm": {"type": "ppo", "kl": {"coef": 0.05, "form": "k3", "sync": {"every": 1, "rate": 0.5}}},
        "model": {"value": {"type": "separate"}},
        "hardware": NARROW | {"gradient_checkpointing": True},
    },
    "ppo with adapters": {
        "algorithm": {"type": "ppo", "kl": {"coef": 0.05}},
        "model": {"lora": {"rank": 4}, "value": {"type": "separate"}},
    },
    "grpo, narrow": GRPO | {"hardware": NARROW},
    "dpo, narrow": {"data": "pairs", "algorithm": {"type": "dpo"}, "hardware": NARROW},
    "reward_model": {"data": "pairs", "algorithm": {"type": "reward_model"}},
    "sft": {"data": "chat", "algorithm": {"type": "sft"}},
}
LOOSE = ("sampler_gap", "sampler_gap_max", "kl", "explained_variance", "approx_kl", "policy_moved", "value_bias")


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_hosts(name, tmp_path, monkeypatch):
    """Two iterations, an evaluation, a checkpoint, and an iteration from there, on the device and on the host."""
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 19 * 40)  # of 19 words: more than one chunk
    case = dict(CASES[name])
    if "data" in case:
        rows = [pair_row(f"{number * 37 % 1000}") for number in range(10, 50)]
        path = jsonl(tmp_path / "p.jsonl", rows) if case["data"] == "pairs" else chats(tmp_path / "c.jsonl")
        given = {"type": "jsonl", "path": str(path), "form": case["data"], "rows_per_step": 8}
        case["data"] = given | {"validation_share": 0.2}
    recipe = tiny(**case)
    hardware = recipe.hardware.model_copy(update={"device": NAME})
    mine = lived(recipe.model_copy(update={"hardware": hardware}), tmp_path / "device", Elsewhere)
    other = lived(recipe, tmp_path / "host", torch.nn.Parameter)
    narrow = recipe.hardware.precision == "bfloat16"
    assert len(mine) == len(other) == 3
    for here, there in zip(mine, other, strict=True):
        assert here.keys() == there.keys()
        for metric in here:
            if not metric.endswith("seconds") and "per_second" not in metric and "memory" not in metric:
                close = (0.005 if metric in LOOSE else 1e-3) if narrow else 1e-4
                assert here[metric] == pytest.approx(there[metric], rel=close, abs=close), metric


class Heard(Listener):
    """Keeps warnings."""

    def __init__(self):
        self.warnings = []

    def warned(self, text):
        self.warnings.append(text)


def lived(recipe, folder, kind):
    """The metrics of a short life; `kind` is what its parameters are."""
    with trainer(folder / "run", recipe) as made:
        made.evaluate()
        loop.iteration(made)
        loop.iteration(made)
        step = made.save()
        found = made.run.metrics()
        saved = made.run.checkpoints / f"step-{step:06}"
        assert {type(each) for each in made.policy.parameters()} == {kind}
    heard = Heard()
    with trainer(folder / "again", recipe, heard) as made:
        made.load(saved)
        assert any("inexact" in each for each in heard.warnings) == (kind is Elsewhere)
        made.step = 0  # the first of this directory
        made.refresh_engine()
        loop.iteration(made)
        return found + made.run.metrics()


def test_other_families_decode_there():
    module = small("gemma3")
    mine = copy.deepcopy(module).to(NAME)
    asked = [request(f"r{size}", prompt(f"p{size}", size), 4, float(size > 4)) for size in (9, 4, 7, 8)]
    for engine, count in ((cached, 4), (reference, 1)):
        here, other = engine(mine).generate(asked[:count]), engine(module).generate(asked[:count])
        assert [each.tokens for each in here] == [each.tokens for each in other]
        for one, two in zip(here, other, strict=True):
            assert one.logprobs == pytest.approx(two.logprobs, abs=2e-5)
