"""The flags of each trainer that :mod:`prep.migrate` knows: the upstream framework with those of transformers, ms-swift
and LLaMA-Factory, as their documentation has them; and the defaults that differ from ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prep.migrate.rules import (
    NoEffect,
    NotHere,
    Rule,
    at_least,
    built,
    comma_list,
    deepspeed_file,
    from_tables,
    impossible,
    interval_of_fps,
    negated,
    number,
    one_of,
    reporter,
    switch,
    trained,
    unless,
    unneeded,
    unneeded_with,
)
from schemas.foreign_flags import NO_EFFECT, NO_EFFECT_WITH

_NUMBERS = {
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "learning_rate",
    "lora_alpha",
    "lora_dropout",
    "max_grad_norm",
    "mm_projector_lr",
    "num_train_epochs",
    "vision_tower_lr",
    "warmup_ratio",
    "weight_decay",
}
"""Flags of the trainer whose values are numbers in every tool."""

DATASETS = "datasets"
"""Stands for the argument of ``vlprep build``."""

TRAINER_SWITCHES = (
    "bf16",
    "debug",
    "dry_run",
    "fp16",
    "gradient_checkpointing",
    "lora_enable",
    "save_in_background",
    "tf32",
    "torch_compile",
    "tune_mm_llm",
    "tune_mm_mlp",
    "tune_mm_vision",
    "use_liger_kernel",
    "verbose",
)
TRAINER_VALUES = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "attn_implementation",
    "cache_bytes",
    "cache_dir",
    "dataloader_num_workers",
    "dataloader_prefetch_factor",
    "deepspeed",
    "eval_shards",
    "eval_steps",
    "eval_strategy",
    "gradient_accumulation_steps",
    "group_steps",
    "learning_rate",
    "local_rank",
    "logging_dir",
    "logging_steps",
    "lora_alpha",
    "lora_dropout",
    "lora_r",
    "lora_target_modules",
    "lr_scheduler_type",
    "max_grad_norm",
    "max_skipped_steps",
    "max_steps",
    "max_tokens_per_forward",
    "mm_projector_lr",
    "model_name_or_path",
    "num_train_epochs",
    "optim",
    "output_dir",
    "peak_tflops",
    "per_device_train_batch_size",
    "read_connections",
    "read_timeout_s",
    "rendezvous_timeout_s",
    "report_to",
    "resume",
    "run_name",
    "samples_per_step",
    "save_steps",
    "save_total_limit",
    "seed",
    "shards",
    "verify",
    "vision_tower_lr",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
)
"""All flags of ``train/main.py``; a test compares them with its declarations."""

_EVALUATION = "build a second set of shards from it and give --eval_shards DIR --eval_strategy steps"
_SHARDS = "shards are built once"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A trainer that scripts come from.

    Attributes:
        name: of the trainer.
        rules: by the name of the flag, with underscores.
        defaults: values of flags that apply there if a script leaves them out, and that differ from ours.
    """

    name: str
    rules: dict[str, Rule]
    defaults: dict[str, str]


def _save_strategy(value: str) -> str:
    if value == "no":
        return "0"
    raise NoEffect("--save_steps says how often to save") if value == "steps" else NotHere("give --save_steps")


def _save_steps(value: str) -> str:
    if re.fullmatch(r"0?\.\d+", value):
        return value
    return _steps(value)


def _steps(value: str) -> str:
    if value.isdigit() or "$" in value:
        return value
    raise NotHere("give a number")


def _dtype(value: str) -> str:
    if value in ("float16", "auto"):
        raise NotHere("give --fp16 True") if value == "float16" else NoEffect("the precision follows the accelerator")
    return {"bfloat16": "True", "float32": "False"}[value] if value in ("bfloat16", "float32") else value


def _overlong(value: str) -> str:
    if value == "delete":
        return "reject"
    raise NotHere("longer samples are rejected, or shrunk with --overlong shrink; answers are never cut")


def _tuner(value: str) -> str:
    if value not in ("lora", "full"):
        raise NotHere("allowed here: lora (--lora_enable), full")
    return str(value == "lora")


def _layers(value: str) -> str:
    if value in ("all", "all-linear"):
        raise NoEffect("all linear layers are the default")
    return comma_list(value)


_EVALUATE = trained("eval_strategy", unless({"no"}, "no evaluation is the default", one_of("steps", "epoch")))
_PRECISION = trained("bf16", _dtype)
_RESUME = trained("resume", lambda value: {"true": "auto", "": "auto", "false": "none"}.get(value.lower(), value))

