"""Building, saving and loading policies: seeds, allocations, directories of all kinds, and files that are wrong."""

import hashlib
import json
import logging
import shutil
import sys
import warnings
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from mrlm_cli.errors import CheckpointError, MissingExtra, UserError
from mrlm_cli.policy import gguf, load, pretrained, scratch
from mrlm_cli.policy.quiet import LOGGERS, MOST, quiet
from mrlm_cli.policy.value import Critic
from mrlm_cli.recipe.sections import Chat, PretrainedModel, ScratchModel, Value
from mrlm_cli.training import checkpoint

SCRATCH = ScratchModel(type="scratch", layers=2, hidden=16, heads=2, context=32)


def build(model, seed=0, **options):
    fixed = {"device": "cpu", "precision": "float32", "gradient_checkpointing": False}
    return load.build(model, seed=seed, **(fixed | options))


def scratch_with(**value):
    return SCRATCH.model_copy(update={"value": Value(**value)})


def at(path, **value):
    return PretrainedModel(type="pretrained", path=str(path), value=Value(**value))


def digest(module):
    state = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        state.update(name.encode() + tensor.detach().numpy().tobytes())
    return state.hexdigest()


@pytest.fixture
def saved(tmp_path):
    """A checkpoint directory of a scratch policy, and the policy."""
    policy, chat = build(scratch_with(head="mlp", init="normal"), seed=3)
    load.save(policy, chat.tokenizer, tmp_path / "ck")
    return tmp_path / "ck", policy


def test_scratch_weights_depend_on_the_seed_alone_and_leave_the_random_state():
    model = scratch_with(head="mlp", init="normal")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = digest(build(model, seed=5)[0])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert digest(build(model, seed=5)[0]) == first
    assert digest(build(model, seed=6)[0]) != first
    policy = build(SCRATCH.model_copy(update={"hidden": 128}))[0]
    matrices = torch.cat([p.flatten() for p in policy.lm.parameters() if p.ndim == 2])
    assert matrices.std().item() == pytest.approx(0.02, rel=0.01)
    assert matrices.mean().abs() < 1e-3


def test_the_quickstart_model_has_the_known_size_and_learns():
    policy, chat = build(ScratchModel(type="scratch", layers=2, hidden=128), seed=0)
    assert 330_000 < sum(p.numel() for p in policy.lm.parameters()) < 340_000
    tokens = torch.tensor([chat.open([])[0][1] + tuple(chat.tokenizer("ab=ba;cd=dc").input_ids)])
    score = torch.ones_like(tokens, dtype=torch.bool)
    score[:, 0] = False
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        out = policy(tokens, torch.tensor([tokens.shape[1]]), score, temperature=1.0)
        loss = -out.logprobs.sum() / score.sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(torch.tensor(57.0).log().item(), abs=0.3)  # near uniform at the start
    assert losses[-1] < 0.05


@pytest.mark.parametrize("kind", ["characters", "bytes"])
def test_scratch_tokenizers_survive_saving(kind, tmp_path):
    model = SCRATCH.model_copy(update={"tokenizer": kind})
    policy, chat = build(model)
    load.save(policy, chat.tokenizer, tmp_path)
    _, again = build(at(tmp_path))
    for text in (model.characters, " a  b . , ' 's \n\n(x)", "sort 75="):
        tokens = chat.tokenizer(text).input_ids
        assert again.tokenizer(text).input_ids == tokens
        assert len(tokens) == len(text)
        assert again.decode(tokens) == chat.decode(tokens) == text
    assert (again.end_tokens, again.context) == (chat.end_tokens, 32)
    assert set(again.tokenizer("a")) == {"input_ids", "attention_mask"}
    if kind == "bytes":
        assert again.vocabulary == 259
        assert again.decode(again.tokenizer("É世\x00🎉").input_ids) == "É世\x00🎉"
    else:
        assert again.vocabulary == len(model.characters) + 3
        assert again.tokenizer("aÉb").input_ids[1] == again.tokenizer.unk_token_id == 2
    assert (again.tokenizer.pad_token_id, again.tokenizer.eos_token_id) == (0, 1)


