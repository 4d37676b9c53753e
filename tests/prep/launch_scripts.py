"""Launch scripts as users of other trainers have them, written from the flags that their documentation describes."""

from __future__ import annotations

_UPSTREAM_HEAD = """#!/bin/bash
# Ranks
MASTER_ADDR=${MASTER_ADDR:-"127.0.0.1"}
MASTER_PORT=${MASTER_PORT:-$(shuf -i 20001-29999 -n 1)}
NNODES=${WORLD_SIZE:-1}
NPROC_PER_NODE=${NPROC_PER_NODE:-8}

deepspeed=./scripts/%(deepspeed)s.json
llm=Qwen/Qwen2.5-VL-%(size)s-Instruct
lr=%(rate)s
batch_size=%(batch)s
grad_accum_steps=%(accumulation)s
entry_file=qwenvl/train/train_qwen.py
datasets=%(datasets)s
run_name="qwen2vl-baseline"
output_dir=./output
"""

_UPSTREAM_ARGS = r"""
args="
    --deepspeed ${deepspeed} \
    --model_name_or_path "${llm}" \
    --dataset_use ${datasets} \
    --data_flatten True \
    --tune_mm_vision False \
    --tune_mm_mlp True \
    --tune_mm_llm True \
    --bf16 \
    --output_dir ${output_dir} \
    --num_train_epochs 0.5 \
    --per_device_train_batch_size ${batch_size} \
    --per_device_eval_batch_size $((batch_size*2)) \
    --gradient_accumulation_steps ${grad_accum_steps} \
    --max_pixels 50176 \
    --min_pixels 784 \
    --eval_strategy "no" \
    --save_strategy "steps" \
    --save_steps 1000 \
    --save_total_limit 1 \
    --learning_rate ${lr} \
    --weight_decay 0 \
    --warmup_ratio 0.03 \
    --max_grad_norm 1 \
    --lr_scheduler_type "cosine" \
    --logging_steps 1 \
    --model_max_length 8192 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    --run_name ${run_name} \
    --report_to wandb%(more)s"
"""

_UPSTREAM_LAUNCH = r"""
torchrun --nproc_per_node=${NPROC_PER_NODE} \
         --master_addr=${MASTER_ADDR} \
         --master_port=${MASTER_PORT} \
         ${entry_file} ${args}
"""


def upstream(
    *,
    size: str = "3B",
    rate: str = "2e-7",
    batch: int = 4,
    accumulation: int = 4,
    deepspeed: str = "zero3",
    datasets: str = "mp_doc%50,clevr_mc",
    more: str = "",
) -> str:
    """A script of the upstream framework, with more flags at the end of its ``args``."""
    head = _UPSTREAM_HEAD % {
        "size": size,
        "rate": rate,
        "batch": batch,
        "accumulation": accumulation,
        "deepspeed": deepspeed,
        "datasets": datasets,
    }
    return head + _UPSTREAM_ARGS.replace("%(more)s", f" \\\n    {more}" if more else "") + _UPSTREAM_LAUNCH


UPSTREAM_SCRIPTS = {
    "sft.sh": upstream(),
    "sft_3b.sh": upstream(batch=8, deepspeed="zero2"),
    "sft_7b.sh": upstream(size="7B"),
    "sft_32b.sh": upstream(size="32B", rate="1e-7", batch=2, accumulation=8, deepspeed="zero3_offload"),
    "sft_video_packed.sh": upstream(
        more="--data_packing True --video_max_frames 16 --video_min_frames 4 --base_interval 2 "
        "--video_max_frame_pixels 1304576 --video_min_frame_pixels 200704"
    ),
    "sft_today.sh": upstream(
        more="--video_fps 2 --video_max_frames 8 --video_min_frames 4 --video_max_pixels 802816 "
        "--video_min_pixels 200704 --lora_enable True --lora_r 64 --lora_alpha 128 --lora_dropout 0.0 "
        "--optim adamw_torch --cache_dir ./cache"
    ),
}

SWIFT_SCRIPTS = {
    "lora.sh": r"""
CUDA_VISIBLE_DEVICES=0 \
MAX_PIXELS=1003520 \
swift sft \
    --model Qwen/Qwen2.5-VL-7B-Instruct \
    --dataset data/ocr.jsonl \
    --train_type lora \
    --torch_dtype bfloat16 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --learning_rate 1e-4 \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --freeze_vit true \
    --gradient_accumulation_steps 16 \
    --eval_steps 50 \
    --save_steps 50 \
    --save_total_limit 2 \
    --logging_steps 5 \
    --max_length 2048 \
    --output_dir output \
    --warmup_ratio 0.05 \
    --dataloader_num_workers 4
""",
    "full.sh": r"""
nproc_per_node=2

export FPS_MAX_FRAMES=12
NPROC_PER_NODE=$nproc_per_node CUDA_VISIBLE_DEVICES=0,1 VIDEO_MAX_PIXELS=50176 swift sft \
    --model Qwen/Qwen2.5-VL-3B-Instruct --dataset a.jsonl b.jsonl --train_type full --freeze_vit false \
    --vit_lr 1e-6 --aligner_lr 1e-5 \
    --learning_rate 1e-5 --deepspeed zero3 --packing true --padding_free true --attn_impl flash_attn \
    --max_length 8192 --truncation_strategy delete --gradient_checkpointing true --use_liger_kernel false \
    --save_strategy epoch --output_dir output/full
""",
    "merger.sh": r"""
args=(
    --model Qwen/Qwen2.5-VL-3B-Instruct
    --dataset "my data.jsonl"  # all of it
    --tuner_type full --freeze_llm true --freeze_aligner false --freeze_vit true
    --max_steps 2 --lr_scheduler_type constant --report_to tensorboard --logging_dir logs
    --split_dataset_ratio 0 --dataset_num_proc 4 --lazy_tokenize true
)
swift sft "${args[@]}" 2>&1 | tee train.log
""",
}

_LLAMA_FACTORY_HEAD = """\
### model
model_name_or_path: Qwen/Qwen2.5-VL-7B-Instruct
image_max_pixels: 262144
video_max_pixels: 16384
trust_remote_code: true

### method
stage: sft
do_train: true
"""

_LLAMA_FACTORY_TAIL = """
### dataset
dataset: mllm_demo,my_set
template: qwen2_vl
cutoff_len: 2048
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4

### output
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none

### train
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
"""

LLAMA_FACTORY_FILES = {
    "lora.yaml": _LLAMA_FACTORY_HEAD
    + "finetuning_type: lora\nlora_rank: 8\nlora_target: all\nlearning_rate: 1.0e-4\noutput_dir: saves/lora\n"
    + _LLAMA_FACTORY_TAIL,
    "full.yaml": _LLAMA_FACTORY_HEAD
    + "finetuning_type: full\nfreeze_vision_tower: true\nfreeze_multi_modal_projector: true\n"
    + "freeze_language_model: false\ndeepspeed: examples/deepspeed/ds_z3_config.json\nlearning_rate: 1.0e-5\n"
    + "output_dir: saves/full\n"
    + _LLAMA_FACTORY_TAIL,
    "vision.yaml": _LLAMA_FACTORY_HEAD
    + "finetuning_type: full\nfreeze_vision_tower: false\nfreeze_multi_modal_projector: false\n"
    + "flash_attn: fa2\nneat_packing: true\nenable_liger_kernel: true\nvideo_fps: 4\nvideo_maxlen: 32\n"
    + "learning_rate: 1e-5\noutput_dir: saves/vision\n"
    + _LLAMA_FACTORY_TAIL,
}