COMMON: dict[str, Rule] = {
    **{name: trained(name, switch) for name in TRAINER_SWITCHES},
    **{name: trained(name, number if name in _NUMBERS else str) for name in TRAINER_VALUES},
    **from_tables(NO_EFFECT, NO_EFFECT_WITH),
    "activation_checkpointing": trained("gradient_checkpointing", switch),
    "attn_implementation": trained(
        "attn_implementation",
        one_of("auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3", eager="sdpa", flash_attn="auto"),
    ),
    "cache_dir": unneeded("it is the cache of the Hub there; set HF_HOME"),
    "dataloader_num_workers": trained("dataloader_num_workers", at_least(1), "threads, not processes"),
    "deepspeed": trained("deepspeed", deepspeed_file),
    "dtype": _PRECISION,
    "eval_strategy": _EVALUATE,
    "evaluation_strategy": _EVALUATE,
    "gradient_accumulation_steps": trained("gradient_accumulation_steps", _steps),
    "local_rank": unneeded("the launcher sets it"),
    "logging_steps": trained("logging_steps", at_least(1)),
    "lora_rank": trained("lora_r"),
    "lora_target_modules": trained("lora_target_modules", _layers),
    "lr_scheduler_type": trained("lr_scheduler_type", one_of("cosine", "linear", "constant", "constant_with_warmup")),
    "max_steps": trained("max_steps", unless({"-1"}, "the epochs set the length")),
    "optim": trained("optim", one_of("adamw_torch", "adamw_torch_fused", adamw_hf="adamw_torch")),
    "per_device_train_batch_size": trained("per_device_train_batch_size", _steps),
    "report_to": trained("report_to", reporter),
    "resume_from_checkpoint": _RESUME,
    "save_steps": trained("save_steps", _save_steps),
    "save_strategy": trained("save_steps", _save_strategy),
    "torch_dtype": _PRECISION,
    "warmup_steps": trained("warmup_steps", unless({"0"}, "--warmup_ratio says how long the rates rise")),
}
"""Flags of the trainer, under the names of transformers, and those of transformers that are none here."""

UPSTREAM = Tool(
    name="qwen-vl-finetune",
    rules={
        **COMMON,
        "base_interval": built("base_interval"),
        "dataset_use": built(DATASETS),
        "max_pixels": built("max_pixels", at_least(784)),
        "min_pixels": built("min_pixels", at_least(784)),
        "model_max_length": built("max_length", at_least(32), "the capacity of a bin"),
        "video_fps": built("fps"),
        "video_max_frame_pixels": built("video_max_frame_pixels", at_least(784)),
        "video_max_frames": built("video_max_frames", at_least(1)),
        "video_max_pixels": built("video_max_frame_pixels", at_least(784)),
        "video_min_frame_pixels": built("video_min_frame_pixels", at_least(784)),
        "video_min_frames": built("video_min_frames", at_least(1)),
        "video_min_pixels": built("video_min_frame_pixels", at_least(784)),
    },
    defaults={
        "gradient_accumulation_steps": "1",
        "learning_rate": "5e-5",
        "lr_scheduler_type": "linear",
        "model_max_length": "512",
        "num_train_epochs": "3",
        "per_device_train_batch_size": "8",
        "tune_mm_llm": "False",
        "tune_mm_mlp": "False",
        "warmup_ratio": "0",
        "weight_decay": "0",
    },
)

SWIFT = Tool(
    name="ms-swift",
    rules={
        **COMMON,
        "acc_strategy": unneeded("the loss is the mean over all targets of a step"),
        "add_version": unneeded("--output_dir is the folder of the run"),
        "aligner_lr": trained("mm_projector_lr"),
        "attn_impl": COMMON["attn_implementation"],
        "create_checkpoint_symlink": unneeded("--resume auto finds the newest checkpoint"),
        "dataset": built(DATASETS),
        "dataset_num_proc": built("workers"),
        "dataset_shuffle": unneeded("samples and bins are always shuffled"),
        "fps": built("fps"),
        "fps_max_frames": built("fps_max_frames", at_least(2)),
        "fps_min_frames": built("fps_min_frames", at_least(2)),
        "freeze_aligner": trained("tune_mm_mlp", negated),
        "freeze_llm": trained("tune_mm_llm", negated),
        "freeze_vit": trained("tune_mm_vision", negated),
        "lazy_tokenize": unneeded(_SHARDS),
        "load_from_cache_file": unneeded(_SHARDS),
        "loss_scale": unneeded_with({"default"}, "all answers are trained with the same weight"),
        "max_length": built("max_length", at_least(32), "the capacity of a bin"),
        "max_pixels": built("max_pixels", at_least(784)),
        "min_pixels": built("min_pixels", at_least(784)),
        "model": trained("model_name_or_path"),
        "model_author": unneeded("it is a name in self-cognition data"),
        "model_name": unneeded("it is a name in self-cognition data"),
        "model_type": unneeded("this trainer trains Qwen2.5-VL"),
        "packing": unneeded("bins are always packed, and their samples isolated"),
        "packing_num_proc": unneeded("all lengths are packed at once"),
        "padding_free": unneeded("bins are always packed, and their samples isolated"),
        "split_dataset_ratio": unneeded_with({"0", "0.0", "0."}, _EVALUATION),
        "streaming": unneeded("shards are always streamed"),
        "system": impossible("write it into the records, as their first turn or the field system"),
        "target_modules": trained("lora_target_modules", _layers),
        "task_type": unneeded_with({"causal_lm"}, "this trainer trains answers"),
        "template": unneeded("the template is that of Qwen2.5-VL"),
        "train_dataloader_shuffle": unneeded("samples and bins are always shuffled"),
        "train_type": trained("lora_enable", _tuner),
        "truncation_strategy": built("overlong", _overlong),
        "tuner_type": trained("lora_enable", _tuner),
        "use_hf": unneeded("checkpoints come from the Hugging Face Hub"),
        "val_dataset": impossible(_EVALUATION),
        "video_max_pixels": built("video_max_frame_pixels", at_least(784)),
        "video_min_pixels": built("video_min_frame_pixels", at_least(784)),
        "video_total_pixels": built("video_total_pixels", at_least(784)),
        "vit_gradient_checkpointing": unneeded("--gradient_checkpointing decides for the vision tower, too"),
        "vit_lr": trained("vision_tower_lr"),
    },
    defaults={
        "adam_beta2": "0.95",
        "fps": "2",
        "freeze_aligner": "true",
        "freeze_vit": "true",
        "lora_alpha": "32",
        "lora_dropout": "0.05",
        "lora_rank": "8",
        "max_pixels": "12845056",
        "min_pixels": "3136",
        "num_train_epochs": "3",
        "per_device_train_batch_size": "1",
        "tuner_type": "lora",
        "video_max_pixels": "602112",
        "video_min_pixels": "100352",
        "warmup_ratio": "0",
        "weight_decay": "0.1",
    },
)