def test_value_heads_start_as_the_recipe_says():
    tokens = torch.arange(3, 13).reshape(2, 5)
    score = torch.ones(2, 5, dtype=torch.bool)
    score[:, 0] = False

    def values(**value):
        policy, _ = build(scratch_with(**value), seed=1)
        return policy, policy(tokens, torch.tensor([5, 5]), score, temperature=1.0).values[score]

    for head in ("linear", "mlp"):
        assert not values(head=head, init="zero")[1].any()
        assert values(head=head, init="normal")[1].abs().min() > 0
    policy, _ = values(head="mlp", init="normal")
    assert policy.value.hidden.weight.shape == (16, 16)
    policy, _ = values(head="linear", init="normal")
    wide, _ = build(ScratchModel(type="scratch", hidden=2048, layers=1, value=Value(init="normal")))
    assert wide.value.last.weight.std().item() == pytest.approx(2049**-0.5, rel=0.1)
    assert build(SCRATCH, values=False)[0].value is None


def test_a_critic_starts_from_the_policy_or_from_a_path(saved):
    directory, policy = saved
    own, _ = build(scratch_with(type="separate"), seed=4)
    assert isinstance(own.value, Critic)
    assert digest(own.value.trunk) == digest(own.lm.base_model)
    assert own.value.trunk.embed_tokens.weight.data_ptr() != own.lm.get_input_embeddings().weight.data_ptr()
    other, _ = build(scratch_with(type="separate", head="mlp", path=str(directory)), seed=4)
    assert digest(other.value.trunk) == digest(policy.lm.base_model)
    assert digest(other.value.trunk) != digest(other.lm.base_model)
    assert digest(other.value.head) == digest(policy.value)  # the checkpoint's value head comes along
    with pytest.raises(CheckpointError, match="another model"):
        build(scratch_with(type="separate", head="linear", path=str(directory)))
    with pytest.raises(UserError, match="another vocabulary"):
        build(scratch_with(type="separate", path=str(directory)).model_copy(update={"characters": "abc"}))


def test_a_separate_critic_is_saved_and_loaded_whole(tmp_path):
    policy, chat = build(scratch_with(type="separate", init="normal"), seed=4)
    with torch.no_grad():
        for p in policy.value.parameters():
            p.mul_(1.5)
    load.save(policy, chat.tokenizer, tmp_path)
    fresh, _ = build(scratch_with(type="separate"), seed=9)
    load.load_weights(fresh, tmp_path)
    assert digest(fresh) == digest(policy)
    continued, _ = build(scratch_with(type="separate", path=str(tmp_path)), seed=9)
    assert digest(continued.value) == digest(policy.value)


def test_loaded_weights_lie_in_allocations_of_their_own(saved):
    directory, policy = saved
    loaded, _ = build(at(directory, head="mlp"), seed=8)
    assert digest(loaded.lm) == digest(policy.lm)
    for tensor in [*loaded.parameters(), *loaded.buffers()]:
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        assert tensor.storage_offset() == 0
    assert loaded.lm.lm_head.weight is loaded.lm.model.embed_tokens.weight
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())


def test_views_of_one_buffer_are_taken_apart(saved, monkeypatch):
    """What a reader returns may be slices of one mapped file."""
    buffer = torch.arange(24.0)
    module = torch.nn.Linear(4, 3)
    module.weight.data, module.bias.data = buffer[1:13].view(4, 3).t(), buffer[13:16]
    tied = torch.nn.ModuleList([module, torch.nn.Linear(4, 3)])
    tied[1].weight = module.weight
    pretrained.fresh_allocations(tied)
    assert torch.equal(module.weight, buffer[1:13].view(4, 3).t())
    assert tied[1].weight is module.weight
    for parameter in module.parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4
    lm = scratch.language_model(SCRATCH, 59, seed=0)
    lm.model.norm.weight.data = buffer[2:18]
    assert pretrained.settled(lm).model.norm.weight.untyped_storage().nbytes() == 64
    directory, _ = saved
    policy, _ = build(scratch_with(head="mlp"))
    stored = load_file(directory / "value.safetensors")
    whole = torch.cat([tensor.flatten() for tensor in stored.values()])
    pieces = whole.split([tensor.numel() for tensor in stored.values()])
    views = {name: piece.view(stored[name].shape) for name, piece in zip(stored, pieces, strict=True)}
    monkeypatch.setattr(load, "load_file", lambda _: views)
    load.load_weights(policy, directory)
    for name, parameter in policy.value.named_parameters():
        assert torch.equal(parameter, stored[name])
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4


