"""Flags of the upstream framework and of transformers that the trainer does not have, and why.

The trainer and ``vlprep migrate`` explain them in the same words.
"""

from __future__ import annotations

AT_BUILD = {
    "dataset_use": "DATASETS, as in make shards DATASET=name%50",
    "model_max_length": "--max-length",
    "max_pixels": "--max-pixels",
    "min_pixels": "--min-pixels",
    "video_max_frames": "--video-max-frames",
    "video_min_frames": "--video-min-frames",
    "video_max_frame_pixels": "--video-max-frame-pixels",
    "video_min_frame_pixels": "--video-min-frame-pixels",
    "video_max_pixels": "--video-max-frame-pixels",
    "video_min_pixels": "--video-min-frame-pixels",
    "video_fps": "--video-sampling fps --fps",
    "base_interval": "--base-interval",
}
"""Flags that are decided when shards are built, and the argument of ``vlprep build``."""

_PACKED = "bins are always packed, and their samples isolated"
_LOADER = "shards need no data loader of PyTorch"
_SCREEN = "metrics go to metrics.jsonl, and to --report_to"
_PREDICTIONS = "evaluation keeps no predictions"
_LAST = "final/ is the model after the last step"
_UPLOAD = "nothing is uploaded"
_PRECISION = "evaluation computes as training does"

_UNSET = {"", "none", "null", "{}"}
"""Values that leave a flag of transformers at its default."""

NO_EFFECT = {
    "data_flatten": _PACKED,
    "data_packing": _PACKED,
    "lazy_preprocess": "shards are preprocessed",
    "group_by_length": "bins are full, and dealt so that ranks have similar costs",
    "remove_unused_columns": "shards hold what is trained and nothing else",
    "per_device_eval_batch_size": "evaluation takes one bin at a time",
    "eval_accumulation_steps": _PREDICTIONS,
    "prediction_loss_only": _PREDICTIONS,
    "dataloader_pin_memory": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_drop_last": "every bin is used once an epoch",
    "gradient_checkpointing_kwargs": "checkpointing is always the non-reentrant one",
    "average_tokens_across_devices": "the loss is the mean over all targets of a step",
    "data_seed": "--seed seeds the order of bins",
    "overwrite_output_dir": "a run resumes from its folder; --resume none starts over",
    "save_safetensors": "final/ is written as safetensors",
    "save_on_each_node": "machines share the folder of the run",
    "logging_strategy": "--logging_steps says how often to log",
    "logging_first_step": "the first step is always logged",
    "disable_tqdm": _SCREEN,
    "log_level": _SCREEN,
    "log_level_replica": _SCREEN,
    "log_on_each_node": _SCREEN,
    "include_num_input_tokens_seen": "tokens are always counted",
    "skip_memory_metrics": "metrics.jsonl has the memory of each logged step",
    "trust_remote_code": "no code of a checkpoint is run",
    "accelerator_config": "DeepSpeed runs the ranks",
    "activation_checkpointing_kwargs": "checkpointing is always the non-reentrant one",
    "batch_eval_metrics": _PREDICTIONS,
    "bf16_full_eval": _PRECISION,
    "dataloader_in_order": _LOADER,
    "dataloader_multiprocessing_context": _LOADER,
    "enable_jit_checkpoint": "SIGTERM always finishes the step and saves",
    "eval_do_concat_batches": _PREDICTIONS,
    "eval_use_gather_object": _PREDICTIONS,
    "fp16_full_eval": _PRECISION,
    "greater_is_better": _LAST,
    "hub_always_push": _UPLOAD,
    "hub_model_id": _UPLOAD,
    "hub_private_repo": _UPLOAD,
    "hub_revision": _UPLOAD,
    "hub_strategy": _UPLOAD,
    "hub_token": _UPLOAD,
    "include_for_metrics": _PREDICTIONS,
    "include_tokens_per_second": "tokens per second are always logged",
    "label_names": _PREDICTIONS,
    "length_column_name": "bins are full, and dealt so that ranks have similar costs",
    "logging_nan_inf_filter": "a loss that is not finite is logged as null",
    "metric_for_best_model": _LAST,
    "project": _SCREEN,
    "restore_callback_states_from_checkpoint": "a resumed run always restores its state",
    "torch_empty_cache_steps": "memory of a GPU is kept in segments that grow",
    "trackio_bucket_id": _SCREEN,
    "trackio_space_id": _SCREEN,
    "trackio_static_space_id": _SCREEN,
    "use_cache": "training keeps no keys and values",
}
"""Flags that have no effect here with any value, and why."""

NO_EFFECT_WITH = {
    "save_strategy": ({"steps"}, "--save_steps says how often to save, 0 only when the run is asked to stop"),
    "do_train": ({"true", ""}, "this program trains"),
    "do_eval": ({"true", "false", ""}, "--eval_shards and --eval_strategy say whether to evaluate"),
    "do_predict": ({"false"}, "this program trains"),
    "push_to_hub": ({"false"}, _UPLOAD),
    "load_best_model_at_end": ({"false"}, _LAST),
    "label_smoothing_factor": ({"0", "0.0"}, "the loss is the plain cross-entropy"),
    "fsdp": ({""}, "DeepSpeed shards the model"),
    "save_only_model": ({"false"}, "checkpoints hold what a run needs to resume"),
    "auto_find_batch_size": ({"false"}, "--max_tokens_per_forward limits what a forward pass takes"),
    "eval_delay": ({"0", "0.0", *_UNSET}, "--eval_steps says when to evaluate"),
    "eval_on_start": ({"false"}, "--eval_steps says when to evaluate"),
    "fsdp_config": (_UNSET, "DeepSpeed shards the model"),
    "full_determinism": ({"false"}, "CPU runs repeat to the bit, and kernels of a GPU may not"),
    "ignore_data_skip": ({"false"}, "a resumed run continues with the next bins"),
    "liger_kernel_config": (_UNSET, "--use_liger_kernel takes all kernels that fit"),
    "lr_scheduler_kwargs": (_UNSET, "a schedule has no settings but its warm-up"),
    "neftune_noise_alpha": ({"0", "0.0", *_UNSET}, "no noise is added to embeddings"),
    "optim_args": (_UNSET, "--adam_beta1, --adam_beta2 and --adam_epsilon set up AdamW"),
    "optim_target_modules": (_UNSET, "AdamW trains all weights alike"),
    "parallelism_config": (_UNSET, "DeepSpeed shards the model"),
    "torch_compile_backend": ({"inductor", *_UNSET}, "--torch_compile takes the default backend"),
    "torch_compile_mode": ({"default", *_UNSET}, "--torch_compile takes the default mode"),
    "train_sampling_strategy": ({"random", "group_by_length"}, "bins are full, and their order is shuffled"),
    "use_cpu": ({"false"}, "DeepSpeed finds the accelerator; DS_ACCELERATOR=cpu takes the CPU"),
}
"""Flags whose listed values have no effect here, and why. Another value would mean something that does not exist."""
