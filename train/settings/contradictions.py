"""Settings of a run that contradict each other, or would have no effect: :class:`Declarations` -> sentences.

Bounds of single values are in the declarations.
"""

from __future__ import annotations

from collections.abc import Iterator

from train.settings.declarations import FLAT, Declarations


def contradictions(args: Declarations) -> Iterator[str]:
    """What is wrong with a combination of settings, one sentence each."""
    yield from _check_what_is_trained(args)
    yield from _check_batch(args)
    yield from _check_schedule(args)
    yield from _check_adapters(args)
    yield from _check_evaluation_and_saving(args)
    yield from _check_computation(args)


def _check_what_is_trained(args: Declarations) -> Iterator[str]:
    if not (args.tune_mm_llm or args.tune_mm_mlp or args.tune_mm_vision):
        yield ("nothing is trained: at least one of --tune_mm_llm, --tune_mm_mlp, --tune_mm_vision must be True.")
    for rate_flag, rate, tune_flag, is_tuned in (
        ("mm_projector_lr", args.mm_projector_lr, "tune_mm_mlp", args.tune_mm_mlp),
        ("vision_tower_lr", args.vision_tower_lr, "tune_mm_vision", args.tune_mm_vision),
    ):
        if rate is not None and not is_tuned:
            yield f"--{rate_flag} {rate:g} has no effect with --{tune_flag} False: change one of them."
    if args.learning_rate is not None and not args.uses_base_rate:
        yield (
            f"--learning_rate {args.learning_rate:g} has no effect: every trained part has a rate of its own. "
            "Leave it out."
        )


def _check_batch(args: Declarations) -> Iterator[str]:
    bins_flags = [
        f"--{name} {value}"
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
        if (value := getattr(args, name)) is not None
    ]
    for name in ("samples_per_step", "max_tokens_per_forward"):
        value = getattr(args, name)
        if bins_flags and value is not None:
            verb = "counts" if len(bins_flags) == 1 else "count"
            yield (
                f"--{name} {value} has no effect with {' and '.join(bins_flags)}, which {verb} the bins of a step: "
                "leave one of them out."
            )


def _check_schedule(args: Declarations) -> Iterator[str]:
    if args.max_steps is not None and args.num_train_epochs is not None:
        yield "--max_steps and --num_train_epochs both say how long to train: give one of them."
    if args.warmup_steps is not None and args.warmup_ratio is not None:
        yield "--warmup_steps and --warmup_ratio both say how long the rates rise: give one of them."
    if args.lr_scheduler_type == FLAT and args.warmup_steps:
        yield (
            f"--warmup_steps {args.warmup_steps} has no effect with --lr_scheduler_type {FLAT}, which has no "
            "warm-up: leave it out, or give constant_with_warmup."
        )
    if args.lr_scheduler_type == FLAT and args.warmup > 0:
        yield (
            f"--warmup_ratio {args.warmup:g} has no effect with --lr_scheduler_type {FLAT}, which has no warm-up: "
            "leave it out, or give constant_with_warmup."
        )


def _check_adapters(args: Declarations) -> Iterator[str]:
    for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
        value = getattr(args, name)
        if value is not None and not args.lora_enable:
            yield f"--{name} {value} has no effect without --lora_enable."


def _check_evaluation_and_saving(args: Declarations) -> Iterator[str]:
    if args.eval_strategy != "no" and args.eval_shards is None:
        yield f"--eval_strategy {args.eval_strategy} has nothing to evaluate on: give --eval_shards."
    if args.eval_steps is not None and args.eval_strategy != "steps":
        yield f"--eval_steps {args.eval_steps} has no effect without --eval_strategy steps."
    if args.save_steps > 1 and not float(args.save_steps).is_integer():
        yield f"--save_steps {args.save_steps} is neither a number of steps nor a share of the run below 1."
    if args.save_in_background and args.save_steps == 0:
        yield "--save_in_background has no effect with --save_steps 0: the only checkpoint is the last one. Omit it."


def _check_computation(args: Declarations) -> Iterator[str]:
    if args.use_liger_kernel and args.torch_compile:
        yield "--use_liger_kernel and --torch_compile both replace the same kernels: give one of them."
    if args.bf16 and args.fp16:
        yield "--bf16 and --fp16 both say how to compute: give one of them."
    if args.attn_implementation not in ("auto", "sdpa") and args.bf16 is False and not args.fp16:
        yield (
            f"--attn_implementation {args.attn_implementation} computes in bfloat16 or float16: leave out --bf16 False."
        )
    if args.cache_bytes is not None and args.cache_dir is None:
        yield "--cache_bytes has no effect without --cache_dir: give the folder, or leave it out."
