#!/usr/bin/env bash
# Everything that wants a GPU, in one command of at most 10 minutes on one GPU:
#
#     bench/gpu.sh [RESULTS]          # RESULTS: folder for the JSON, default bench/results
#
# The CUDA tests, then the tables of loss.py and train.py. A stage whose JSON is there for this device is done:
# what did not fit in the time runs when the same command is given again (train.py goes on within a stage). Delete
# the JSON to measure anew. LOSS="--skip cce" passes flags to loss.py, for a peer that hangs. PYTHON names the
# interpreter. MODEL (its tokenizer counts) and DATA are the pairs of train.py, by default the demo's, which are short.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
results=${1:-bench/results}
deadline=$((SECONDS + 585))
status=0
device=$("$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))") || exit
mkdir -p "$results"

stage() { # stage NAME LIMIT COMMAND...: at most LIMIT seconds, and none of those after the deadline
    local name=$1 limit=$2 json=$results/$1-$device.json left=$((deadline - SECONDS)) began=$SECONDS code=0
    shift 2
    if [[ -s $json ]]; then echo "== $name: done before, in $json"; return; fi
    if ((left < 15)); then echo "== $name: no time left; run this command again"; status=1; return 1; fi
    echo "== $name: $*"
    timeout -k 5 $((limit < left ? limit : left)) "$@" || code=$?
    echo "== $name: $((SECONDS - began)) s, exit status $code$( ((code == 124 || code == 137)) && echo ' (time is up)')"
    if ((code)); then status=1; fi
    return $code
}

# A pass holds for the code that passed, so its name carries that code's hash.
code=$(cat kernels.py stepdpo.py data.py attention.py storage.py test_stepdpo.py | sha256sum | cut -c1-12)
if stage "tests-$code" 200 "$python" -m pytest -p no:cacheprovider -k cuda && [[ ! -s $results/tests-$code-$device.json ]]
then
    rm -f "$results"/tests-*-"$device.json"
    printf '{"device": "%s", "date": "%s", "command": "pytest -k cuda", "result": "passed"}\n' \
        "$device" "$(date +%F)" > "$results/tests-$code-$device.json"
fi
# shellcheck disable=SC2086
stage loss 300 "$python" bench/loss.py ${LOSS:-} --out "$results/loss-$device.json"
for shape in qwen2-7b qwen2-1.5b qwen2-0.5b; do # ours, TRL's defaults, and what may be TRL's best
    stage "train-$shape" 500 "$python" bench/train.py --shape "$shape" --model "${MODEL:-demo/model}" \
        --data "${DATA:-demo/pairs.jsonl}" --batch-size 64 --steps 6 --trl-micro-batch 8 32 \
        --only '^ours|^trl$|^trl, precomputed$|liger' --out "$results/train-$shape-$device.json"
done
exit $status
