"""The sections of a recipe, each a strict frozen class. Every field carries a sentence: unit, consequence, default."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mrlm_cli.strict import Names, Schedule, Strict, Strings

Positive = Annotated[int, Field(ge=1)]


class Value(Strict):
    """The value function V(tokens[:t])."""

    type: Literal["shared", "separate"] = "shared"
    """`shared` puts a head on the policy's own trunk; `separate` trains a second model of the same shape as critic."""
    head: Literal["linear", "mlp"] = "linear"
    """One linear layer, or one hidden layer of the model's width with tanh before it."""
    init: Literal["zero", "normal"] = "zero"
    """Zero starts at V = 0; normal draws the last layer with std 1/sqrt(width + 1)."""
    trunk_gradient: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Factor on the value loss's gradient into a shared trunk; 0 trains the head alone."""
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    """Peak learning rate of the value head or the critic; by default the optimizer's lr."""
    path: Annotated[str | None, Names("model")] = None
    """A checkpoint's or model's directory from which a separate critic starts; by default a copy of the policy."""

    @model_validator(mode="after")
    def _fits(self) -> "Value":
        if self.path is not None and self.type != "separate":
            raise ValueError("path is for type separate only")
        if self.type == "separate" and self.trunk_gradient != Value.model_fields["trunk_gradient"].default:
            raise ValueError("trunk_gradient is for type shared only: a separate critic has a trunk of its own")
        return self


class Chat(Strict):
    """How messages become tokens."""

    template: Literal["auto", "model", "plain"] = "auto"
    """`model` uses the tokenizer's chat template, `plain` joins the contents, `auto` prefers the first."""
    system: str | None = None
    """A system message before every conversation that brings none; an empty string gives an empty one, null none."""


class Lora(Strict):
    """Low-rank adapters: only they and the value head are trained; the model's own weights stay as loaded.

    There is no dropout: old and new log-probs of a token would come from different masks.
    """

    rank: Annotated[int, Field(ge=1, le=4096)] = 16
    """Rank of every adapter: it adds rank x (inputs + outputs) parameters to each matrix."""
    alpha: Annotated[float, Field(gt=0, le=65536)] = 32.0
    """An adapter's product is scaled by alpha / rank, so that the learning rate depends little on the rank."""
    targets: Strings = ()
    """Names of the linear layers that get adapters, such as q_proj; empty takes every one but the model's head."""

    @property
    def needed_extras(self) -> tuple[str, ...]:
        """See Strict."""
        return ("lora",)


class ScratchModel(Strict):
    """A small Llama-family model with random weights and a built-in tokenizer."""

    type: Literal["scratch"]
    """A model made on the spot; needs no file."""
    layers: Annotated[int, Field(ge=1, le=128)] = 2
    """Decoder layers."""
    hidden: Annotated[int, Field(ge=8, le=16384)] = 128
    """Width of the residual stream; a multiple of 2 x heads."""
    heads: Annotated[int, Field(ge=1, le=128)] = 4
    """Attention heads, each of width hidden / heads."""
    mlp: Annotated[int, Field(ge=8, le=65536)] | None = None
    """Width inside the gated MLP; by default twice `hidden`."""
    context: Annotated[int, Field(ge=8, le=131072)] = 256
    """Longest sequence in tokens."""
    tokenizer: Literal["characters", "bytes"] = "characters"
    """`characters` has one token for each of `characters`; `bytes` one for each of the 256 bytes."""
    characters: str = "0123456789abcdefghijklmnopqrstuvwxyz +-*/=<>!?.,:;()'\n"
    """The alphabet of the `characters` tokenizer; anything else becomes the unknown token."""
    value: Value = Value()
    """The value function."""
    lora: Lora | None = None
    """Low-rank adapters instead of training every weight (extra `lora`); null trains every weight."""
    chat: Chat = Chat()
    """How messages become tokens; a scratch model has no template of its own."""

    @model_validator(mode="after")
    def _fits(self) -> "ScratchModel":
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden must be a multiple of 2 x heads = {2 * self.heads}")
        if len(set(self.characters)) != len(self.characters) or not self.characters:
            raise ValueError("characters must not be empty and must name each character once")
        if self.chat.template == "model":
            raise ValueError("a scratch model has no chat template; chat.template must be auto or plain")
        return self


