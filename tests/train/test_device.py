"""Precision and attention of a run: the flags, the DeepSpeed file and the hardware agree on them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from schemas.errors import ConfigError
from train.run import device as device_module
from train.run.device import choose_attention, choose_dtype
from train.settings.arguments import TrainArguments
from train.settings.flags import parse_arguments

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def arguments(*flags: str) -> TrainArguments:
    return parse_arguments(["--shards", "shards/", *flags])


@pytest.fixture
def half_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed asks torch, whose answer depends on the processor."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU that some tests name is not asked what it can do."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("flags", "in_file", "expected"),
    [
        ("", {}, FP32),
        ("", {"bf16": "auto", "fp16": "auto"}, FP32),
        ("--bf16", {"bf16": "auto"}, BF16),
        ("", {"bf16": True}, BF16),
        ("--bf16 False", {"bf16": False}, FP32),
        ("--fp16", {}, FP16),
        ("--fp16", {"bf16": "auto", "fp16": "auto"}, FP16),
        ("--fp16", {"bf16": False, "fp16": True}, FP16),
        ("", {"fp16": True}, FP16),
        ("--fp16 False", {"fp16": "auto"}, FP32),
        ("--fp16 False", {"bf16": "auto", "fp16": False}, FP32),
        ("--fp16 False", {"bf16": True, "fp16": "auto"}, BF16),
        ("--fp16 False --bf16", {}, BF16),
        ("--bf16 False", {"fp16": True}, FP16),
    ],
)
def test_the_flag_decides_the_precision_then_the_file_then_the_device(
    half_is_supported: None, flags: str, in_file: dict[str, object], expected: torch.dtype
) -> None:
    config = {name: {"enabled": value} for name, value in in_file.items()}
    assert choose_dtype(arguments(*flags.split()), config, CPU) == expected


@pytest.mark.parametrize(
    ("flags", "in_file", "message"),
    [
        ("--bf16", {"bf16": False}, "bf16.enabled = False, but --bf16 is True"),
        ("--fp16", {"fp16": False}, "fp16.enabled = False, but --fp16 is True"),
        ("--fp16 False", {"fp16": True}, "fp16.enabled = True, but --fp16 is False"),
        ("--fp16 False --bf16", {"fp16": True}, "fp16.enabled = True, but --fp16 is False"),
        ("--fp16", {"bf16": True}, "enable both bf16 and fp16"),
        ("--bf16", {"fp16": True}, "enable both bf16 and fp16"),
        ("", {"bf16": True, "fp16": True}, "enable both bf16 and fp16"),
    ],
)
def test_a_precision_that_flags_and_file_disagree_on_is_an_error(
    half_is_supported: None, flags: str, in_file: dict[str, object], message: str
) -> None:
    config = {name: {"enabled": value} for name, value in in_file.items()}
    with pytest.raises(ConfigError, match=message):
        choose_dtype(arguments(*flags.split()), config, CPU)


def test_float16_on_a_device_without_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match="cpu does not support float16: drop --fp16"):
        choose_dtype(arguments("--fp16"), {}, CPU)


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "expected"),
    [
        (GPU, BF16, True, "flash_attention_2"),
        (GPU, FP16, True, "flash_attention_2"),
        (GPU, BF16, False, "varlen"),
        (GPU, FP32, True, "sdpa"),
        (CPU, BF16, True, "sdpa"),
    ],
)
def test_flash_attention_is_the_default_where_it_can_run(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype, installed: bool, expected: str
) -> None:
    pretend_flash_attn(monkeypatch, installed)
    assert choose_attention(arguments(), device, dtype) == expected
    assert choose_attention(arguments("--attn_implementation", "sdpa"), device, dtype) == "sdpa"


@pytest.mark.parametrize(
    ("device", "installed", "message"),
    [(CPU, True, "needs a GPU and bfloat16 or float16"), (GPU, False, "pip install flash-attn --no-build-isolation")],
)
def test_requesting_flash_attention_where_it_cannot_run_is_an_error(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, installed: bool, message: str
) -> None:
    pretend_flash_attn(monkeypatch, installed)
    with pytest.raises(ConfigError, match=message):
        choose_attention(arguments("--attn_implementation", "flash_attention_2"), device, BF16)


@pytest.mark.parametrize("name", ["varlen", "flash_attention_2", "flash_attention_3"])
def test_half_precision_on_a_gpu_is_what_every_fused_attention_needs(name: str) -> None:
    for device, dtype in ((CPU, BF16), (GPU, FP32)):
        with pytest.raises(ConfigError, match="needs a GPU and bfloat16 or float16"):
            choose_attention(arguments("--attn_implementation", name), device, dtype)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_gpu_older_than_ampere_runs_sdpa_only(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    pretend_flash_attn(monkeypatch, True)
    assert choose_attention(arguments(), GPU, dtype) == "sdpa"
    for name in ("varlen", "flash_attention_2"):
        with pytest.raises(ConfigError, match=rf"{name} needs a GPU since Ampere .* use sdpa here"):
            choose_attention(arguments("--attn_implementation", name), GPU, dtype)


def test_varlen_attention_needs_no_package() -> None:
    assert choose_attention(arguments("--attn_implementation", "varlen"), GPU, BF16) == "varlen"


def test_flash_attn_4_alone_is_not_flash_attn_2(monkeypatch: pytest.MonkeyPatch) -> None:
    """It provides a module named ``flash_attn`` without what version 2 has; transformers' own check knows."""
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert choose_attention(arguments(), GPU, BF16) == "varlen"
    with pytest.raises(ConfigError, match="flash-attn is not installed"):
        choose_attention(arguments("--attn_implementation", "flash_attention_2"), GPU, BF16)


@pytest.mark.parametrize(("name", "module"), [(2, "flash_attn"), (3, "flash_attn_interface")])
def test_a_flash_attn_that_cannot_be_imported_is_reported_with_its_error(
    monkeypatch: pytest.MonkeyPatch, name: int, module: str
) -> None:
    monkeypatch.setattr(device_module, f"is_flash_attn_{name}_available", lambda: True)
    monkeypatch.setitem(sys.modules, module, None)
    assert choose_attention(arguments(), GPU, BF16) == "varlen"
    with pytest.raises(ConfigError, match=r"cannot be imported \(ModuleNotFoundError"):
        choose_attention(arguments("--attn_implementation", f"flash_attention_{name}"), GPU, BF16)


def test_flash_attn_3_is_chosen_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_flash_attn(monkeypatch, False)
    monkeypatch.setattr(device_module, "is_flash_attn_3_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    assert choose_attention(arguments(), GPU, BF16) == "varlen"
    assert choose_attention(arguments("--attn_implementation", "flash_attention_3"), GPU, BF16) == "flash_attention_3"


def pretend_flash_attn(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.setattr(device_module, "is_flash_attn_2_available", lambda: installed)
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))


@pytest.fixture
def restored_tf32() -> Iterator[None]:
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    yield
    for backend, value in zip(backends, before):
        backend.allow_tf32 = value


@pytest.mark.usefixtures("restored_tf32")
@pytest.mark.parametrize("switch", [True, False])
def test_tf32_is_as_the_flag_says(switch: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not switch
    device_module.set_tf32(arguments())
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is not switch
    device_module.set_tf32(arguments("--tf32", str(switch)))
    assert torch.backends.cuda.matmul.allow_tf32 is torch.backends.cudnn.allow_tf32 is switch
