"""Declarations of the settings of a run: a field for each flag, with help, unit, bounds and choices.

Names and meaning follow the upstream fine-tuning scripts, so that a launch script can move over.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from schemas.setting import Setting

BY_SIZE = "recommended for the size of the model"
FLAT = "constant"
SCHEDULES = ("cosine", "linear", FLAT, "constant_with_warmup")
WARMUP = 0.03
"""Recommended share of steps for the warm-up of every schedule but the flat one."""

READ_TIMEOUT_S = 480.0
"""Default limit for reading the data of a forward pass: two minutes below the time that ranks wait for each other, and
longer than seven requests of a minute each, with their pauses, need to fail."""

DEEPSPEED_FILE, FEWER_EXCHANGES_FILE = "zero2.json", "zero1.json"
"""The DeepSpeed file without a flag, and the one that a run takes instead where it fits and saves communication."""

RENDEZVOUS_TIMEOUT_S = 120.0
"""Default limit for the ranks to meet: machines import from a shared file system at different speeds."""

FUSED, UNFUSED = "adamw_torch_fused", "adamw_torch"
"""Names of transformers for the optimizers of this trainer."""

MAX_LORA_RANK = 8192
"""No matrix of the largest model has a higher rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Declarations:
    """All settings of a run, not checked. A field that is None takes the default that its declaration names."""

    shards: Annotated[
        str,
        Setting(
            "Folder with a manifest, or with sub-folders that have one, or a URL. Several are mixed: a,b or by weight "
            "a:0.7,b:0.3 or by epochs a:2epochs,b:1epochs."
        ),
    ]
    model_name_or_path: Annotated[str, Setting("Checkpoint to start from: a folder or a hub id.")] = (
        "Qwen/Qwen2.5-VL-3B-Instruct"
    )
    output_dir: Annotated[Path | None, Setting("Folder of the run.", unset="runs/ and the run name")] = None
    run_name: Annotated[
        str | None,
        Setting(
            "Name of the run in wandb, and of its folder without --output_dir.", unset="name of the checkpoint folder"
        ),
    ] = None
    seed: Annotated[int, Setting("Seeds the order of bins, and the start and dropout of adapters.", low=0)] = 0

    max_steps: Annotated[
        int | None, Setting("Optimizer steps, instead of --num_train_epochs.", low=1, unset="by epochs")
    ] = None
    num_train_epochs: Annotated[float | None, Setting("Passes over all bins.", above=0, high=10**6, unset=BY_SIZE)] = (
        None
    )
    samples_per_step: Annotated[
        int | None,
        Setting(
            "Samples of an optimizer step over all ranks. The step takes as many bins as hold them in expectation.",
            unit="samples",
            low=1,
            unset=f"{BY_SIZE}, times the number of ranks",
        ),
    ] = None
    max_tokens_per_forward: Annotated[
        int | None,
        Setting(
            "Tokens of a rank in a forward pass. A step takes as many passes as it needs.",
            unit="tokens",
            low=1,
            unset="what fits the GPU by the estimate of --dry_run; 16384 on a CPU",
        ),
    ] = None
    per_device_train_batch_size: Annotated[
        int | None,
        Setting(
            "Bins of a rank in a forward pass, instead of --samples_per_step. A bin packs many samples.",
            unit="bins",
            low=1,
            unset="1 with --gradient_accumulation_steps",
        ),
    ] = None
    gradient_accumulation_steps: Annotated[
        int | None,
        Setting(
            "Forward passes of a rank in an optimizer step, instead of --samples_per_step.",
            low=1,
            unset="1 with --per_device_train_batch_size",
        ),
    ] = None
    group_steps: Annotated[
        int,
        Setting(
            "Bins of similar cost within a window of this many steps share a step. Ranks wait less, and the mixture "
            "varies more. 1 turns it off.",
            unit="steps",
            low=1,
        ),
    ] = 1

    verify: Annotated[
        str, Setting("When to compare checksums of bins: always (with every read), first (once a bin), or never.")
    ] = "always"
    dataloader_num_workers: Annotated[
        int, Setting("Threads of a rank that read and decompress bins.", unit="threads", low=1, high=1024)
    ] = 4
    dataloader_prefetch_factor: Annotated[
        int | None,
        Setting("Forward passes to prefetch for each thread.", low=1, unset="enough for two steps"),
    ] = None
    read_timeout_s: Annotated[
        float,
        Setting(
            "The run stops when the data of a forward pass take longer to read. Stay below the time that ranks wait "
            "for each other, DEEPSPEED_TIMEOUT (10 minutes).",
            unit="seconds",
            above=0,
        ),
    ] = READ_TIMEOUT_S
    rendezvous_timeout_s: Annotated[
        float,
        Setting(
            "At the start, ranks wait so long for each other. Then the run ends and says how many came.",
            unit="seconds",
            above=0,
            high=86_400,
        ),
    ] = RENDEZVOUS_TIMEOUT_S
    read_connections: Annotated[
        int | None, Setting("Remote shards: concurrent requests of a rank.", unit="requests", low=1, unset="16")
    ] = None
    cache_dir: Annotated[
        Path | None,
        Setting("Remote shards: folder on a local disk that caches bins. Ranks of a node share it.", unset="no cache"),
    ] = None
    cache_bytes: Annotated[
        int | None, Setting("Maximum size of --cache_dir.", unit="bytes", low=1, unset="100 GiB")
    ] = None

    tune_mm_llm: Annotated[bool, Setting("Train the language model with embeddings and lm_head.")] = True
    tune_mm_mlp: Annotated[bool, Setting("Train the merger between vision tower and language model.")] = True
    tune_mm_vision: Annotated[bool, Setting("Train the vision tower.")] = False
    learning_rate: Annotated[
        float | None, Setting("Peak rate of all modules without a rate of their own.", above=0, unset=BY_SIZE)
    ] = None
    mm_projector_lr: Annotated[float | None, Setting("Peak rate of the merger.", above=0, unset="--learning_rate")] = (
        None
    )
    vision_tower_lr: Annotated[
        float | None, Setting("Peak rate of the vision tower.", above=0, unset="--learning_rate")
    ] = None
    lora_enable: Annotated[
        bool,
        Setting(
            "LoRA: train adapters beside the linear layers of the parts that --tune_mm_* names. All weights of the "
            "model itself are frozen."
        ),
    ] = False
    lora_r: Annotated[int | None, Setting("Rank of the adapters.", low=1, high=MAX_LORA_RANK, unset="64")] = None
    lora_alpha: Annotated[
        int | None,
        Setting("Adapters are scaled by alpha / r.", low=1, unset="128, twice the default rank"),
    ] = None
    lora_dropout: Annotated[
        float | None, Setting("Share of an adapter's inputs dropped in training.", low=0, below=1, unset="0")
    ] = None
    lora_target_modules: Annotated[
        str | None,
        Setting(
            "Layers that get adapters, by the ends of their names: q_proj,v_proj or self_attn.q_proj. Each may be a "
            "regular expression.",
            unset="all-linear, every linear layer but lm_head",
        ),
    ] = None
    lr_scheduler_type: Annotated[
        str, Setting("Schedule of the rates after the warm-up; constant has no warm-up.", choices=SCHEDULES)
    ] = "cosine"
    warmup_ratio: Annotated[
        float | None,
        Setting("Share of all steps in which the rates rise.", low=0, high=1, unset=f"{WARMUP}, with constant 0"),
    ] = None
    warmup_steps: Annotated[
        int | None,
        Setting("Steps in which the rates rise, instead of --warmup_ratio.", unit="steps", low=0, unset="by ratio"),
    ] = None
    optim: Annotated[
        str, Setting("AdamW of PyTorch: its fused kernel, or one operation after the other.", choices=(FUSED, UNFUSED))
    ] = FUSED
    adam_beta1: Annotated[float, Setting("AdamW: decay of the first moment.", low=0, below=1)] = 0.9
    adam_beta2: Annotated[float, Setting("AdamW: decay of the second moment.", low=0, below=1)] = 0.999
    adam_epsilon: Annotated[float, Setting("AdamW: added to the denominator.", above=0)] = 1e-8
    weight_decay: Annotated[float, Setting("AdamW decay of matrices. Norms and biases have none.", low=0)] = 0.01
    max_grad_norm: Annotated[
        float, Setting("Gradients with a larger norm are clipped to it. 0 turns clipping off.", low=0)
    ] = 1.0

    deepspeed: Annotated[
        str | None,
        Setting(
            "DeepSpeed configuration: a file, or a name in train/settings/configs.",
            unset="zero1.json on several GPUs with room for it, if a step has several forward passes; else zero2.json",
        ),
    ] = None
    bf16: Annotated[bool | None, Setting("Compute in bfloat16.", unset="where the accelerator can; else float32")] = (
        None
    )
    fp16: Annotated[
        bool | None, Setting("Compute in float16 with loss scaling, on accelerators without bfloat16.", unset="False")
    ] = None
    tf32: Annotated[
        bool | None,
        Setting("Multiply float32 matrices in TF32, on GPUs since Ampere.", unset="as PyTorch is configured"),
    ] = None
    gradient_checkpointing: Annotated[
        bool, Setting("Recompute activations instead of keeping them: less memory, a second forward pass.")
    ] = True
    use_liger_kernel: Annotated[
        bool, Setting("Compute norms, MLPs and rotary embeddings with Liger kernels. Needs a GPU.")
    ] = False
    torch_compile: Annotated[
        bool, Setting("Compile layers with torch.compile: slow first steps, then fewer kernels. Not with ZeRO-3.")
    ] = False
    attn_implementation: Annotated[
        str,
        Setting(
            "Attention; on a GPU in half precision, auto takes flash_attention_2 where it is installed, else varlen, "
            "which is part of torch; elsewhere sdpa.",
            choices=("auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3"),
        ),
    ] = "auto"

    logging_steps: Annotated[
        int,
        Setting("Steps between two lines of metrics.jsonl. First and last step always have one.", unit="steps", low=1),
    ] = 10
    peak_tflops: Annotated[
        float | None,
        Setting(
            "Peak of the accelerator, which MFU refers to.",
            unit="TFLOPS",
            above=0,
            unset="known by the accelerator's name",
        ),
    ] = None
    report_to: Annotated[
        str, Setting("Where metrics go besides metrics.jsonl.", choices=("none", "tensorboard", "wandb"))
    ] = "none"
    logging_dir: Annotated[Path | None, Setting("Folder of the TensorBoard files.", unset="the folder of the run")] = (
        None
    )
    eval_shards: Annotated[
        str | None,
        Setting(
            "Folders or URLs to evaluate on, after the last step and as --eval_strategy says.", unset="no evaluation"
        ),
    ] = None
    eval_strategy: Annotated[
        str, Setting("When to evaluate before the end as well.", choices=("no", "steps", "epoch"))
    ] = "no"
    eval_steps: Annotated[
        int | None,
        Setting("Steps between two evaluations with --eval_strategy steps.", unit="steps", low=1, unset="1000"),
    ] = None
    max_skipped_steps: Annotated[
        int,
        Setting(
            "Consecutive steps that may be skipped for a NaN or infinite loss or gradient. One more stops the run.",
            unit="steps",
            low=0,
        ),
    ] = 3
    save_steps: Annotated[
        float,
        Setting(
            "Steps between two checkpoints; below 1, a share of the run (0.1: ten times). The last step is always "
            "saved. 0 saves only then and when the run is asked to stop.",
            unit="steps",
            low=0,
        ),
    ] = 500
    save_in_background: Annotated[
        bool,
        Setting(
            "Copy the state to host memory and write the checkpoint while training continues. The last checkpoint, and "
            "that of a run that is asked to stop, are waited for."
        ),
    ] = False
    save_total_limit: Annotated[
        int | None, Setting("Checkpoints to keep, newest first.", unit="checkpoints", low=1, unset="all")
    ] = None
    resume: Annotated[
        str,
        Setting("auto resumes from the newest checkpoint of the run folder, none starts over, or name a checkpoint."),
    ] = "auto"

    dry_run: Annotated[
        bool,
        Setting(
            "Show the memory of a rank, run the largest bins, compare packed samples with single ones, and stop. "
            "Nothing is trained or written."
        ),
    ] = False
    verbose: Annotated[bool, Setting("Show all metrics of logged steps on the screen, not only the main ones.")] = False
    local_rank: Annotated[int, Setting("Appended by the deepspeed launcher.")] = -1
    debug: Annotated[bool, Setting("Show tracebacks of errors.")] = False

    @property
    def name(self) -> str:
        """Name of the run; by default that of the checkpoint."""
        return self.run_name or Path(self.model_name_or_path).resolve().name

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.output_dir or Path("runs") / self.name

    @property
    def deepspeed_file(self) -> str:
        """The DeepSpeed file that a flag names, or the default."""
        return self.deepspeed or DEEPSPEED_FILE

    @property
    def counts_bins(self) -> bool:
        """Whether flags count the bins of a step, rather than its samples."""
        return self.per_device_train_batch_size is not None or self.gradient_accumulation_steps is not None

    @property
    def warmup(self) -> float:
        """Share of all steps in which the rates rise; by default as recommended for the schedule.

        0 where ``warmup_steps`` counts them instead.
        """
        if self.warmup_steps is not None:
            return 0.0
        if self.warmup_ratio is not None:
            return self.warmup_ratio
        return 0.0 if self.lr_scheduler_type == FLAT else WARMUP

    def save_interval(self, num_steps: int) -> int:
        """Steps between two checkpoints of a run of ``num_steps`` steps. The last step has one in any case."""
        if self.save_steps == 0:
            return num_steps
        return int(self.save_steps) if self.save_steps >= 1 else math.ceil(num_steps * self.save_steps)

    @property
    def uses_base_rate(self) -> bool:
        """Whether a trained part has no rate of its own, so that ``learning_rate`` applies."""
        return (
            self.tune_mm_llm
            or (self.tune_mm_mlp and self.mm_projector_lr is None)
            or (self.tune_mm_vision and self.vision_tower_lr is None)
        )
