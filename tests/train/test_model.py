"""Packing never leaks, all bins make the same calls, and the loss equals that of the Hugging Face model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLTextModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from demo.tiny_model import tiny_config
from schemas.bins import Bin
from schemas.errors import ConfigError, VlprepError
from schemas.qwen import IMAGE_PAD, VIDEO_PAD
from tests.train.synthetic import Sample, make_medium, make_sample
from tests.train.varlen_on_cpu import attend_in_parts
from train.batches.batch import MicroBatch, build_micro_batch
from train.model import attention, optim
from train.model.attention import BY_SAMPLE, FLASH_ATTENTION, SDPA, VARLEN, attend_by_sample
from train.model.packed import NO_MASK, PackedQwen, checkpoint_activations
from train.model.pixels import pixel_values

EVERYTHING = {optim.LANGUAGE_MODEL: 1e-3, optim.MERGER: 1e-3, optim.VISION_TOWER: 1e-3}


def micro_batch(*samples: Sample) -> MicroBatch:
    """Pack samples into one bin and build its micro-batch."""
    media = [medium for sample in samples for medium in sample.media]
    planes = [medium.frames.ravel() for medium in media]
    packed = Bin(
        index=0,
        input_ids=np.concatenate([sample.input_ids for sample in samples]),
        labels=np.concatenate([sample.labels for sample in samples]),
        position_ids=np.concatenate([sample.position_ids for sample in samples], axis=1),
        cu_seqlens=np.cumsum([0, *(len(sample.input_ids) for sample in samples)]).astype(np.int32),
        grid_thw=np.array([medium.grid for medium in media], dtype=np.int32).reshape(-1, 3),
        media_type=np.array([medium.is_video for medium in media], dtype=np.uint8),
        pixels=np.concatenate(planes) if planes else np.empty(0, dtype=np.uint8),
        codec="raw",
        samples_json=b"[]",
    )
    return build_micro_batch([packed])


def samples_of_all_kinds(seed: int = 0) -> list[Sample]:
    """An image, text only, a video between images, and text only."""
    rng = np.random.default_rng(seed)
    return [
        make_sample(rng, [make_medium(rng, 10, 12)], num_targets=6),
        make_sample(rng, num_text=20, num_targets=9),
        make_sample(
            rng, [make_medium(rng, 4, 2), make_medium(rng, 6, 10, steps=2), make_medium(rng, 2, 2)], num_targets=3
        ),
        make_sample(rng, num_text=5, num_targets=2),
    ]


@pytest.fixture
def hf(demo_checkpoint: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(demo_checkpoint, dtype=torch.float32)


@pytest.fixture
def model(hf: Qwen2_5_VLForConditionalGeneration) -> PackedQwen:
    """A model with all parts trained."""
    packed = PackedQwen(hf, attn_implementation="sdpa")
    optim.group_parameters(packed, EVERYTHING)
    return packed.train()


@contextmanager
def counted_calls(**modules: nn.Module) -> Iterator[Counter[str]]:
    """Count the calls of modules."""
    calls: Counter[str] = Counter()

    def count(name: str) -> Any:
        return lambda module, inputs: calls.update([name])

    handles = [module.register_forward_pre_hook(count(name)) for name, module in modules.items()]
    yield calls
    for handle in handles:
        handle.remove()


def gradients(model: PackedQwen, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the gradient of every trained parameter; fail if one is missing."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = [name for name, parameter in trained.items() if parameter.grad is None]
    assert trained and not missing
    return {name: parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3, f"the gradient of {name} is too small to compare"
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def loss_of_each_sample(model: PackedQwen, batch: MicroBatch) -> list[torch.Tensor]:
    with torch.no_grad():
        states = model.target_states(batch)
        owner = torch.searchsorted(batch.cu_seqlens, batch.target_positions.int(), right=True) - 1
        return [
            model.hf.lm_head(states[owner == index], batch.targets[owner == index])
            for index in range(batch.cu_seqlens.numel() - 1)
        ]


def test_a_packed_bin_has_the_loss_and_gradients_of_its_samples_run_one_by_one(model: PackedQwen) -> None:
    samples = samples_of_all_kinds()
    num_targets = sum(int((sample.labels != -100).sum()) for sample in samples)
    packed_loss = model(micro_batch(*samples)) / num_targets
    packed = gradients(model, packed_loss)
    separate_loss = torch.stack([model(micro_batch(sample)) for sample in samples]).sum() / num_targets
    separate = gradients(model, separate_loss)
    torch.testing.assert_close(packed_loss, separate_loss, rtol=1e-5, atol=1e-5)
    assert_same(packed, separate)


def test_the_comparison_of_packed_and_separate_samples_would_notice_a_leak(model: PackedQwen) -> None:
    """If a bin is treated as one long sample, each sample attends to those before it."""
    samples = samples_of_all_kinds()
    batch = micro_batch(*samples)
    with torch.no_grad():
        separate = sum(model(micro_batch(sample)) for sample in samples)
        assert abs(model(batch) - separate) / separate < 1e-5
        assert abs(model(replace(batch, lengths=(batch.num_tokens,))) - separate) / separate > 1e-3


@pytest.mark.parametrize("has_grouped_kernel", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_by_sample_equals_masked_attention_of_transformers(
    heads: int, has_grouped_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers infers packed samples from restarting positions. Heads may share keys and values."""
    monkeypatch.setattr(attention, "has_grouped_kernel", lambda query: has_grouped_kernel)
    torch.manual_seed(0)
    config = tiny_config(64).text_config
    config.num_key_value_heads = heads
    layers = Qwen2_5_VLTextModel(config).train()
    lengths = (5, 1, 9, 2)
    embeddings = torch.randn(1, sum(lengths), config.hidden_size)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(4, 1, -1)
    results = {}
    for implementation, isolation in (
        (SDPA, {"position_ids": positions}),
        ("eager", {"position_ids": positions}),
        (BY_SAMPLE, {"position_ids": positions[1:], "attention_mask": NO_MASK, "lengths": lengths}),
    ):
        layers.set_attn_implementation(implementation)
        states = embeddings.clone().requires_grad_()
        output = layers(inputs_embeds=states, use_cache=False, **isolation).last_hidden_state
        output.square().mean().backward()
        assert states.grad is not None
        results[implementation] = output.detach(), states.grad
    for result in results.values():
        torch.testing.assert_close(result, results["eager"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "expected"),
    [
        ("cpu", torch.float32, None, True),
        ("cuda", torch.bfloat16, (8, 0), True),
        ("cuda", torch.float16, (9, 0), True),
        ("cuda", torch.float16, (7, 5), False),
        ("cuda", torch.float32, (9, 0), False),
    ],
)
def test_keys_and_values_are_repeated_if_torch_would_fall_back_to_its_slow_kernel(
    device: str, dtype: torch.dtype, capability: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expected values: torch's documentation of kernels with ``enable_gqa``. The query is a stand-in for a tensor."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query: Any = SimpleNamespace(is_cuda=device == "cuda", dtype=dtype, device=torch.device(device))
    assert attention.has_grouped_kernel(query) == expected


def test_missing_sample_lengths_raise_instead_of_leaking(hf: Qwen2_5_VLForConditionalGeneration) -> None:
    ids = torch.arange(10, 16)[None]
    layers = PackedQwen(hf, attn_implementation="sdpa").hf.model.language_model
    with pytest.raises(TypeError, match="lengths"):
        layers(input_ids=ids, position_ids=torch.arange(6).expand(3, 1, -1), attention_mask=NO_MASK, use_cache=False)


def test_attention_that_transformers_does_not_accept_is_an_error(
    hf: Qwen2_5_VLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf.model.language_model, "set_attn_implementation", lambda name: None)
    with pytest.raises(VlprepError, match="did not accept the attention that isolates packed samples"):
        PackedQwen(hf, attn_implementation="sdpa")


def test_varlen_attention_refuses_a_model_with_dropout(
    hf: Qwen2_5_VLForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf.model.language_model.config, "attention_dropout", 0.1)
    with pytest.raises(ConfigError, match=r"attention_dropout 0\.1, which varlen attention does not have: use .* sdpa"):
        PackedQwen(hf, attn_implementation=VARLEN)


def test_attention_by_sample_applies_dropout() -> None:
    """Values are one-hot, so the output of the last token of a sample is its weights, which are all equal."""
    torch.manual_seed(0)
    lengths, dropout = (400, 200), 0.25
    states = torch.zeros(1, 1, sum(lengths), max(lengths))
    values = torch.cat([torch.eye(max(lengths))[:length] for length in lengths])[None, None]
    attended, _ = attend_by_sample(nn.Identity(), states, states, values, None, lengths=lengths, dropout=dropout)
    for last, length in zip((399, 599), lengths):
        weights = attended[0, last, 0, :length]
        nonzero = weights[weights != 0]
        torch.testing.assert_close(nonzero, torch.full_like(nonzero, 1 / length / (1 - dropout)))
        # Within three standard deviations of a binomial proportion.
        deviation = math.sqrt(dropout * (1 - dropout) / length)
        assert 1 - len(nonzero) / length == pytest.approx(dropout, abs=3 * deviation)


@pytest.mark.parametrize("changed", range(4))
def test_changing_one_sample_leaves_the_losses_of_the_others_bitwise_unchanged(model: PackedQwen, changed: int) -> None:
    samples = samples_of_all_kinds(seed=0)
    before = loss_of_each_sample(model, micro_batch(*samples))
    samples[changed] = samples_of_all_kinds(seed=1)[changed]
    after = loss_of_each_sample(model, micro_batch(*samples))
    assert [torch.equal(old, new) for old, new in zip(before, after)] == [index != changed for index in range(4)]


@pytest.mark.parametrize("kind", range(4))
def test_logits_at_targets_equal_those_of_the_hugging_face_model(
    hf: Qwen2_5_VLForConditionalGeneration, demo_checkpoint: Path, kind: int
) -> None:
    sample = samples_of_all_kinds()[kind]
    batch = micro_batch(sample)
    inputs: dict[str, torch.Tensor] = {}
    rows = (
        pixel_values(batch.vision).split([medium.grid.num_patches for medium in sample.media]) if sample.media else ()
    )
    for is_video, pixels, grids in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [(values, medium.grid) for values, medium in zip(rows, sample.media) if medium.is_video == is_video]
        if chosen:
            inputs[pixels] = torch.cat([values for values, _ in chosen])
            inputs[grids] = torch.tensor([grid for _, grid in chosen])
    with torch.no_grad():
        expected = hf(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **inputs).logits
        packed = PackedQwen(hf, attn_implementation="sdpa")
        logits = packed.hf.lm_head(packed.target_states(batch))
    assert logits.shape == (int((sample.labels != -100).sum()), 151936)
    torch.testing.assert_close(logits, expected[0, batch.target_positions], rtol=1e-5, atol=1e-5)


def test_the_head_stays_tied_to_the_embeddings(model: PackedQwen) -> None:
    assert model.hf.lm_head.weight is model.hf.model.language_model.embed_tokens.weight


def test_every_bin_makes_the_same_calls_whatever_its_contents(model: PackedQwen) -> None:
    """One call of the vision tower and one of lm_head; otherwise ranks would deadlock under ZeRO-3."""
    rng = np.random.default_rng(0)
    image, video = make_medium(rng, 4, 4), make_medium(rng, 4, 4, steps=2)
    bins = [
        micro_batch(make_sample(rng)),
        micro_batch(make_sample(rng, [image])),
        micro_batch(make_sample(rng, [video])),
        micro_batch(make_sample(rng, [image, video]), make_sample(rng)),
        micro_batch(make_sample(rng, num_targets=0)),
        build_micro_batch([]),
    ]
    for batch in bins:
        with counted_calls(
            vision=model.hf.model.visual, text=model.hf.model.language_model, head=model.hf.lm_head
        ) as calls:
            model(batch)
        assert calls == {"vision": 1, "text": 1, "head": 1}


@pytest.mark.parametrize("empty", [False, True], ids=["a bin without targets", "an empty position of the order"])
def test_without_targets_the_loss_is_zero_and_every_trained_parameter_gets_a_zero_gradient(
    model: PackedQwen, empty: bool
) -> None:
    rng = np.random.default_rng(0)
    batch = build_micro_batch([]) if empty else micro_batch(make_sample(rng, [make_medium(rng)], num_targets=0))
    loss = model(batch)
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())


