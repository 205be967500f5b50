#!/usr/bin/env bash
# Step-DPO again and again: each round makes pairs of fresh problems with the model that the last one trained,
# and trains on from there. What is finished is not repeated.
#   demo/rounds.sh [ROUNDS] [FOLDER]          # 3 rounds into runs/rounds, 16 minutes each on 2 cores
set -euo pipefail
cd "$(dirname "$0")/.."
rounds=${1:-3} folder=${2:-runs/rounds} model=demo/model runs=()

for round in $(seq "$rounds"); do
    here=$folder/round$round
    mkdir -p "$here"
    python demo/make.py --problems "$here/problems.jsonl" --round "$round"
    torchrun --nproc_per_node 2 -m pairs build @demo/build_args --model "$model" \
        --problems "$here/problems.jsonl" --out "$here/pairs"
    python demo/make.py --score "$here/pairs" --round "$round"
    torchrun --nproc_per_node 2 stepdpo.py @demo/args --model "$model" \
        --data "$here/pairs/pairs.jsonl" --eval-data 0.1 --output-dir "$here/out" --resume
    model=$here/out/model runs+=("$here/out")
done
python demo/errors.py "${runs[@]}"
