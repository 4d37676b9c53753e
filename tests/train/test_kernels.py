"""Compiled layers and Liger kernels compute the same as eager layers; impossible settings are rejected early."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from schemas.errors import ConfigError
from tests.train.launching import REPOSITORY, as_flags, fingerprint_of, read_metrics, run_ranks
from tests.train.synthetic import make_bins, write_shards
from tests.train.test_model import EVERYTHING, gradients, micro_batch, samples_of_all_kinds
from train.model import kernels, optim
from train.model.packed import PackedQwen, checkpoint_activations
from train.settings.flags import parse_arguments

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
NEEDS_LIGER = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("liger_kernel") is None, reason="needs a GPU with liger-kernel"
)


def make_model(checkpoint: Path, device: torch.device = CPU) -> PackedQwen:
    """Load a model with all parts trained and activations recomputed."""
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).to(device)
    model = PackedQwen(hf, attn_implementation="sdpa").train()
    optim.group_parameters(model, EVERYTHING)
    checkpoint_activations(model)
    return model


@pytest.fixture
def compiler() -> Iterator[Any]:
    """The counters of torch.compile, whose cache is cleared before and after the test."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_layers_give_the_same_loss_and_gradients_for_bins_of_any_length(
    tiny_checkpoint: Path, compiler: Any
) -> None:
    """``aot_eager`` skips code generation, which would take a minute, but traces, differentiates and recomputes."""
    eager, compiled = make_model(tiny_checkpoint), make_model(tiny_checkpoint)
    kernels.compile_layers(compiled.hf, attn_implementation="sdpa", backend="aot_eager")
    num_graphs = []
    for seed in range(5):
        batch = micro_batch(*samples_of_all_kinds(seed)[seed % 3 :])
        expected_loss, loss = eager(batch), compiled(batch)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-5)
        expected = gradients(eager, expected_loss)
        for name, gradient in gradients(compiled, loss).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-4)
        num_graphs.append(compiler["stats"]["unique_graphs"])
    assert num_graphs[0] > 0 and num_graphs[-1] == num_graphs[2], "every length is recompiled"
    assert not compiler["graph_break"]


def test_compiling_keeps_the_names_of_all_weights(tiny_vocab_checkpoint: Path) -> None:
    model = make_model(tiny_vocab_checkpoint)
    before = list(model.state_dict())
    kernels.compile_layers(model.hf, attn_implementation="sdpa")
    assert list(model.state_dict()) == before