class PretrainedModel(Strict):
    """A transformers causal language model in safetensors, or a GGUF file."""

    type: Literal["pretrained"]
    """A model that was trained before."""
    path: Annotated[str, Names("model")]
    """A local directory, a checkpoint or run directory of mrlm, a `.gguf` file, or a hub id."""
    value: Value = Value()
    """The value function."""
    lora: Lora | None = None
    """Low-rank adapters instead of training every weight (extra `lora`); null trains every weight."""
    chat: Chat = Chat()
    """How messages become tokens."""


ModelSection = Annotated[ScratchModel | PretrainedModel, Field(discriminator="type")]


class Sampling(Strict):
    """What one step draws."""

    tasks_per_step: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Tasks in a step."""
    episodes_per_task: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Episodes sampled of each task."""
    refills: Annotated[int, Field(ge=0, le=1000)] = 4
    """Times a step may sample the next tasks in place of those that the algorithm leaves out, such as flat groups."""
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Tokens the policy may write in one turn; a reply cut here ends the episode."""
    max_turns: Annotated[int, Field(ge=1, le=10_000)] = 32
    """Replies the policy may give in one episode."""
    max_tokens: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    """Tokens of a whole episode, prompt included; by default, and at most, the model's context."""
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Logits are divided by it in the sampler and in every scoring pass alike."""
    stop: Strings = ()
    """Strings that end a reply, with the token that completes one of them."""
    reuse_within: Annotated[float, Field(ge=0, le=0.1)] = 0.0
    """In float32 the sampler's log-probs serve as the old ones, which saves scoring them, while the largest gap to the
    trainer's that was measured last (`sampler_gap_max`) is at most this, in nats; 1e-3 suits. 0 never uses them."""


class Optimizer(Strict):
    """AdamW and the way an iteration is cut into optimizer steps."""

    lr: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Peak learning rate."""
    schedule: Schedule = "constant"
    """Shape of the learning rate after the warm-up, over the run's `steps`."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises linearly from lr / (warmup + 1) to lr."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of lr at which a linear or cosine schedule ends."""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)
    ] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-5
    """Adam's epsilon."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay; never applied to norms, biases and heads."""
    passes: Annotated[int, Field(ge=1, le=100)] = 1
    """Times each iteration's episodes are gone through."""
    minibatches: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Optimizer steps in a pass."""
    tokens_per_micro_batch: Annotated[int, Field(ge=1, le=100_000_000)] = 4096
    """Padded tokens in one forward and backward; a longer episode makes a micro-batch of its own."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global norm; null leaves them as they are."""
    max_refused: Annotated[int, Field(ge=1)] = 5
    """Optimizer steps in a row that may be refused for a non-finite loss or gradient before the run stops."""


class Evaluate(Strict):
    """Held-out evaluation."""

    every: Annotated[int, Field(ge=0)] = 50
    """Steps between evaluations on the validation split; the first and the last always happen; 0 is only those two."""
    tasks: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Distinct held-out tasks, the first of the split, shared over the environments by weight."""
    episodes_per_task: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Episodes of each held-out task; above 1 gives pass@k."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Sampling temperature of the evaluation; 0 is greedy."""


class Checkpoint(Strict):
    """What is kept on disk to go on from."""

    every: Annotated[int, Field(ge=0)] = 50
    """Steps between checkpoints; the last step is always saved; 0 is only that one."""
    keep: Annotated[int, Field(ge=1, le=10_000)] = 2
    """Newest checkpoints kept; the best one by held-out exactness is kept besides."""


class Hardware(Strict):
    """Where and how precisely to compute."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Threads of torch; by default the CPUs this process may use. Other thread counts give other bits."""
    native: bool | None = None
    """Kernels in C on a CPU, compiled once for its processor; by default where there is a C compiler. Other bits with
    than without."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of matrix products; master weights, norms, rotary, softmax and the optimizer stay in float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a quarter more time."""
    worker_processes: Annotated[int, Field(ge=1, le=256)] = 2
    """Processes that run environments which are not built in."""
    deadline: Annotated[float, Field(gt=0, le=86_400)] = 30.0
    """Seconds that an environment in a worker process may take for one answer before its session counts as failed."""


class Report(Strict):
    """What is written down besides metrics."""

    episodes: Annotated[int, Field(ge=0, le=100_000)] = 8
    """Episodes stored in episodes/step-N.jsonl."""
    episodes_every: Annotated[int, Field(ge=1)] = 10
    """Steps between stored samples of episodes; the first and last step's are always stored."""
