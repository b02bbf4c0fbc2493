#!/usr/bin/env bash
# What needs a GPU, in one go, on a machine that has torch, accelerate and transformers but perhaps no registry.
#
#     bash benchmarks/on_gpu.sh checks speed       # about six minutes on an H200: the tests marked gpu, then the timings
#     bash benchmarks/on_gpu.sh scripts            # the tests of the training scripts, which take the GPU they find
#     bash benchmarks/on_gpu.sh rest               # the script's loop, text-to-image steps, alignment, memory
#     bash benchmarks/on_gpu.sh evidence           # dense against routed on avatars (DATA=FILE.npz), five minutes
#     bash benchmarks/on_gpu.sh recipe             # the pieces of the recipe on avatars (DATA=FILE.npz), seven minutes
#     DEVICE=cpu SMOKE=1 bash benchmarks/on_gpu.sh checks speed    # does it start? tiny models, nothing compiled
#
# Where diffusers is missing, its wheel and those that it needs are to lie in .whl. Results go to $OUT, by default
# benchmarks/results; each part has a time limit and is written as it ends, so that a run that is cut keeps what was
# done. Exits with 1 if a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
export OUT=${OUT:-benchmarks/results} PYTHONPATH="$PWD/src:$PWD/.site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
if ! $python -c 'import diffusers' 2>/dev/null; then
    $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .site .whl/*.whl || exit
fi

device=${DEVICE:-cuda} failed=0 started=$SECONDS commands=
part() { # seconds, name, command ...
    local limit=$1 name=$2
    shift 2
    echo "== $name ($((SECONDS - started)) s)"
    timeout -k 10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    local status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || { failed=1 && echo "== $name failed with status $status"; }
}
bench() { # seconds, name, script, flags ...
    local limit=$1 name=$2 script=$3
    shift 3
    set -- --device "$device" "$@" --output "$OUT/$name.json"
    if [ -n "${SMOKE:-}" ]; then
        commands+="$name $script $(printf '%q ' "$@")"$'\n'  # run at the end, in one process
    else
        part "$limit" "$name" $python "benchmarks/$script" "$@"
    fi
}

if [ -n "${SMOKE:-}" ]; then
    large="--presets S/8" base="--presets S/8" preset=S/8 short=16 long=64 suffix=smoke
    speed="--repeats 2 --warmup 1" few=$speed batches=(2 2 2 2) dtype=float32 runs=1 turn=2
    many="-n 0 -k checkpoint" scripts="-n 0 -k stopped_run_of_muon" texts=prx-s
    evidence="--seeds 0 --width 32 --heads 1 --depth 6 --steps 10 --evaluations 2 --samples_at 1 --num_samples 20"
    evidence+=" --judge_steps 10 --heldout_per_level 4 --sampling_steps 2 --batch_size 4"
    recipe="$speed --seeds 0 --workers 2 --alone= --width 32 --heads 1 --depth 6 --steps 4 --batch_size 4 --judge_steps 10"
    recipe+=" --variants dense,tread+align+muon,sprint+modern --lrs 1e-3 --muon_lrs 1e-3 --sweep_steps 2 --evaluations 2"
    recipe+=" --teacher_steps 4 --teacher_batch_size 4 --heldout_per_level 4 --num_samples 20 --sampling_steps 2"
else
    large="--presets XL/2" base="--presets B/2,S/2" preset=XL/2 short=256 long=1024 suffix=gpu
    speed="--repeats 15 --warmup 3" few="--repeats 5 --warmup 1" batches=(128 256 32 64) dtype=bfloat16 runs=10 turn=10
    many="-n 12" scripts="-n 14" texts=prx-s,sd3-s
    evidence="--dtype bfloat16 --compile --seeds 0,1,2 --width 384 --heads 6 --steps 900 --batch_size 256 --lr 1e-3"
    evidence+=" --samples_at 2 --num_samples 2000 --eval_batch_size 1000 --heldout_per_level 200 --judge_steps 600"
    evidence+=" --warmup 3 --time_limit 330"
    recipe="--dtype bfloat16 --compile --workers 6 --time_limit 410"
fi

for what in "$@"; do
    case $what in
    checks)
        part 150 tests_gpu $python -m pytest tests/gpu tests/models/test_transformer_features.py -m gpu -v $many --durations 5
        ;;
    scripts)
        part 200 tests_scripts $python -m pytest tests/examples/test_{train_*,sample,evaluate_tread}.py -m "not long" -q \
            $scripts --durations 5
        ;;
    speed)
        bench 150 train_step_$suffix train_step.py $large --tokens $short --batch_size "${batches[0]}" --modes eager,blocks \
            --dtype $dtype $speed
        bench 60 profile_step_$suffix profile_step.py --preset $preset --tokens $short --batch_size "${batches[0]}" \
            --mode blocks --dtype $dtype
        bench 40 routing_overhead_$suffix routing_overhead.py --preset $preset --dtype $dtype $speed \
            --shapes "${batches[0]}x$short,${batches[2]}x$long"
        bench 80 sampling_$suffix sampling.py --preset $preset --tokens $short --batch_size "${batches[3]}" --compile \
            --num_inference_steps $runs --dtype $dtype $few
        bench 70 train_step_base_$suffix train_step.py $base --tokens $short --batch_size "${batches[1]}" --modes blocks \
            --no-peer --dtype $dtype $speed
        bench 70 train_step_long_$suffix train_step.py $large --tokens $long --batch_size "${batches[2]}" --modes blocks \
            --no-peer --dtype $dtype $speed
        bench 70 train_step_batch_256_$suffix train_step.py $large --tokens $short --batch_size "${batches[1]}" \
            --modes blocks --no-peer --dtype $dtype $speed
        ;;
    rest)
        bench 90 training_loop_$suffix training_loop.py --preset $preset --tokens $short --batch_size "${batches[0]}" \
            --steps_per_turn $turn --compile --dtype $dtype $few
        bench 60 text_step_$suffix text_step.py --presets $texts --tokens $long --batch_size "${batches[2]}" --dtype $dtype $speed
        bench 60 alignment_step_$suffix alignment_step.py --preset $preset --tokens $short --batch_size "${batches[0]}" \
            --dtype $dtype $few
        [ -n "${SMOKE:-}" ] || bench 300 memory_gpu memory.py --dtype $dtype --preset $preset --batch_sizes 8,32 \
            --check_batch_size 64 --search
        ;;
    evidence)
        bench 400 convergence_$suffix convergence.py --data "${DATA:-avatars.npz}" $evidence \
            --plot "$OUT/convergence_$suffix.png" --samples "$OUT/convergence_samples_$suffix.png"
        ;;
    recipe)
        # Seven processes compile at once.
        export TORCHINDUCTOR_COMPILE_THREADS=4
        bench 445 recipe_$suffix recipe.py --data "${DATA:-avatars.npz}" $recipe --plot "$OUT/recipe_$suffix.png"
        ;;
    *)
        echo "Expected checks, scripts, speed, rest, evidence or recipe, got $what." >&2
        exit 2
        ;;
    esac
done
[ -z "$commands" ] || part 600 benchmarks_smoke $python benchmarks/smoke.py <<<"${commands%$'\n'}"
exit $failed
