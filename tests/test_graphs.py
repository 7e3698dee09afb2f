"""Captured decode steps: on a CPU by an emulation of CUDA graphs, and on a GPU, where there is one, by themselves."""

import contextlib
import copy
import inspect

import pytest
import torch

from mrlm_cli.engines.cached import graphs
from mrlm_cli.engines.cached.cache import SlotCache
from mrlm_cli.engines.cached.decoder import Decoder
from mrlm_cli.engines.cached.forward import AnyForward
from mrlm_cli.engines.cached.graphs import WARM_UP, CudaCaptures
from mrlm_cli.engines.cached.llama import LlamaForward
from mrlm_cli.engines.cached.sizes import Sizes
from mrlm_cli.engines.sampler import sample
from mrlm_cli.errors import EngineError, RecipeError, UserError
from mrlm_cli.kernels.low_rank import Matrix
from mrlm_cli.kernels.products import FrozenLinear
from mrlm_cli.policy import lora
from mrlm_cli.recipe import compose
from mrlm_cli.recipe.sections import Lora
from tests.engine_helpers import FAMILIES, cached, decode, nothing, prompt, request
from tests.graph_emulation import Emulated, Refused

NAMES = [f"c{number}" for number in range(9)]


def model(family="llama", seed=0):
    """With room for attention wider than one coarse step."""
    torch.manual_seed(seed)
    make, config = FAMILIES[family]
    sizes = config()
    sizes.max_position_embeddings = 512
    return make(sizes)


def adapted(family="llama"):
    """With adapters on every linear layer, which begin as nothing at all."""
    made = model(family)
    lora.attach(made, Lora(rank=4), torch.Generator().manual_seed(0))
    return made


def decoder(module, capture=None, precision="float32", slots=5, tokens=65536):
    made = Decoder(slots, tokens, precision, nothing, capture)
    made.load(module)
    return made


def eagerly():
    """A family of captures that are none: the same shapes, and the step itself again."""
    return lambda work: work