def test_half_precision_files_become_float32_masters(tmp_path, saved):
    _, policy = saved
    policy.lm.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    build(SCRATCH)[1].tokenizer.save_pretrained(tmp_path / "half")
    loaded, _ = build(at(tmp_path / "half"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_the_reference_is_a_frozen_copy(saved):
    _, policy = saved
    frozen = load.reference(policy)
    assert frozen.value is None
    assert digest(frozen.lm) == digest(policy.lm)
    before = digest(frozen.lm)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1)
    assert digest(frozen.lm) == before
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_reference_in_bfloat16_keeps_its_matrices_so_and_computes_the_same_bits(saved):
    policy, _ = build(at(saved[0] / "policy"), precision="bfloat16")
    matrix = "model.layers.0.mlp.down_proj.weight"
    frozen, moving = load.reference(policy), load.reference(policy, moves=True)
    assert {each.dtype for each in moving.parameters()} == {torch.float32}
    assert dict(frozen.lm.named_parameters())[matrix].dtype == torch.bfloat16
    assert {each.dtype for each in frozen.parameters() if each.ndim < 2} == {torch.float32}
    assert dict(policy.lm.named_parameters())[matrix].dtype == torch.float32
    tokens = torch.arange(2, 18).view(2, 8)
    score = torch.ones(2, 8, dtype=torch.bool)
    score[:, 0] = False
    given = (tokens, torch.tensor([8, 6]), score & (torch.arange(8) < torch.tensor([[8], [6]])))
    with torch.no_grad():
        rows = [each(*given, temperature=1.0, values=False).logprobs for each in (policy, frozen, moving)]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_dropout_is_off_wherever_the_configuration_asked_for_it(tmp_path):
    config = GPT2Config(vocab_size=59, n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=1, bos_token_id=1)
    assert config.resid_pdrop == config.attn_pdrop == config.embd_pdrop == 0.1
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    scratch.tokenizer(SCRATCH).save_pretrained(tmp_path)
    policy, _ = build(at(tmp_path), gradient_checkpointing=True)
    assert [m.p for m in policy.modules() if isinstance(m, torch.nn.Dropout)] == [0.0] * 4
    tokens = torch.arange(3, 13)[None]
    score = tokens > 3
    policy.train()
    first, second = (policy(tokens, torch.tensor([10]), score, temperature=1.0).logprobs for _ in range(2))
    assert torch.equal(first, second)


def test_a_run_a_checkpoint_and_a_model_directory_are_all_models(saved, tmp_path, capsys):
    directory, policy = saved
    run = tmp_path / "run"
    other, chat = build(SCRATCH, seed=77)
    older = checkpoint.write(run / "checkpoints", 10, lambda place: load.save(other, chat.tokenizer, place))
    newest = checkpoint.write(
        run / "checkpoints", 20, lambda place: shutil.copytree(directory, place, dirs_exist_ok=True)
    )
    assert load.model_directory(run) == newest / "policy"
    assert load.model_directory(newest) == newest / "policy"
    assert load.model_directory(newest / "policy") == newest / "policy"
    assert digest(build(at(run))[0].lm) == digest(policy.lm)
    weights = newest / "policy" / "model.safetensors"
    broken = bytearray(weights.read_bytes())
    broken[-1] ^= 1  # which the format itself does not notice
    weights.write_bytes(broken)
    assert load.model_directory(run) == older / "policy"
    assert "checkpoint step-000020 is left out" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="sha256 differs"):
        load.model_directory(newest)