@pytest.mark.slow
@NEEDS_COMPILER
def test_a_run_with_compiled_layers_has_the_losses_of_an_eager_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", make_bins(num_bins=4), tokenizer=fingerprint_of(tiny_checkpoint))
    settings = {"shards": shards, "model_name_or_path": tiny_checkpoint, "max_steps": 2, "save_steps": 0}
    flags = as_flags(settings)
    flags += ["--learning_rate", "1e-3", "--logging_steps", "1", "--gradient_accumulation_steps", "2"]
    for name, more in (("eager", []), ("compiled", ["--torch_compile"])):
        done = run_ranks(1, *flags, *more, "--output_dir", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert ("layers will be compiled at their first use" in done.stderr) == bool(more)
    for expected, actual in zip(read_metrics(tmp_path / "eager"), read_metrics(tmp_path / "compiled"), strict=True):
        for name in ("loss", "grad_norm"):
            assert actual[name] == pytest.approx(expected[name], rel=1e-5)


def pretend(monkeypatch: pytest.MonkeyPatch, *installed: str) -> None:
    monkeypatch.setattr(kernels, "find_spec", lambda name: ModuleSpec(name, loader=None) if name in installed else None)


@pytest.mark.parametrize(
    ("flags", "installed", "device", "stage", "message"),
    [
        ("--use_liger_kernel", "", GPU, 2, "needs the liger-kernel package: pip install liger-kernel"),
        ("--use_liger_kernel", "liger_kernel triton", CPU, 2, "--use_liger_kernel needs a GPU"),
        ("--use_liger_kernel", "liger_kernel", GPU, 2, "needs triton, which comes with CUDA builds of torch"),
        ("--torch_compile", "triton", GPU, 3, "does not work with the weights that ZeRO-3 gathers .* zero2.json"),
        ("--torch_compile", "", GPU, 2, "--torch_compile needs triton on a GPU"),
        ("--torch_compile", "", CPU, 2, "needs a C\\+\\+ compiler on a CPU, but no-such-compiler is not installed"),
    ],
)
def test_kernels_that_cannot_run_are_rejected_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, flags: str, installed: str, device: torch.device, stage: int, message: str
) -> None:
    pretend(monkeypatch, *installed.split())
    monkeypatch.setenv("CXX", "no-such-compiler")
    args = parse_arguments(["--shards", "x", *flags.split()])
    with pytest.raises(ConfigError, match=message):
        kernels.check_kernels(args, device, {"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("flags", ["", "--use_liger_kernel", "--torch_compile"])
def test_kernels_that_can_run_are_accepted(monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    pretend(monkeypatch, "liger_kernel", "triton")
    args = parse_arguments(["--shards", "x", *flags.split()])
    kernels.check_kernels(args, GPU, {"zero_optimization": {"stage": 2}})


def test_liger_and_compiled_layers_together_are_an_error() -> None:
    with pytest.raises(ConfigError, match="both replace the same kernels: give one of them"):
        parse_arguments(["--shards", "x", "--use_liger_kernel", "--torch_compile"])


LIGER_PROGRAM = """
import sys
import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling
from train.model import kernels
original = modeling.apply_rotary_pos_emb
hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(sys.argv[1])
forward = hf.forward.__func__
kernels.use_liger(hf)
patched = {name for name, module in hf.named_modules() if "liger_kernel" in module.forward.__func__.__module__}
language_model, visual = hf.model.language_model, hf.model.visual
layers = {f"model.language_model.layers.{i}" for i in range(len(language_model.layers))}
expected = {f"{layer}.{name}" for layer in layers for name in ("mlp", "input_layernorm", "post_attention_layernorm")}
expected |= {f"model.visual.blocks.{i}.{name}" for i in range(len(visual.blocks)) for name in ("norm1", "norm2")}
assert patched == expected | {"model.language_model.norm"}, patched ^ expected
assert hf.forward.__func__ is forward, "the loss is left alone"
angles = torch.rand(1, 6, 8).repeat(1, 1, 2) * 6
inputs = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16), angles.cos(), angles.sin()
assert modeling.apply_rotary_pos_emb is not original
expected = original(*(tensor.clone() for tensor in inputs))
rotated = modeling.apply_rotary_pos_emb(*(tensor.clone() for tensor in inputs))
for ours, theirs in zip(rotated, expected):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
"""


@pytest.mark.slow
def test_the_real_liger_replaces_everything_but_the_loss(tiny_vocab_checkpoint: Path) -> None:
    """In a process of its own: patches stay, and Triton's interpreter has to be chosen before it is imported."""
    command = [sys.executable, "-c", LIGER_PROGRAM, str(tiny_vocab_checkpoint)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


class Operations(TorchDispatchMode):
    """Counts operations that write memory; on a GPU each is a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_norms_and_rotary_embeddings_take_as_many_operations_as_the_training_page_says() -> None:
    page = (REPOSITORY / "docs" / "training.md").read_text()
    norm = modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm(64).bfloat16()
    states, heads = torch.ones(4, 64, dtype=torch.bfloat16), torch.ones(1, 2, 4, 16, dtype=torch.bfloat16)
    angles = torch.ones(1, 4, 16, dtype=torch.bfloat16)
    with torch.no_grad(), Operations() as of_norm:
        norm(states)
    with torch.no_grad(), Operations() as of_rotary:
        modeling_qwen2_5_vl.apply_rotary_pos_emb(heads, heads, angles, angles)
    assert f"final norm | transformers: {of_norm.count} operations" in page
    assert f"rotary embeddings of layers | transformers: {of_rotary.count} operations" in page


@NEEDS_LIGER
def test_liger_kernels_give_the_same_loss_and_gradients(monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> None:
    # The rotary function is replaced for the whole process; monkeypatch restores it.
    monkeypatch.setattr(modeling_qwen2_5_vl, "apply_rotary_pos_emb", modeling_qwen2_5_vl.apply_rotary_pos_emb)
    batch = micro_batch(*samples_of_all_kinds()).to(GPU)
    model = make_model(tiny_checkpoint, GPU)
    expected_loss = model(batch)
    expected = gradients(model, expected_loss)
    kernels.use_liger(model.hf)
    loss = model(batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients(model, loss).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-2, atol=1e-2)