def turned(module):
    """Other weights in the same memory, as an optimizer leaves them."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.mul_(0.9 if number % 2 else 1.1)


def story(module, engine):
    """Everything that happens to an engine: the completions of all calls.

    Ragged prompts in fewer slots than rows, ends, both greedy and sampled rows, turns over kept keys and values that
    grow beyond one attention width, some of the conversations alone, new weights, a call that needs more capacity and a
    small one after it.
    """
    said = []

    def ask(asked):
        done = engine.generate(asked, decode)
        said.extend(done)
        return done

    tokens = {name: prompt(name, 40 + 11 * number) for number, name in enumerate(NAMES)}
    for turn, names in enumerate((NAMES, NAMES[::-1], NAMES[2:5], NAMES[1:])):
        temperatures = (1.0, 1.0, 0.0, 0.7) if turn else (1.0,)
        asked = [
            request(name, tokens[name], 7 + 3 * number, temperatures[number % len(temperatures)], ends=(5, 6))
            for number, name in enumerate(names)
        ]
        for row, done in zip(asked, ask(asked), strict=True):
            tokens[row.conversation] = row.tokens + done.tokens + prompt(f"{row.conversation} {turn}", 1 + turn)
    engine.free(NAMES[3:])
    engine.release()
    turned(module)
    engine.load(module)
    ask([request(name, prompt(name, 20 + 9 * number), 12, ends=(7,)) for number, name in enumerate(NAMES)])
    ask([request("long", prompt("long", 300), 9), request("short", prompt("short", 2), 30)])
    engine.load(module)
    ask([request(name, prompt(name, 5), 6) for name in NAMES[:3]])
    return said


def told(module, capture=None, precision="float32"):
    """The story with weights of its own."""
    mine = copy.deepcopy(module)
    return story(mine, decoder(mine, capture, precision))


class Families(list):
    """Begins emulated families and keeps them."""

    def __call__(self):
        self.append(Emulated())
        return self[-1]

    @property
    def captures(self):
        return sum(each.captures for each in self)

    @property
    def replays(self):
        return sum(each.replays for each in self)


@pytest.mark.parametrize(
    ("family", "precision"),
    [("llama", "float32"), ("llama", "bfloat16"), ("qwen2", "float32"), ("qwen3", "bfloat16")],
)
def test_replays_are_the_steps_to_the_bit(family, precision):
    module, families = model(family), Families()
    assert told(module, families, precision) == told(module, eagerly, precision)
    # The cache moved once, for the long call; new weights came into the memory of the old ones.
    assert len(families) == 2
    assert families.replays > 5 * families.captures


@pytest.mark.parametrize(("family", "precision"), [("llama", "float32"), ("qwen2", "bfloat16")])
def test_replays_move_with_the_adapters(family, precision):
    module, families = adapted(family), Families()
    engine = decoder(module, families, precision)
    asked = [request(name, prompt(name, 9), 12) for name in NAMES[:4]]
    first = engine.generate(asked, decode)
    assert first == decoder(model(family), eagerly, precision).generate(asked, decode)
    captures = families.captures
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    engine.load(module)
    second = engine.generate(asked, decode)
    assert second != first
    assert second == decoder(module, eagerly, precision).generate(asked, decode)
    # The sum of base and adapters came into the memory of the former one, which the replays read.
    assert (len(families), families.captures) == (1, captures)
    assert told(module, families, precision) == told(module, eagerly, precision)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_ordinary_engine_says_the_same(family):
    module = model(family)
    for mine, other in zip(told(module, Families()), told(module), strict=True):
        assert (mine.tokens, mine.stop) == (other.tokens, other.stop)
        assert mine.logprobs == pytest.approx(other.logprobs, abs=2e-5)


def test_a_replay_runs_no_code_of_the_model(monkeypatch):
    module, families = model(), Families()
    engine = decoder(module, families)
    asked = [request(name, prompt(name, 9), 60, ends=()) for name in NAMES[:4]]
    first = engine.generate(asked, decode)
    engine.free(NAMES)
    ran = []
    run = LlamaForward.run
    monkeypatch.setattr(LlamaForward, "run", lambda self, *given: ran.append(given[2].shape) or run(self, *given))
    assert engine.generate(asked, decode) == first
    assert ran == [(4, 9)]  # the prompts; all 59 steps were captured before
    assert families.captures == 1
    assert families.replays == 2 * 59


def test_moved_weights_are_captured_anew():
    module, families = model(), Families()
    engine = decoder(module, families)
    asked = [request("a", prompt("a", 9), 12)]
    first = engine.generate(asked, decode)
    norm = module.base_model.norm.weight
    norm.data = norm.data * 2
    engine.load(module)
    second = engine.generate(asked, decode)
    assert second != first
    assert second == decoder(module, eagerly).generate(asked, decode)
    assert len(families) == 2


def test_another_model_is_captured_anew(monkeypatch):
    first, second = model(), model(seed=1)
    families = Families()
    engine = decoder(first, families)
    # As if the second one came to lie where the first one lay.
    monkeypatch.setattr(LlamaForward, "memory", lambda self: [])
    monkeypatch.setattr(SlotCache, "memory", [torch.empty(1)])
    asked = [request("a", prompt("a", 9), 12)]
    said = engine.generate(asked, decode)
    engine.load(second)
    assert engine.generate(asked, decode) == decoder(second, eagerly).generate(asked, decode) != said
    assert len(families) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_products_stay_where_they_are(dtype):
    parts = [torch.randn(6, 8), torch.randn(4, 8)]
    both, alone = (
        FrozenLinear([Matrix(part) for part in parts], [torch.randn(10)], dtype),
        FrozenLinear([Matrix(parts[0])], [], dtype),
    )
    for product in (both, alone):
        product.load()
    places = [[tensor.data_ptr() for tensor in product.memory] for product in (both, alone)]
    assert (places[1] == [parts[0].data_ptr()]) == (dtype == torch.float32)
    for part in parts:
        part.mul_(2)
    for product in (both, alone):
        product.load()
    assert [[tensor.data_ptr() for tensor in product.memory] for product in (both, alone)] == places
    assert torch.equal(both.memory[0], torch.cat(parts).to(dtype))
    assert torch.equal(alone.memory[0], parts[0].to(dtype))


def test_work_that_may_be_left_out_changes_no_bit():
    torch.manual_seed(0)
    logits, drawn = 3 * torch.randn(40, 97), torch.rand(40, 2, dtype=torch.float64)
    for temperature in (torch.zeros(40), torch.ones(40), torch.tensor([0.0, 0.5, 1.0, 2.0] * 10)):
        plain = sample(logits, temperature, drawn)
        everything = sample(logits, temperature, drawn, scaled=True, drawn=True)
        assert all(torch.equal(a, b) for a, b in zip(plain, everything, strict=True))


def test_few_sizes():
    few, close = Sizes(few=True), Sizes(few=False)
    widths = [few.width(length) for length in range(1, 8193)]
    assert all(length <= width for length, width in enumerate(widths, 1))
    assert all(width - length < max(128, length / 4) for length, width in enumerate(widths, 1))
    assert widths == sorted(widths)
    assert len(set(widths)) == 8 + 3 * 4  # steps of 128 up to 1024, then four for every doubling
    assert [few.rows(count, 12) for count in (1, 2, 3, 5, 8, 9, 12)] == [1, 2, 4, 8, 8, 12, 12]
    assert [close.rows(count, 12) for count in (1, 3, 12)] == [1, 3, 12]
    assert close.memory((2, 64), (9, 128), 2000) == (2, 64)
    assert few.memory((2, 128), (9, 64), 2000) == (9, 128)
    assert few.memory((2, 1280), (9, 64), 2560) == (2, 1280)


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.mul_(float(x[0])),
        lambda x: x.mul_(2 if (x > 0).any() else 3),
        lambda x: x.mul_(x.max().item()),
        lambda x: x.sub_(min(x.tolist())),
        lambda x: x.add_(torch.tensor([1.0])),
        lambda x: x[x > 0].neg_(),
        lambda x: x.index_fill_(0, (x > 0).nonzero()[:, 0], 1.0),
        lambda x: x.copy_(x.cpu()),
    ],
)
def test_the_emulation_refuses_what_a_graph_cannot_hold(waits):
    with pytest.raises(Refused):
        Emulated()(lambda: waits(torch.ones(3)))


def test_the_emulation_is_of_graphs():
    taken, given = torch.tensor([1.0, 2.0]), torch.zeros(2)
    here = [3.0]
    replay = Emulated()(lambda: given.copy_(taken * 2 + here[0]))
    assert given.tolist() == [5.0, 7.0]  # of the warm-up; the capture itself did nothing
    taken.fill_(10.0)
    here[0] = 100.0
    replay()
    assert given.tolist() == [23.0, 23.0]  # the host's number of the time of capture, the device's of now


def test_refusals():
    with pytest.raises(UserError, match=r"engine.cuda_graphs is true, and the policy is on cpu"):
        cached(model(), cuda_graphs=True)
    with pytest.raises(UserError, match=r"engine.cuda_graphs is true, and gemma2 has not Llama's shape"):
        decoder(model("gemma2"), Families())
    assert isinstance(decoder(model("gemma2"))._forward, AnyForward)
    for device, refused in (("cpu", True), ("auto", False), ("cuda", False)):
        overrides = ["engine.cuda_graphs=true", f"hardware.device={device}"]
        if refused:
            with pytest.raises(RecipeError, match=r"engine.cuda_graphs=true: got true; expected false"):
                compose.load("quickstart", overrides)
        else:
            compose.load("quickstart", overrides)


class Recorded:
    """In the place of torch.cuda: writes down what a capture does, and fails as a GPU does."""

    def __init__(self, monkeypatch, ends_badly=False):
        self.did, self.streams, self._ends_badly = [], 0, ends_badly
        self._signature = inspect.signature(torch.cuda.graph)
        self._stream = "main"
        monkeypatch.setattr(graphs.torch, "cuda", self)

    def note(self, what):
        self.did.append((what, self._stream))

    def Stream(self):
        self.streams += 1
        return _Stream(self, "aside")

    def current_stream(self):
        return _Stream(self, self._stream)

    def graph_pool_handle(self):
        return (0, 1)

    def CUDAGraph(self):
        return self

    def replay(self):
        self.note("replayed")

    @contextlib.contextmanager
    def stream(self, stream):
        before, self._stream = self._stream, stream.name
        try:
            yield
        finally:
            self._stream = before

    @contextlib.contextmanager
    def graph(self, *given, **named):
        bound = self._signature.bind(*given, **named).arguments
        assert (bound["cuda_graph"], bound["pool"], bound["capture_error_mode"]) == (self, (0, 1), "thread_local")
        before, self._stream = self._stream, bound["stream"].name
        self.note("begun")
        try:
            yield
        finally:
            if self._ends_badly:  # before the stream is put back, as in torch
                raise RuntimeError("operation failed due to a previous error during capture")
        self.note("ended")
        self._stream = before


class _Stream:
    def __init__(self, recorded, name):
        self._recorded, self.name = recorded, name

    def wait_stream(self, other):
        self._recorded.note(f"{self.name} waits for {other.name}")


def test_what_a_capture_does(monkeypatch):
    cuda = Recorded(monkeypatch)
    families = CudaCaptures()
    for _ in range(2):
        cuda.did.clear()
        replay = families()(lambda: cuda.note("worked"))
        assert cuda.did == [
            ("aside waits for main", "main"),
            *[("worked", "aside")] * WARM_UP,
            ("begun", "aside"),
            ("worked", "aside"),
            ("ended", "aside"),
            ("main waits for aside", "main"),
        ]
    replay()
    assert cuda.did[-1] == ("replayed", "main")
    assert cuda.streams == 1


def test_a_capture_that_fails_says_why(monkeypatch):
    cuda = Recorded(monkeypatch, ends_badly=True)
    runs = []

    def work():
        runs.append(len(runs))
        if len(runs) > WARM_UP:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be late")

    with pytest.raises(EngineError, match=r"captured \(operation not permitted when stream is capturing\); set it to"):
        CudaCaptures()()(work)

    def broken():
        raise IndexError("a bug of the step")

    with pytest.raises(IndexError):  # of the first warm-up, which no graph has anything to do with
        CudaCaptures()()(broken)
    assert cuda.current_stream().name == "main"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu(precision):
    module = model().cuda()
    replayed = told(module, CudaCaptures(), precision)
    for mine, other in zip(replayed, told(module, eagerly, precision), strict=True):
        assert (mine.tokens, mine.stop) == (other.tokens, other.stop)
        assert mine.logprobs == pytest.approx(other.logprobs, abs=1e-5 if precision == "float32" else 0.02)
    assert cached(module, precision, cuda_graphs=True).generate([request("a", prompt("a", 9), 12)])
