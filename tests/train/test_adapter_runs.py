"""Runs with LoRA: ranks and ZeRO stages agree, resumed runs equal uninterrupted ones, exports equal the engine.

Runs are launched in separate processes; each is made once and shared by several tests. All parts have adapters, and in
every micro-step one rank has text alone and the other media.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from schemas.errors import ConfigError
from tests.train.launching import (
    as_flags,
    assert_close_metrics,
    assert_same_run,
    fingerprint_of,
    made_once,
    read_metrics,
    read_weights,
    resume,
    run_once,
    torchrun,
)
from tests.train.synthetic import make_bins, write_shards
from train.batches.batch import build_micro_batch
from train.model.packed import PackedQwen
from train.run.plan import make_plan
from train.settings.flags import parse_arguments
from train.shards.index import open_shards
from train.shards.reader import read_checked_bin
from train.tools import merge
from train.tools.merge import check_out, merge_adapter

pytestmark = pytest.mark.slow

NUM_STEPS, RANK = 3, 4
TIMES_TWO, TIMES_FOUR = (("--gradient_accumulation_steps", count) for count in "24")
ZERO_3 = ("--deepspeed", "zero3.json")
DROPOUT = ("--lora_dropout", "0.2")

PROCESSORS = ("preprocessor_config.json", "video_preprocessor_config.json")


@pytest.fixture(scope="module")
def shards(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fingerprint = fingerprint_of(tiny_checkpoint)
    return made_once(
        tmp_path_factory, "adapters-shards", lambda out: write_shards(out, make_bins(num_bins=4), tokenizer=fingerprint)
    )


@pytest.fixture(scope="module")
def flags(shards: Path, tiny_checkpoint: Path) -> list[str]:
    settings = {
        "shards": shards,
        "eval_shards": shards,
        "model_name_or_path": tiny_checkpoint,
        "max_steps": NUM_STEPS,
        "tune_mm_vision": True,
        "lora_enable": True,
        "lora_r": RANK,
        "lora_alpha": 2 * RANK,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 1,
    }
    return as_flags(settings)


@pytest.fixture(scope="module")
def one_rank(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_once(tmp_path_factory, "adapters-one-rank", 1, *flags, *TIMES_FOUR)


@pytest.fixture(scope="module")
def zero2_with_dropout(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_once(tmp_path_factory, "adapters-dropout", 2, *flags, *TIMES_TWO, *DROPOUT)


@pytest.fixture(scope="module", params=["zero1", "zero2", "zero3", "zero3_offload"])
def two_ranks(request: pytest.FixtureRequest, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks that share the four bins of a step, in each way in turn."""
    if request.param == "zero3":
        zero3: Path = request.getfixturevalue("zero3")
        return zero3
    strategy = ("--deepspeed", f"{request.param}.json")
    return run_once(tmp_path_factory, f"adapters-{request.param}", 2, *flags, *TIMES_TWO, *strategy)