def test_wrong_directories_are_refused_in_one_sentence(saved, tmp_path, monkeypatch):
    directory, _ = saved
    weights = directory / "policy" / "model.safetensors"
    good = weights.read_bytes()

    def refused(path=directory, error=CheckpointError):
        with pytest.raises(error) as caught:
            build(at(path))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    weights.write_bytes(good[: len(good) // 2])
    assert "cannot be read" in refused()
    weights.write_bytes(b"\xff" * 100)
    assert "cannot be read" in refused()
    tensors = load_file_bytes(good, tmp_path)
    save_file({name: t for name, t in tensors.items() if "layers.1.mlp" not in name}, weights, {"format": "pt"})
    assert "lacks 3 of the model's tensors" in refused()
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, weights, {"format": "pt"})
    assert "cannot be read" in refused()
    weights.unlink()
    assert "holds no .safetensors file" in refused()
    torch.save(tensors, directory / "policy" / "pytorch_model.bin")
    assert "is a pickle" in refused()
    (directory / "policy" / "other.safetensors").write_bytes(good)  # does not make the pickle welcome
    assert "cannot be read" in refused()
    weights.write_bytes(good)
    (directory / "policy" / "pytorch_model.bin").unlink()
    (directory / "policy" / "config.json").write_text("{")
    assert "cannot be read" in refused()
    (directory / "policy" / "config.json").write_text(json.dumps({"model_type": "no-such-family"}))
    assert "cannot be read" in refused()
    (tmp_path / "empty").mkdir()
    assert "holds no model" in refused(tmp_path / "empty", UserError)
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(tmp_path / "file", UserError)
    assert "there is no model at" in refused(tmp_path / "nothing", UserError)

    def unreachable(*_arguments, **_options):
        raise OSError("no route\nand more lines")

    with monkeypatch.context() as patch:
        patch.setattr(pretrained.AutoConfig, "from_pretrained", unreachable)
        assert "could not be had from the hub: no route" in refused("no-such-maker/no-such-model", UserError)
        patch.chdir(tmp_path)
        for missing in ("runs/nothing", "models/nothing", "empty/nothing", "./nothing", "a/b/c"):
            assert refused(missing, UserError).startswith("there is no model at")
    assert refused("models/smollm2-135m", UserError).endswith("mrlm fetch smollm2-135m")
    assert refused("/somewhere/smollm2-135m", UserError).endswith("mrlm fetch smollm2-135m --to /somewhere")


def load_file_bytes(content, folder):
    (folder / "copy.safetensors").write_bytes(content)
    return load_file(folder / "copy.safetensors")


def test_code_in_a_model_directory_never_runs(saved):
    directory, _ = saved
    config = directory / "policy" / "config.json"
    (directory / "policy" / "evil.py").write_text("raise SystemExit('ran')")
    settings = json.loads(config.read_text()) | {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    }
    config.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="cannot be read"):
        build(at(directory))


def test_load_weights_refuses_another_model_and_changes_nothing(saved):
    directory, _ = saved
    for model in (
        SCRATCH.model_copy(update={"layers": 1, "value": Value(head="mlp")}),
        SCRATCH.model_copy(update={"hidden": 32, "value": Value(head="mlp")}),
        SCRATCH,  # a linear head
    ):
        policy, _ = build(model)
        before = digest(policy)
        with pytest.raises(CheckpointError, match="another model"):
            load.load_weights(policy, directory)
        assert digest(policy) == before
    (directory / "value.safetensors").write_bytes(b"junk")
    policy, _ = build(scratch_with(head="mlp"))
    before = digest(policy)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load.load_weights(policy, directory)
    assert digest(policy) == before