def test_without_media_the_gradients_of_the_vision_tower_are_zero_not_none(model: PackedQwen) -> None:
    grads = gradients(model, model(micro_batch(make_sample(np.random.default_rng(0)))))
    assert all(gradient.any() != name.startswith("hf.model.visual.") for name, gradient in grads.items())


def test_recomputed_activations_give_the_same_loss_and_gradients(model: PackedQwen) -> None:
    batch = micro_batch(*samples_of_all_kinds())
    expected_loss = model(batch)
    expected = gradients(model, expected_loss)
    checkpoint_activations(model)
    with counted_calls(
        layer=model.hf.model.language_model.layers[0].mlp, block=model.hf.model.visual.blocks[0].mlp
    ) as calls:
        loss = model(batch)
        recomputed = gradients(model, loss)
    assert calls == {"layer": 2, "block": 2}, "nothing was recomputed"
    assert torch.equal(loss, expected_loss)
    assert_same(recomputed, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pixels_are_created_in_the_dtype_of_the_vision_tower(model: PackedQwen, dtype: torch.dtype) -> None:
    """Creating them in float32 first would take three times the memory of bfloat16."""
    model.to(dtype)
    dtypes: list[torch.dtype] = []
    model.hf.model.visual.register_forward_pre_hook(lambda module, inputs: dtypes.append(inputs[0].dtype))
    model.vision_features(micro_batch(*samples_of_all_kinds()).vision)
    assert dtypes == [dtype]


def test_recomputing_runs_no_backward_pass_inside_the_backward_pass(model: PackedQwen) -> None:
    """Reentrant checkpointing does, in every layer, and ZeRO-2 then sees gradients twice."""
    checkpoint_activations(model)
    nodes, stack = set(), [model(micro_batch(*samples_of_all_kinds())).grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack += [next_node for next_node, _ in node.next_functions]
    names = {node.name() for node in nodes}
    assert "AccumulateGrad" in {name.rpartition("::")[2] for name in names}
    assert not any("CheckpointFunction" in name for name in names)


@pytest.mark.parametrize("merger", [False, True], ids=["frozen merger", "trained merger"])
def test_a_frozen_vision_tower_stores_no_activations(model: PackedQwen, merger: bool) -> None:
    optim.group_parameters(model, {**EVERYTHING, optim.VISION_TOWER: None, optim.MERGER: 1e-3 if merger else None})
    checkpoint_activations(model)
    recorded: list[bool] = []
    last = model.hf.model.visual.blocks[-1]
    last.register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    features = model.vision_features(micro_batch(*samples_of_all_kinds()).vision)
    assert recorded == [False]
    assert features.requires_grad == merger


def attend_between_boundaries(calls: list[tuple[int, int]]) -> Any:
    """A stand-in for flash attention that attends between the given boundaries only, and records each call."""

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        assert attention_mask is None
        boundaries, is_causal = options["cu_seq_lens_q"], options.get("is_causal", True)
        assert torch.equal(options["cu_seq_lens_k"], boundaries)
        assert boundaries.dtype == torch.int32
        lengths = boundaries.diff().tolist()
        assert options["max_length_q"] == options["max_length_k"] == max(lengths)
        assert isinstance(options["max_length_q"], int)
        calls.append((query.shape[2], len(lengths)))
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
        outputs = [
            functional.scaled_dot_product_attention(
                *part, is_causal=is_causal, scale=options["scaling"], enable_gqa=True
            )
            for part in parts
        ]
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    return attention


def test_flash_attention_gets_the_boundaries_of_samples_and_media(
    model: PackedQwen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With attention between these boundaries only, the loss equals that of SDPA by sample."""
    batch = micro_batch(*samples_of_all_kinds())
    calls: list[tuple[int, int]] = []
    with torch.no_grad():
        expected = model(batch)
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, FLASH_ATTENTION, attend_between_boundaries(calls))
        for config in (model.hf.model.language_model.config, model.hf.model.visual.config):
            monkeypatch.setattr(config, "_attn_implementation_internal", FLASH_ATTENTION)
        model.uses_sdpa = False
        loss = model(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    vision = batch.vision
    assert set(calls) == {
        (batch.num_tokens, 4),
        (vision.num_patches, vision.cu_seqlens.numel() - 1),
        (vision.num_patches, vision.cu_window_seqlens.numel() - 1),
    }


def noting_attention(calls: list[tuple[int, int]]) -> Any:
    """SDPA part by part, which checks and notes how the variable-length kernel is called."""

    def attend(*arguments: Any, window_size: tuple[int, int], **options: Any) -> torch.Tensor:
        query, _, _, cu_seq_q, cu_seq_k, max_q, max_k = arguments
        assert cu_seq_q is cu_seq_k and cu_seq_q.dtype == torch.int32
        lengths = cu_seq_q.diff().tolist()
        assert type(max_q) is int and max_q == max_k == max(lengths)
        assert window_size in ((-1, 0), (-1, -1))
        calls.append((query.shape[0], len(lengths)))
        return attend_in_parts(*arguments, window_size=window_size, **options)

    return attend


def test_varlen_attention_has_the_loss_and_gradients_of_sdpa_by_sample(
    demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = micro_batch(*samples_of_all_kinds())
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(attention, "varlen_attn", noting_attention(calls))
    results = []
    for name in (SDPA, VARLEN):
        hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(demo_checkpoint)
        model = PackedQwen(hf, attn_implementation=name).train()
        loss = model(batch)
        loss.backward()
        results.append((loss.detach(), {key: weight.grad for key, weight in model.named_parameters()}))
    (loss, gradients), (varlen_loss, varlen_gradients) = results
    assert torch.equal(varlen_loss, loss)
    assert gradients.keys() == varlen_gradients.keys()
    for key, gradient in gradients.items():
        assert torch.equal(gradient, varlen_gradients[key]), key
    vision = batch.vision
    assert set(calls) == {
        (batch.num_tokens, 4),
        (vision.num_patches, vision.cu_seqlens.numel() - 1),
        (vision.num_patches, vision.cu_window_seqlens.numel() - 1),
    }


def test_the_patch_embedding_is_the_convolution_of_the_same_weight(demo_checkpoint: Path) -> None:
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(demo_checkpoint)
    keys = list(hf.state_dict())
    patches = torch.randn(64, 3 * 2 * 14 * 14)
    expected = hf.model.visual.patch_embed(patches)
    weight = hf.model.visual.patch_embed.proj.weight
    model = PackedQwen(hf, attn_implementation=SDPA)
    assert model.hf.model.visual.patch_embed.proj.weight is weight
    assert list(hf.state_dict()) == keys
    torch.testing.assert_close(model.hf.model.visual.patch_embed(patches), expected, rtol=1e-5, atol=1e-5)


def test_features_are_scattered_like_masked_scatter_to_the_bit(model: PackedQwen) -> None:
    """Forward and backward; the row of a dummy image gets a gradient of zero."""
    batch = micro_batch(*samples_of_all_kinds())
    is_pad = (batch.input_ids == IMAGE_PAD) | (batch.input_ids == VIDEO_PAD)
    size = 8
    embeddings = torch.randn(1, batch.input_ids.shape[1], size, requires_grad=True)
    features = torch.randn(int(is_pad.sum()) + 1, size, requires_grad=True)
    expected = embeddings.masked_scatter(is_pad[..., None], features)
    result = embeddings[0].index_put((batch.media_positions,), features[: batch.media_positions.numel()])[None]
    assert torch.equal(result, expected)
    weights = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(result, (embeddings, features), weights),
        torch.autograd.grad(expected, (embeddings, features), weights),
    ):
        assert torch.equal(ours, theirs)


def saved_shapes(compute: Any) -> list[tuple[int, ...]]:
    """Return the shapes of the tensors that a computation saves for the backward pass."""
    shapes: list[tuple[int, ...]] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        compute()
    return shapes


def test_no_tensor_of_a_frozen_vision_tower_is_saved_for_the_backward_pass(model: PackedQwen) -> None:
    vision = micro_batch(*samples_of_all_kinds()).vision
    visual = model.hf.model.visual
    assert len(saved_shapes(lambda: model.vision_features(vision))) > 100

    optim.group_parameters(model, {**EVERYTHING, optim.VISION_TOWER: None})
    states = torch.zeros(vision.num_patches, visual.config.hidden_size)
    of_merger = saved_shapes(lambda: visual.merger(states))
    order_of_rows = tuple(vision.window_index.shape)
    assert saved_shapes(lambda: model.vision_features(vision)) == [*of_merger, order_of_rows]

    optim.group_parameters(model, {**EVERYTHING, optim.VISION_TOWER: None, optim.MERGER: None})
    assert saved_shapes(lambda: model.vision_features(vision)) == []
