#!/usr/bin/env bash
# From nothing to a model to chat with. Run again after an interruption, it goes on where it was.
#
#   bash scripts/runs/minimind.sh                           # on a GPU; downloads today's mini set
#   DATA=~/data MINUTES=60 bash scripts/runs/minimind.sh    # your files, fitted to an hour
#
# DATA        folder of data files, which are used as they are: nothing is downloaded
# MINUTES     for everything; model size and tokens are fitted to them and to the machine; stages
#             that are added to a finished run get as many again
# STAGES      "pretrain full_sft dpo", and on request lora reward ppo grpo spo reason agent
# OUT         folder of the run; default: out/minimind
# PRICE       of an hour of the machine, such as 1.5 or "1.5 RMB"
# BENCHMARKS  folder with copies of the benchmarks, if they cannot be downloaded
# Flags of this script, such as --preset minimind-3, are given to every trainer.
# shellcheck disable=SC2086
set -euo pipefail
absolute() { case $1 in "" | /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
data=$(absolute "${DATA:-}") out=$(absolute "${OUT:-}") benchmarks=$(absolute "${BENCHMARKS:-}")
cd "$(dirname "$0")/../.." && out=${out:-$PWD/out/minimind} && export PYTHONPATH="$PWD"
[ -z "$data" ] || export HF_HUB_OFFLINE=1 # with DATA nothing is fetched

# Set up: make's environment, or the Python that is there if it has PyTorch.
python() { "$(command -v .venv/bin/python .venv/Scripts/python.exe python3 | head -1)" "$@"; }
python -c 'from importlib.metadata import version as v; v("torch"), v("datasets")' 2> /dev/null || make .venv/installed

# What it takes: time, disk, memory and money of each stage.
python scripts/runs/plan.py --save_dir "$out" --data_dir "$data" --stages ${STAGES:-pretrain full_sft dpo} \
  --minutes "${MINUTES:-0}" --price "${PRICE:-}" --flags="$*"
trap 'echo "stopped; the same command goes on from here"; exit 130' INT
left() { flags=$(python scripts/runs/plan.py --save_dir "$out" --stage "$1") || exit; [ -n "$flags" ]; }
left data && python scripts/prepare_data.py download $flags
if left cut; then python scripts/runs/cut_data.py --save_dir "$out" --data_dir "$data" && data=$out/data; fi

# Train: the stages that are asked for and not finished.
set -- --data_dir "$data" --save_dir "$out" --checkpoint_dir "$out/checkpoints" --resume 1 "$@"
left pretrain && python trainer/train_pretrain.py $flags "$@"
left full_sft && python trainer/train_full_sft.py $flags "$@"
left lora && python trainer/train_lora.py $flags "$@"
left dpo && python trainer/train_dpo.py $flags "$@"
left reward && python trainer/train_reward.py $flags "$@"
left ppo && python trainer/train_ppo.py $flags "$@"
left grpo && python trainer/train_grpo.py $flags "$@"
left spo && python trainer/train_spo.py $flags "$@"
left reason && python trainer/train_distill_reason.py $flags "$@"
left agent && python trainer/train_agent.py $flags "$@"

# Evaluate every stage, on held-out data and on a fixed page of questions; then the page of it all.
python scripts/runs/evaluate.py --save_dir "$out"
python scripts/runs/questions.py --save_dir "$out"
left benchmarks && { python scripts/eval_benchmark.py --save_dir "$out" --local "$benchmarks" \
  --json "$out/benchmarks.json" --plot "$out/benchmarks.png" $flags || echo "the benchmarks are left out"; }
python scripts/runs/report.py --save_dir "$out"

# Chat, if there is somebody to chat with.
if [ -t 0 ] && left chat; then python eval_llm.py --save_dir "$out" --prompts type $flags; fi
