"""The shape of a model, read without building it: from a scratch section, or from config.json and safetensors headers.

What cannot be known from files (a hub id, a model not fetched yet, a GGUF file) is None.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mrlm_cli.errors import CheckpointError
from mrlm_cli.recipe import checkpoints
from mrlm_cli.recipe.sections import PretrainedModel, ScratchModel

ADAPTER_CONFIG = "adapter_config.json"
# Families whose frozen copies hold their matrices in bfloat16 where products are: see `policy.load.reference`.
PACKED = ("llama", "mistral", "qwen2", "qwen3")
SPECIAL_TOKENS = 3  # padding, end and unknown, before the scratch alphabet
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a causal language model. `parameters` counts tied weights once; `head`: an untied LM head's."""

    parameters: int
    head: int
    layers: int
    hidden: int
    mlp: int
    key_width: int  # keys of one token and layer: key-value heads x head width
    vocabulary: int
    context: int | None
    linear: tuple[tuple[str, int], ...]  # (name of a linear layer, inputs + outputs summed over all layers)
    narrow: int  # of the parameters, those in matrices that a frozen copy holds in bfloat16 where products are


def of(model: ScratchModel | PretrainedModel) -> Shape | None:
    """The model's shape; None if its files are not here. Raises CheckpointError for files that cannot be read."""
    if isinstance(model, ScratchModel):
        return _scratch(model)
    place = directory(Path(model.path).expanduser())
    if place is not None and (place / ADAPTER_CONFIG).is_file():
        place = directory(Path(adapter_base(place)).expanduser())
    return None if place is None else _pretrained(place)


def adapter_base(directory: Path) -> str:
    """The directory or hub id of the model that the adapters in `directory` stand on.

    A run's own base comes first, so that a run may be moved: runs/x/base for runs/x/checkpoints/step-000040/policy.
    Raises CheckpointError if there is none.
    """
    own = directory.resolve().parents[2] / "base" if len(directory.resolve().parents) > 2 else directory
    if directory.name == "policy" and (own / "config.json").is_file():
        return str(own)
    named = _json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(f"{directory / ADAPTER_CONFIG} does not say which model its adapters stand on")
    return named


def value_parameters(model: ScratchModel | PretrainedModel, shape: Shape) -> int:
    """Parameters of the value function: its head and, of a critic, the trunk under it with its adapters."""
    trunk = shape.parameters - shape.head + adapter_parameters(model, shape)
    return _head_parameters(model, shape) + (trunk if model.value.type == "separate" else 0)


def trained_parameters(model: ScratchModel | PretrainedModel, shape: Shape, *, values: bool) -> int:
    """Parameters that an optimizer moves, of the policy and, where `values`, of the value function."""
    if model.lora is None:
        return shape.parameters + (value_parameters(model, shape) if values else 0)
    trunks = 2 if values and model.value.type == "separate" else 1
    return trunks * adapter_parameters(model, shape) + (_head_parameters(model, shape) if values else 0)


def reference_bytes(shape: Shape, precision: str, *, moves: bool) -> int:
    """Of a reference with weights of its own: float32, but matrices that never move as narrow as their products."""
    narrow = shape.narrow if precision == "bfloat16" and not moves else 0
    return 4 * shape.parameters - 2 * narrow


def _head_parameters(model: ScratchModel | PretrainedModel, shape: Shape) -> int:
    """H + 1 (linear), H² + 2H + 1 (mlp)."""
    width = shape.hidden
    return width + 1 + (width * width + width if model.value.head == "mlp" else 0)


def adapter_parameters(model: ScratchModel | PretrainedModel, shape: Shape) -> int:
    """Parameters of the adapters on one trunk: rank x (inputs + outputs) for each linear layer that gets one."""
    if model.lora is None:
        return 0
    return model.lora.rank * sum(size for name, size in shape.linear if name in (model.lora.targets or (name,)))


def _scratch(model: ScratchModel) -> Shape:
    width, mlp = model.hidden, model.mlp or 2 * model.hidden
    words = SPECIAL_TOKENS + (256 if model.tokenizer == "bytes" else len(model.characters))
    matrices = model.layers * (4 * width * width + 3 * width * mlp)  # attention, gated MLP; no biases
    parameters = words * width + matrices + model.layers * 2 * width + width  # norms; the head is the embedding
    square, wide = 2 * width * model.layers, (width + mlp) * model.layers
    linear = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), square)
    linear |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), wide)
    linears = tuple(sorted(linear.items()))
    return Shape(parameters, 0, model.layers, width, mlp, width, words, model.context, linears, matrices)


def directory(path: Path) -> Path | None:
    """The model's directory that a model, checkpoint or run directory means, as far as names tell: nothing is verified.

    A run means its newest checkpoint.
    """
    newest = [each / "policy" for each in checkpoints.below(path / "checkpoints")[:1]]
    return next((each for each in (path, path / "policy", *newest) if is_model(each)), None)


def is_model(place: Path) -> bool:
    """Whether a directory holds a model, or adapters alone."""
    return (place / "config.json").is_file() or (place / ADAPTER_CONFIG).is_file()


def _pretrained(directory: Path) -> Shape | None:
    config = _json(directory / "config.json")
    config = config.get("text_config", config)
    shapes: dict[str, list[int]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        shapes |= _tensors(file)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    hidden = _first(config, "hidden_size", "n_embd")
    layers = _first(config, "num_hidden_layers", "n_layer")
    heads = _first(config, "num_attention_heads", "n_head")
    words = _first(config, "vocab_size")
    if not sizes or hidden is None or layers is None or heads is None or words is None:
        return None
    key_heads = _first(config, "num_key_value_heads") or heads
    return Shape(
        parameters=sum(sizes.values()),
        head=sizes.get("lm_head.weight", 0),
        layers=layers,
        hidden=hidden,
        mlp=_first(config, "intermediate_size", "n_inner") or 4 * hidden,
        key_width=key_heads * (_first(config, "head_dim") or hidden // heads),
        vocabulary=words,
        context=_first(config, "max_position_embeddings", "n_positions"),
        linear=_linear(shapes),
        narrow=sum(math.prod(shape) for _, shape in _matrices(shapes)) if _packed(config) else 0,
    )


def _linear(shapes: Mapping[str, list[int]]) -> tuple[tuple[str, int], ...]:
    found: Counter[str] = Counter()
    for name, shape in _matrices(shapes):
        found[name] += sum(shape)
    return tuple(sorted(found.items()))


def _matrices(shapes: Mapping[str, list[int]]) -> Iterator[tuple[str, list[int]]]:
    """(last name, shape) of the matrices inside numbered layers: embeddings and the head stand outside of them."""
    for name, shape in shapes.items():
        if (match := re.search(r"\.\d+\.(?:.+\.)?(\w+)\.weight$", f".{name}")) and len(shape) == 2:
            yield match[1], shape


def _packed(config: Mapping[str, Any]) -> bool:
    """Whether the trunk is of Llama shape, as far as its config tells: `kernels.llama` looks at the built model."""
    slides = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    return config.get("model_type") in PACKED and not slides and config.get("hidden_act", "silu") == "silu"


def _tensors(file: Path) -> dict[str, list[int]]:
    """The shape of every tensor by name, from the header: 8 bytes of its length, then JSON."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, _LARGEST_HEADER)))
        return {name: list(header[name]["shape"]) for name in header if name != "__metadata__"}
    except (OSError, ValueError, TypeError, KeyError, struct.error) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not describe a model")
    return content


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