def test_a_family_with_another_way_to_logits_is_refused(saved, monkeypatch):
    directory, _ = saved
    forward = LlamaForCausalLM.forward

    def doubled(self, *arguments, **options):
        out = forward(self, *arguments, **options)
        out.logits = out.logits * 2
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(UserError, match="models of type llama are not supported"):
        build(at(directory))


def test_generation_settings_that_cannot_be_saved_are_given_up(saved, tmp_path):
    directory, _ = saved
    file = directory / "policy" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    policy, chat = build(at(directory))
    load.save(policy, chat.tokenizer, tmp_path / "again")
    assert "temperature" not in json.loads((tmp_path / "again" / "policy" / "generation_config.json").read_text())


def test_a_gguf_file_needs_its_extra_and_must_be_one(tmp_path, monkeypatch):
    file = tmp_path / "model.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(gguf.importlib.util, "find_spec", lambda name: None if name == "gguf" else sys)
        with pytest.raises(MissingExtra, match=r"mrlm\[gguf\]"):
            build(at(file))
        patch.setattr(gguf.importlib.util, "find_spec", lambda name: sys)
        with pytest.raises(UserError, match="there is no file"):
            build(at(file))
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    file.write_bytes(b"GGUF and then junk")
    with pytest.raises(CheckpointError, match="cannot be read"):
        build(at(file))


def test_the_libraries_settings_are_put_back():
    def now():
        loggers = [logging.getLogger(name) for name in LOGGERS]
        told = [(one.level, one.handlers, one.propagate) for one in loggers]
        return told, transformers_logging.is_progress_bar_enabled(), list(warnings.filters)

    before = now()
    with quiet():
        assert not transformers_logging.is_progress_bar_enabled()
    with pytest.raises(ZeroDivisionError), quiet():
        1 // 0  # noqa: B018
    assert now() == before


@pytest.mark.parametrize("fails", [False, True])
def test_what_libraries_say_is_told_in_one_line_and_advice_is_not(capsys, fails):
    logger = logging.getLogger("transformers.modeling_utils")
    with suppress(ZeroDivisionError), quiet():
        for _ in range(2):
            warnings.warn("the tokenizer\n  is odd", stacklevel=1)
        warnings.warn("an argument is renamed", FutureWarning, stacklevel=1)
        logger.warning("we strongly recommend")
        logger.error("a file is %s", "x" * 1000)
        1 // (not fails)
    begins = "warning: the model's libraries say: "
    assert capsys.readouterr().err.splitlines() == [
        f"{begins}a file is {'x' * (MOST - len('a file is '))}…",
        f"{begins}the tokenizer is odd",
    ]
    with pytest.warns(FutureWarning):
        warnings.warn("an argument is renamed", FutureWarning, stacklevel=1)


def test_building_a_model_lets_no_library_talk_to_the_terminal(tmp_path, monkeypatch):
    """Such as transformers about a forward without attention_mask, in which the head is looked at."""
    heard = []

    class Ear(logging.Handler):
        def emit(self, record):
            heard.append(record.getMessage())

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=1,
                               bos_token_id=None, pad_token_id=0)).save_pretrained(tmp_path)  # fmt: skip
    scratch.tokenizer(SCRATCH).save_pretrained(tmp_path)
    logging.Logger.warning_once.cache_clear()  # as in a new process
    library = logging.getLogger("transformers")
    monkeypatch.setattr(library, "handlers", [Ear()])
    library.warning("heard")
    build(PretrainedModel(type="pretrained", path=str(tmp_path), chat=Chat(template="plain")))
    assert heard == ["heard"]


def test_the_context_of_a_loaded_model_is_its_own(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    max_position_embeddings=48, eos_token_id=1, bos_token_id=None, pad_token_id=0)
    ).save_pretrained(tmp_path)  # fmt: skip
    scratch.tokenizer(SCRATCH).save_pretrained(tmp_path)
    _, chat = build(PretrainedModel(type="pretrained", path=str(tmp_path), chat=Chat(template="plain")))
    assert (chat.context, chat.vocabulary) == (48, 64)  # wider than the tokenizer: the logits count
