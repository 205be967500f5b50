#!/usr/bin/env bash
# Everything that wants a GPU, on one of them, in stages of at most 9 minutes:
#
#     bench/gpu.sh                    # all stages, as many as fit into 10 minutes; again goes on where it stopped
#     bench/gpu.sh tests loss         # these
#     DRY=1 bench/gpu.sh              # every stage on a toy, also without a GPU: do the commands work?
#
#     tests       the CUDA tests
#     demo        the README's first run, and what it gains
#     same-demo   ours on GPU and CPU; the column "differs"
#     same-0.5b   the same for a model of 0.5B parameters
#     loss        the head alone, against every peer
#     attention   attention alone, against what else could compute it
#     profile     7B: where the time of a step goes
#     steps       7B, micro-batches of 8,192 tokens: self-check, peak memory, compiled, offloaded, gathered once
#     trl-SIZE    whole steps of 0.5B, 1.5B and 7B against TRL's defaults, and what may be its best
#     real        only by name: Step-DPO on a real model, demo/gsm8k/one_gpu.py, in two calls of 10 minutes. PIECES
#                 is the folder with its pieces [runs/gsm8k/pieces], BUDGET the seconds of its parts [300 170 150]
#
# A stage whose result is there for this device is done; delete the file to measure anew. RESULTS is the folder for
# the JSON [bench/results], TIME the seconds to spend [585], LOSS="--skip cce" passes flags to loss.py, for a peer
# that hangs. PYTHON names the interpreter. MODEL (its tokenizer counts) and DATA are the pairs, by default the
# demo's, of small numbers and few words; measure times on text of a real kind (bench/corrupted_pairs.py).
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3} results=${RESULTS:-bench/results} model=${MODEL:-demo/model} pairs=${DATA:-demo/pairs.jsonl}
deadline=$((SECONDS + ${TIME:-585}))
status=0
mkdir -p "$results"
device=$("$python" -c "
import torch
print(torch.cuda.get_device_name().lower().replace(' ', '-') if torch.cuda.is_available() else 'cpu')") || exit
if [[ $device == cpu && -z ${DRY:-} ]]; then echo "gpu.sh: no CUDA GPU here; DRY=1 tries the commands"; exit 1; fi

stage() { # stage NAME LIMIT COMMAND...: at most LIMIT seconds, and none of those after the deadline
    local name=$1 limit=$2 json=$results/$1-$device.json left=$((deadline - SECONDS)) began=$SECONDS code=0
    shift 2
    if [[ -s $json ]]; then echo "== $name: done before, in $json"; return; fi
    if ((left < 15)); then echo "== $name: no time left; run this command again"; status=1; return; fi
    echo "== $name: $*"
    timeout -k 5 $((limit < left ? limit : left)) "$@" || code=$?
    echo "== $name: $((SECONDS - began)) s, exit status $code$( ((code == 124 || code == 137)) && echo ' (time is up)')"
    if ((code)); then status=1; return; fi
    if [[ ! -s $json ]]; then # a stage without numbers of its own
        printf '{"device": "%s", "date": "%s", "command": "%s", "result": "passed"}\n' \
            "$device" "$(date +%F)" "$*" > "$json"
    fi
}

if [[ -n ${DRY:-} ]]; then
    many=(--batch-size 4 --steps 1 --rounds 1) few=("${many[@]}") test=(--collect-only)
    demo=(--max-steps 1) recipe=$(mktemp)
    sed 's/--test-problems [^ ]*//; s/--eval-data [^ ]*/--eval-data 0.2/; s,demo/pairs,demo/eval_pairs,' demo/args > "$recipe"
    shapes=(64,32,1000 33,64,1003 --repeats 2 --skip compiled) heads=(--heads 4,2,16 --tokens 700 --repeats 2)
    settings=(--ours='--offload gradients') exact=()
    toy=$(mktemp -d)
    cp demo/pairs.jsonl "$toy/gsm8k_train.jsonl"  # problems that pairs can be made of
    real=(--pieces "$toy/pieces" --work "$toy/work" --instruction '' --dev 16 --choose 4 --chunk 8 --problems 12
          --arms sft step --rates 3e-5 --epochs 1 --batch-size 8 --answer-tokens 320
          --build --certainty 0.3 --max-rollouts 12 --rectify-samples 4 --check-rollouts 2)
    shaped() { echo "--model demo/model"; }
else
    many=(--batch-size 64 --steps 4 --rounds 2) few=(--batch-size 8 --steps 3 --rounds 1) test=() demo=() recipe=demo/args
    shapes=(1024,8192,152064 2048,3584,152064 8192,4096,151936) heads=()
    # Layers gathered once are the default with offloaded moments; else 141.5 GB of 150 by plan, too close for that.
    settings=(--ours=--compile --ours=--gather-once --ours='--offload moments'
              --ours='--offload moments --no-gather-once' --ours='--offload gradients' --ours='--offload all')
    exact=(--ours='--dtype float32')
    real=(--pieces "${PIECES:-runs/gsm8k/pieces}")
    shaped() { echo "--shape qwen2-$1 --model $model"; }
fi

steps() { # steps NAME SIZE FLAGS...: train.py on a model of that size
    local name=$1 size=$2
    shift 2
    # shellcheck disable=SC2046
    stage "$name" 540 "$python" bench/train.py $(shaped "$size") --data "$pairs" "$@" --out "$results/$name-$device.json"
}

run_stage() {
    local against_cpu=(--cpu "${exact[@]}" --only '^ours$|fp32|float32')
    case $1 in
    # A pass holds for the code that passed, so its name carries that code's hash.
    tests) stage "tests-$(cat ./*.py runtime/*.py runtime/tests/*.py pairs/*.py | sha256sum | cut -c1-12)" 300 \
        "$python" -m pytest -q -p no:cacheprovider -k cuda test_stepdpo.py runtime pairs/test_local.py \
        "${test[@]}" ;;
    demo) stage demo 200 "$python" stepdpo.py "@$recipe" --output-dir "$(mktemp -d)/out" "${demo[@]}" ;;
    same-demo) stage same-demo 200 "$python" bench/train.py --model demo/model --data demo/pairs.jsonl \
        --learning-rate 3e-5 "${few[@]}" "${against_cpu[@]}" --out "$results/same-demo-$device.json" ;;
    same-0.5b) steps same-0.5b 0.5b "${few[@]}" "${against_cpu[@]}" ;;
    loss)
        # shellcheck disable=SC2086
        stage loss 400 "$python" bench/loss.py ${LOSS:-} --shapes "${shapes[@]}" --out "$results/loss-$device.json" ;;
    attention) stage attention 200 "$python" bench/packed_attention.py "${heads[@]}" \
        --out "$results/attention-$device.json" ;;
    profile) steps profile-7b 7b "${many[@]}" --profile ;;
    steps) steps steps-7b 7b "${many[@]}" --rounds 1 "${settings[@]}" --only '^ours$|^ours, --' ;;
    trl-*) steps "$1" "${1#trl-}" "${many[@]}" --trl-micro-batch 8 32 \
        --only '^ours$|^ours, no-act|^trl$|^trl, precomputed$|liger' ;;
    real)
        if [[ -n ${DRY:-} ]]; then
            "$python" demo/gsm8k/pieces.py cut "$toy/pieces" demo/model "$toy/gsm8k_train.jsonl" --mib 1 || exit
        fi
        local limit=585 left=$((deadline - SECONDS))
        # It ends by itself 10 s before it would be stopped.
        # shellcheck disable=SC2086
        stage real $limit "$python" demo/gsm8k/one_gpu.py --out "$results/real-$device.json" \
            --budget ${BUDGET:-300 170 150} --call $(((limit < left ? limit : left) - 10)) "${real[@]}" ;;
    *) echo "gpu.sh: no stage is called $1"; exit 2 ;;
    esac
}

if (($# == 0)); then set -- tests demo same-demo same-0.5b loss attention profile steps trl-7b trl-1.5b trl-0.5b; fi
for name in "$@"; do run_stage "$name"; done
exit $status