LLAMA_FACTORY = Tool(
    name="LLaMA-Factory",
    rules={
        **COMMON,
        "buffer_size": unneeded("shards are always streamed"),
        "cutoff_len": built("max_length", at_least(32), "the capacity of a bin"),
        "dataset": built(DATASETS),
        "dataset_dir": unneeded("paths are in datasets.toml"),
        "disable_gradient_checkpointing": trained("gradient_checkpointing", negated),
        "enable_liger_kernel": trained("use_liger_kernel", switch),
        "eval_dataset": impossible(_EVALUATION),
        "finetuning_type": trained("lora_enable", _tuner),
        "flash_attn": trained("attn_implementation", one_of("auto", "sdpa", fa2="auto", disabled="sdpa")),
        "freeze_language_model": trained("tune_mm_llm", negated),
        "freeze_multi_modal_projector": trained("tune_mm_mlp", negated),
        "freeze_vision_tower": trained("tune_mm_vision", negated),
        "image_max_pixels": built("max_pixels", at_least(784)),
        "image_min_pixels": built("min_pixels", at_least(784)),
        "lora_target": trained("lora_target_modules", _layers),
        "mask_history": unneeded_with({"false"}, "all answers are trained"),
        "max_samples": impossible("take a share instead, such as name%10, in DATASETS"),
        "media_dir": unneeded("it is media_root in datasets.toml"),
        "mix_strategy": unneeded_with({"concat"}, "give shares, such as name%50, in DATASETS"),
        "neat_packing": unneeded("bins are always packed, and their samples isolated"),
        "overwrite_cache": unneeded(_SHARDS),
        "packing": unneeded("bins are always packed, and their samples isolated"),
        "plot_loss": unneeded("the losses are in metrics.jsonl"),
        "preprocessing_batch_size": unneeded(_SHARDS),
        "preprocessing_num_workers": built("workers"),
        "pure_bf16": trained("bf16", switch, "with float32 master weights"),
        "stage": unneeded_with({"sft"}, "this trainer trains on answers (SFT)"),
        "streaming": unneeded("shards are always streamed"),
        "template": unneeded("the template is that of Qwen2.5-VL"),
        "tokenized_path": unneeded("--out of vlprep build is the place of the shards"),
        "train_on_prompt": unneeded_with({"false"}, "answers alone are trained"),
        "use_fast_tokenizer": unneeded("the tokenizer is always the fast one"),
        "val_size": unneeded_with({"0", "0.0"}, _EVALUATION),
        "video_fps": built("base_interval", interval_of_fps, "seconds between two frames, 1 / fps"),
        "video_max_pixels": built("video_max_frame_pixels", at_least(784)),
        "video_maxlen": built("video_max_frames", at_least(1)),
        "video_min_pixels": built("video_min_frame_pixels", at_least(784)),
    },
    defaults={
        "cutoff_len": "2048",
        "finetuning_type": "lora",
        "freeze_multi_modal_projector": "true",
        "freeze_vision_tower": "true",
        "gradient_accumulation_steps": "1",
        "image_max_pixels": "589824",
        "image_min_pixels": "1024",
        "learning_rate": "5e-5",
        "lora_rank": "8",
        "lr_scheduler_type": "linear",
        "num_train_epochs": "3",
        "per_device_train_batch_size": "8",
        "video_fps": "2",
        "video_max_pixels": "65536",
        "video_maxlen": "128",
        "video_min_pixels": "256",
        "warmup_ratio": "0",
        "weight_decay": "0",
    },
)