@pytest.fixture(scope="module")
def zero3(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The third of these, by torchrun: ranks that hash differently have the same adapters in the same order."""
    return run_once(tmp_path_factory, "adapters-zero3", 2, *flags, *TIMES_TWO, *ZERO_3, launcher=torchrun)


def read_adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare whole matrices: Adam takes a full step even for a gradient so small that rounding decides its sign."""
    for name, weight in expected.items():
        assert (actual[name] - weight).norm() < 5e-3 * weight.norm(), name


def mean_loss(hf: Qwen2_5_VLForConditionalGeneration, shards: Path) -> float:
    """Over all targets of the shards, without DeepSpeed or stream."""
    model = PackedQwen(hf, attn_implementation="sdpa").eval()
    index = open_shards(shards)
    batches = [build_micro_batch([read_checked_bin(index, bin_id)]) for bin_id in range(index.num_bins)]
    with torch.no_grad():
        total = sum(model(batch).item() for batch in batches)
    return total / sum(batch.targets.numel() for batch in batches)


def load(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.randint(10, 2000, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def test_training_starts_from_the_model_as_it_was(one_rank: Path, shards: Path, tiny_checkpoint: Path) -> None:
    assert read_metrics(one_rank)[0]["loss"] == pytest.approx(mean_loss(load(tiny_checkpoint), shards), rel=1e-6)


def test_ranks_and_stages_have_the_losses_and_adapters_of_one_rank(one_rank: Path, two_ranks: Path) -> None:
    assert_close_metrics(two_ranks, one_rank, "loss", "grad_norm", rel=1e-5)
    expected, actual = read_adapter(one_rank), read_adapter(two_ranks)
    assert actual.keys() == expected.keys()
    assert_close(actual, expected)
    untrained = [name for name, weight in expected.items() if ".lora_B." in name and weight.abs().max() < 1e-2]
    assert untrained == [], "nothing is compared"


def test_the_final_model_is_the_trained_one(two_ranks: Path, shards: Path) -> None:
    """Its loss is what the engine, with adapters beside the weights, had on the same bins after the last step."""
    expected = read_metrics(two_ranks)[-1]["eval_loss"]
    assert mean_loss(load(two_ranks / "final"), shards) == pytest.approx(expected, rel=1e-6)
    assert expected < read_metrics(two_ranks)[0]["loss"] - 0.1, "training changed hardly anything: nothing is compared"


def test_peft_loads_the_adapter_into_the_model_with_the_logits_of_the_final_one(
    two_ranks: Path, tiny_checkpoint: Path
) -> None:
    expected = logits(load(two_ranks / "final"))
    adapted = PeftModel.from_pretrained(load(tiny_checkpoint), str(two_ranks / "adapter"))
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(load(tiny_checkpoint))).abs().max() > 0.1


def test_final_weights_differ_from_the_base_by_matrices_of_the_rank(zero3: Path, tiny_checkpoint: Path) -> None:
    before, after = load_file(tiny_checkpoint / "model.safetensors"), read_weights(zero3)
    assert after.keys() == before.keys()
    adapted = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight").replace("model.language_model", "model")
        for name in read_adapter(zero3)
        if ".lora_A." in name
    }
    adapted = {f"{name.removeprefix('model.') if 'visual' in name else name}.weight" for name in adapted}
    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    assert changed == adapted
    for name in changed:
        values = torch.linalg.svdvals(after[name].double() - before[name].double())
        assert values[RANK] < 1e-5 * values[0] < values[0] / 10, name


def test_the_adapter_has_the_files_of_tokenizer_and_processor(zero3: Path, tiny_checkpoint: Path) -> None:
    for name in ("tokenizer.json", "chat_template.json"):
        assert (zero3 / "adapter" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    for name in PROCESSORS:
        assert (zero3 / "adapter" / name).read_bytes() == (zero3 / "final" / name).read_bytes()
    processor = json.loads((zero3 / "final" / PROCESSORS[0]).read_bytes())
    assert (processor["min_pixels"], processor["max_pixels"]) == (16 * 28 * 28, 576 * 28 * 28), "as in the manifest"


def test_checkpoints_hold_the_adapters_and_not_the_model(two_ranks: Path, tiny_checkpoint: Path) -> None:
    size = sum(path.stat().st_size for path in (two_ranks / "checkpoint-3").rglob("*") if path.is_file())
    assert size < (tiny_checkpoint / "model.safetensors").stat().st_size / 20


@pytest.mark.parametrize(("before", "ways"), [("zero2_with_dropout", DROPOUT), ("zero3", ZERO_3)])
def test_a_resumed_run_equals_the_uninterrupted_run_to_the_bit(
    flags: list[str], request: pytest.FixtureRequest, tmp_path: Path, before: str, ways: tuple[str, str]
) -> None:
    uninterrupted: Path = request.getfixturevalue(before)
    resume(uninterrupted, tmp_path, 2, *flags, *TIMES_TWO, *ways)
    assert_same_run(tmp_path, uninterrupted)
    expected, actual = read_adapter(uninterrupted), read_adapter(tmp_path)
    assert [name for name, weight in expected.items() if not torch.equal(actual[name], weight)] == []


def test_dropout_differs_on_every_rank_and_in_every_step_and_is_off_in_evaluation(
    zero2_with_dropout: Path, one_rank: Path, shards: Path
) -> None:
    with_dropout, without = read_metrics(zero2_with_dropout), read_metrics(one_rank)
    assert with_dropout[0]["loss"] == pytest.approx(without[0]["loss"], rel=1e-6), "B is zero in the first step"
    assert with_dropout[1]["loss"] != pytest.approx(without[1]["loss"], rel=1e-4)
    final = load(zero2_with_dropout / "final")
    assert mean_loss(final, shards) == pytest.approx(with_dropout[-1]["eval_loss"], rel=1e-6)
    states = [
        torch.load(zero2_with_dropout / f"checkpoint-{step}" / f"random-{rank:05d}.pt")["cpu"].numpy().tobytes()
        for step in (1, 2)
        for rank in (0, 1)
    ]
    assert len(set(states)) == 4


@pytest.mark.parametrize(("before", "num_ranks"), [("one_rank", 2), ("zero3", 1)])
def test_another_number_of_ranks_resumes_with_the_same_losses_and_adapters(
    flags: list[str], request: pytest.FixtureRequest, tmp_path: Path, before: str, num_ranks: int
) -> None:
    run: Path = request.getfixturevalue(before)
    stage = ZERO_3 if before == "zero3" else ()
    resume(run, tmp_path, num_ranks, *flags, *stage, *(TIMES_FOUR if num_ranks == 1 else TIMES_TWO))
    assert_close_metrics(tmp_path, run, "loss", "grad_norm", "eval_loss", rel=1e-5)
    assert_close(read_adapter(tmp_path), read_adapter(run))


@pytest.mark.parametrize(
    ("change", "name"),
    [(("--lora_alpha", "16"), "adapters = r 4, alpha 8"), (("--lora_enable", "False"), "adapters = r 4, alpha 8")],
)
def test_resuming_with_other_adapters_is_refused(
    flags: list[str], zero3: Path, change: tuple[str, str], name: str
) -> None:
    if "--lora_enable" in change:
        position = flags.index("--lora_enable")
        flags = [*flags[:position], *flags[position + 6 :]]
    with pytest.raises(ConfigError, match=f"was saved with {name}"):
        make_plan(parse_arguments([*flags, *TIMES_FOUR, *ZERO_3, *change, "--output_dir", str(zero3)]))


def test_resuming_beside_other_frozen_weights_is_refused(
    flags: list[str], zero3: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    weights = {name: -weight for name, weight in load_file(other / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    flags = [*flags, *TIMES_FOUR, *ZERO_3, "--model_name_or_path", str(other), "--output_dir", str(zero3)]
    with pytest.raises(ConfigError, match="was saved with frozen weights = "):
        make_plan(parse_arguments(flags))


def test_merging_an_adapter_gives_the_final_model_to_the_bit(
    zero3: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    done = CliRunner().invoke(merge.main, [str(zero3 / "adapter"), "--out", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    expected, actual = read_weights(zero3), load_file(tmp_path / "merged" / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert [name for name, weight in expected.items() if not torch.equal(actual[name], weight)] == []
    names = {path.name for path in (zero3 / "final").iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} == names
    for name in PROCESSORS:
        assert (tmp_path / "merged" / name).read_bytes() == (zero3 / "final" / name).read_bytes()


def test_an_adapter_is_not_merged_into_another_model(zero3: Path, tiny_vocab_checkpoint: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(zero3 / "adapter", tmp_path / "adapter"))
    weights = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in weights if ".lora_B." in name)
    save_file({**weights, name: torch.zeros(7, RANK)}, adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="does not match a layer of this model"):
        merge_adapter(adapter, tmp_path / "out")
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ConfigError, match="has use_dora True, so it is not a plain LoRA adapter"):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="Pass the folder of an adapter"):
        merge_adapter(tiny_vocab_checkpoint, tmp_path / "out")


def test_merging_replaces_an_earlier_model_and_nothing_else(tmp_path: Path) -> None:
    """Least of all the run that the adapter is of, with its checkpoints."""
    run, source = tmp_path / "run", tmp_path / "model"
    adapter, other, file = run / "adapter", tmp_path / "other", tmp_path / "file"
    for folder in (adapter, source, run / "checkpoint-2", run / "final", other, tmp_path / "empty"):
        folder.mkdir(parents=True)
    for path in (run / "final" / "config.json", source / "config.json", other / "thesis.tex", file):
        path.write_bytes(b"")
    for out in (run, adapter, source, tmp_path, run / "final" / ".." / ".." / "run"):
        with pytest.raises(ConfigError, match="would overwrite an input of the merge"):
            check_out(out, adapter, source)
    for out in (run / "checkpoint-2" / "..", other, file):
        with pytest.raises(
            ConfigError, match=r"would overwrite an input of the merge|holds no model, so it is not overwritten"
        ):
            check_out(out, adapter, source)
    for out in (run / "final", tmp_path / "empty", tmp_path / "new"):
        check_out(out, adapter, source)
