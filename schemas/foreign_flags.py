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

NO_EFFECT = {
    "data_flatten": _PACKED,
    "data_packing": _PACKED,
    "lazy_preprocess": "shards are preprocessed",
    "group_by_length": "bins are full, and dealt so that ranks have similar costs",
    "remove_unused_columns": "shards hold what is trained and nothing else",
    "per_device_eval_batch_size": "evaluation takes one bin at a time",
    "eval_accumulation_steps": "evaluation keeps no predictions",
    "prediction_loss_only": "evaluation keeps no predictions",
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
}
"""Flags that have no effect here with any value, and why."""

NO_EFFECT_WITH = {
    "save_strategy": ({"steps"}, "--save_steps says how often to save, 0 only when the run is asked to stop"),
    "do_train": ({"true", ""}, "this program trains"),
    "do_eval": ({"true", "false", ""}, "--eval_shards and --eval_strategy say whether to evaluate"),
    "do_predict": ({"false"}, "this program trains"),
    "push_to_hub": ({"false"}, "nothing is uploaded"),
    "load_best_model_at_end": ({"false"}, "final/ is the model after the last step"),
    "label_smoothing_factor": ({"0", "0.0"}, "the loss is the plain cross-entropy"),
    "fsdp": ({""}, "DeepSpeed shards the model"),
    "save_only_model": ({"false"}, "checkpoints hold what a run needs to resume"),
}
"""Flags whose listed values have no effect here, and why. Another value would mean something that does not exist."""
