#!/usr/bin/env bash
# Side-by-side benchmark: GIPO, PPO and the published baselines on Meta-World, many runs at a time, resumable.
#
#   ./benchmark.sh quick        PPO and GIPO, 2 tasks, 2 seeds; then the tables and plots (about 14 minutes on 2 cores)
#   ./benchmark.sh main         the ten tasks of MT10, five seeds, all methods in the regimes fresh, recent, stale, very-stale
#   ./benchmark.sh sweep        GIPO's sigma x sigma-neg-ratio x buffer size
#   ./benchmark.sh graphgpo     GraphGPO, GiGPO and GRPO on Sokoban, ten seeds (--steps counts episodes)
#   ./benchmark.sh popo         POPO, its baselines and its ablations on Countdown, five seeds (about an hour on one core)
#   ./benchmark.sh vla          GIPO and PPO on LIBERO, tiny preset, two buffer sizes, three seeds (6 hours on 2 cores; needs requirements-vla.txt)
#   ./benchmark.sh throughput   steps per second against version 1, the stock environment and the arithmetic limit (half an hour)
#
# Options: --tasks "a b"  --seeds "1 2"  --methods "ppo gipo"  --regimes "fresh stale"  --steps N  --workers N  --dry-run  --slurm
#
# A run that is finished (a JSON with equal arguments and algorithm version in results/ or in its run folder) is skipped, an
# interrupted one resumed. Several invocations may run at once: none starts a run that another one has. Exit code 1 if a run failed.
set -euo pipefail
cd "$(dirname "$0")"

TEN="reach-v3 push-v3 pick-place-v3 door-open-v3 drawer-open-v3 drawer-close-v3 button-press-topdown-v3"
TEN+=" peg-insert-side-v3 window-open-v3 window-close-v3"
GRID="gipo gipo-0.2-0.5 gipo-0.5-0.5 gipo-0.5-1.0 gipo-1.0-0.5 gipo-1.0-1.0" # sigma, sigma-neg-ratio; gipo is 0.2, 1.0

die() { echo "error: $1" >&2; exit 2; }

suite="${1:-}"
case "$suite" in
    quick) tasks="reach-v3 button-press-topdown-v3" seeds="1 2" methods="ppo gipo-short" regimes="recent" steps=200000 ;;
    main) tasks="$TEN" seeds="1 2 3 4 5" methods="ppo ppo-clip $GRID sapo none" regimes="fresh recent stale very-stale" steps=300000 ;;
    sweep) tasks="$TEN" seeds="1 2 3" methods="$GRID" regimes="fresh recent stale very-stale" steps=300000 ;;
    graphgpo) methods="grpo gigpo graphgpo" seeds="1 2 3 4 5 6 7 8 9 10" steps=32000 ;;
    popo) tasks="countdown-3" seeds="1 2 3 4 5" methods="grpo grpo-filter dapo popo popo-stale popo-pi_old popo-behaviour" regimes="-" steps=51200 ;;
    vla) tasks="libero_spatial" seeds="1 2 3" methods="ppo gipo" regimes="recent stale" steps=102400 ;;
    throughput) ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"; [[ "$suite" = "" || "$suite" = -h || "$suite" = --help ]] || die "unknown suite '$suite': quick, main, sweep, graphgpo, popo, vla or throughput"; exit 0 ;;
esac
shift
workers=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) dry_run="" slurm=""
if [ "$suite" = vla ]; then # 6 GB for the five processes of a run
    fitting=$(($(getconf _PHYS_PAGES 2>/dev/null || echo 4000000) / 1000 * $(getconf PAGESIZE) / 6000000))
    [ "$fitting" -ge "$workers" ] || workers=$((fitting > 0 ? fitting : 1))
fi
meaningless="" # options
case $suite in graphgpo) meaningless="--tasks --regimes" ;; popo) meaningless="--regimes" ;; throughput) meaningless="--seeds --methods --regimes" ;; esac
while [ $# -gt 0 ]; do
    case "$1" in
        --tasks | --seeds | --methods | --regimes | --steps | --workers)
            [ $# -ge 2 ] || die "$1 needs a value"
            [[ " $meaningless " != *" $1 "* ]] || die "$1 means nothing for $suite: drop it"
            declare "${1#--}=$2" && shift 2 ;;
        --dry-run) dry_run=1 && shift ;;
        --slurm) slurm=1 && shift ;;
        *) die "unknown option $1: see ./benchmark.sh" ;;
    esac
done
[[ "$workers" =~ ^[1-9][0-9]*$ ]] || die "--workers $workers must be a positive number"
[[ "${steps-1}" =~ ^[1-9][0-9]*$ ]] || die "--steps $steps must be a positive integer"
for option in tasks seeds methods regimes; do
    [[ "${!option--}" =~ ^\ *[A-Za-z0-9_.:/-][A-Za-z0-9_.:/\ -]*$ ]] || die "--$option '${!option}' must be names with spaces between them"
done
for seed in ${seeds-}; do
    [[ "$seed" =~ ^(0|[1-9][0-9]*)$ ]] || die "--seeds: '$seed' must be an integer, 0 or more"
done
python="${PYTHON:-.venv/bin/python}"
[ -x "$(command -v "$python")" ] || die "$python not found: set up the environment as the README says, or set PYTHON"
quoted=$(printf %q "$python") # as a command line has it
if [ "$suite" = throughput ]; then
    run=("$python" tests/throughput.py --env-id "${tasks:-reach-v3}" --steps "${steps:-30000}" --output results/throughput.json)
    if [ -n "$dry_run" ]; then printf '%q ' "${run[@]}" && echo; else "${run[@]}"; fi
    exit
fi

# -------------------- The matrix --------------------
script_of() { # method, regime -> script and flags
    local buffer rest
    case $1 in # popo_countdown.py: each method is its own regime; NAME-fast: three times the step size
        grpo*-fast | dapo-fast | popo*-fast)
            rest=$(script_of "${1%-fast}" "$2") || exit 2
            echo "$rest --learning-rate 3e-4" && return ;;
        grpo | grpo-filter | dapo | popo) echo "popo_countdown.py --method $1" && return ;;
        popo-stale) echo "popo_countdown.py --replay-age-min 10 --max-age 20 --buffer-groups 512" && return ;;
        popo-pi_old | popo-behaviour) echo "popo_countdown.py --objective ${1#popo-}" && return ;;
        popo-ineff) echo "popo_countdown.py --replay ineff" && return ;;
        popo-uncapped) echo "popo_countdown.py --is-cap inf" && return ;;
    esac
    case $2 in
        fresh) buffer=0 ;; recent) buffer=5120 ;; stale) buffer=20000 ;; very-stale) buffer=100000 ;; on-policy) buffer=0 ;;
        *) die "--regimes: unknown regime '$2', choose from fresh recent stale very-stale" ;;
    esac
    # All replay methods alike; segments of 16 and minibatches of 128, the defaults since 2026-11-26, are the methods ...-short.
    local common="--num-steps 64 --minibatch-size 512"
    case $1 in
        ppo-stored | ppo-short | ppo-lr-* | paper*-short | *-lr-) die "--methods: '$1' is no method: that flag would do nothing, or is not for it" ;;
        *-stored) # advantages of collection time
            rest=$(script_of "${1%-stored}" "$2") || exit 2
            echo "$rest --no-recompute-advantages" ;;
        *-lr-*) # another step size of the actor
            rest=$(script_of "${1%-lr-*}" "$2") || exit 2
            echo "$rest --learning-rate ${1##*-lr-}" ;;
        *-short) # the defaults of gipo_continuous.py: segments of 16 steps, and four times as many updates of a quarter of the size
            rest=$(script_of "${1%-short}" "$2") || exit 2
            echo "${rest/ $common/} --num-steps 16 --minibatch-size 128" ;;
        paper | paper-ppo) # the authors' settings, with one rollout of 512 steps instead of 500
            rest="--policy-head categorical --num-bins 256 --ratio per-dim --no-recompute-advantages --kl-coef 0.1 --ent-coef 0 --updates-per-iteration 5"
            rest+=" --critic-learning-rate 3e-3 --lr-schedule cosine --critic-lr-schedule cosine --lr-warmup 0.001"
            rest+=" --reward-scale 0.001 --max-grad-norm 1.0 --adv-std-floor 0 --buffer-size $buffer"
            rest+=" $common"
            [ "$1" = paper-ppo ] || rest+=" --sigma 1"
            [ "$1 $2" != "paper-ppo fresh" ] || rest+=" --update-epochs 5" # on-policy, where --updates-per-iteration is not read
            echo "$([ "$1" = paper ] && echo gipo_continuous.py || echo ppo_baseline.py) $rest" ;;
        ppo) echo "ppo_baseline.py" ;; # textbook: its own defaults
        ppo-clip) # all but the objective as in GIPO: 10 updates of 512 steps per 512 new steps, head, ratio, entropy
            rest="--buffer-size $buffer $common --policy-head categorical --ratio per-dim --ent-coef 0.001"
            echo "ppo_baseline.py $rest --$([ "$2" = fresh ] && echo update-epochs || echo updates-per-iteration) 10" ;;
        ppo-clip-[0-9.]*) echo "$(script_of ppo-clip "$2") --clip-coef ${1#ppo-clip-}" ;; # with another epsilon
        sapo | none) echo "gipo_continuous.py --buffer-size $buffer $common --trust-weight $1" ;;
        gipo) echo "gipo_continuous.py --buffer-size $buffer $common" ;;
        *)
            [[ "$1" =~ ^gipo-([0-9.]+)-([0-9.]+)$ ]] || die "--methods: unknown method '$1', choose from ppo ppo-clip ppo-clip-EPSILON sapo none gipo gipo-SIGMA-NEGRATIO, any of them with -stored, -short or -lr-STEPSIZE, paper, paper-ppo"
            echo "gipo_continuous.py --buffer-size $buffer $common --sigma ${BASH_REMATCH[1]} --sigma-neg-ratio ${BASH_REMATCH[2]}" ;;
    esac
}

vla_script() { # method, regime -> script and flags; a rollout of the tiny preset has 1,024 steps
    local buffer
    case $2 in
        fresh) buffer=1024 ;; recent) buffer=10240 ;; stale) buffer=102400 ;; # stale keeps the whole run
        *) die "--regimes: unknown regime '$2', choose from fresh recent stale" ;;
    esac
    case $1 in
        gipo | ppo | sapo | none) echo "gipo_vla_libero.py --preset tiny --trust-weight $1 --buffer-size $buffer" ;;
        gipo-*-*) echo "$(vla_script gipo "$2") --sigma $(cut -d- -f2 <<<"$1") --sigma-neg-ratio ${1##*-}" ;;
        ppo-*) echo "$(vla_script ppo "$2") --clip-coef ${1#ppo-}" ;;
        *) die "--methods: unknown method '$1', choose from gipo ppo sapo none gipo-SIGMA-NEGRATIO ppo-EPSILON" ;;
    esac
}

graphgpo_flags() { # method -> flags of graphgpo_sokoban.py
    local rest
    case $1 in
        grpo | gigpo | graphgpo) echo "--advantage $1" ;;
        *-step) rest=$(graphgpo_flags "${1%-step}") || exit 2; echo "$rest --beta-episode 0" ;;
        *-steps-norm) rest=$(graphgpo_flags "${1%-steps-norm}") || exit 2; echo "$rest --episode-norm steps" ;;
        graphgpo-omega-*) echo "--advantage graphgpo --omega ${1#graphgpo-omega-}" ;;
        *-entropy-*) rest=$(graphgpo_flags "${1%-entropy-*}") || exit 2; echo "$rest --ent-coef ${1##*-entropy-}" ;;
        graphgpo-inf) echo "--advantage graphgpo --unreachable-distance inf" ;;
        *) die "--methods: unknown method '$1', choose from grpo gigpo graphgpo, with -step, -steps-norm or -entropy-X, graphgpo-omega-X, graphgpo-inf" ;;
    esac
}

run_dir="runs/benchmark-$steps" eval="--eval-every 0" overlap=" --no-overlap" # as many runs as cores: one process each
[ "$suite" != popo ] || run_dir="runs/popo-$steps" eval="--eval-every 5120" overlap=""
[ "$suite" != vla ] || run_dir="runs/vla-tiny" # without the steps: demonstrations and clones are shared
commands=""
if [ "$suite" = graphgpo ]; then
    run_dir="runs/graphgpo-$steps" regimes=""
    for seed in $seeds; do
        for method in $methods; do
            flags=$(graphgpo_flags "$method")
            commands+="$quoted graphgpo_sokoban.py --env-id Sokoban $flags --seed $seed --exp-name $method"
            commands+=" --total-episodes $steps --run-dir $run_dir"$'\n'
        done
    done
    methods=""
fi
for seed in $seeds; do # seeds outside: every cell has a first number early
    for method in $methods; do
        if [ "$suite" = vla ]; then
            for regime in $regimes; do
                script=$(vla_script "$method" "$regime")
                for task in $tasks; do
                    commands+="$quoted $script --suite $task --seed $seed --exp-name ${method}_$regime"
                    commands+=" --total-timesteps $steps --run-dir $run_dir $eval"$'\n'
                done
            done
            continue
        fi
        for regime in $([ "$method" = ppo ] && echo on-policy || echo "$regimes"); do
            script=$(script_of "$method" "$regime")
            [ "$regime" != - ] || regime=""
            for task in $tasks; do
                commands+="$quoted $script --env-id $task --seed $seed --exp-name ${method}${regime:+_$regime} --total-timesteps $steps"
                commands+=" --run-dir $run_dir $eval$overlap"$'\n'
            done
        done
    done
done
total=$(printf %s "$commands" | wc -l)
pending=$(printf %s "$commands" | "$python" report.py --pending)
left=$(printf %s "${pending:+$pending$'\n'}" | wc -l)

if [ -n "$dry_run" ]; then
    printf '%s\n' "$pending"
    echo "# $left of $total runs are left" >&2
    exit
fi
mkdir -p "$run_dir"

# -------------------- Running it --------------------
run() { # one command, unless another invocation has it; a run that was begun is resumed
    local task seed name folder resume="" code=0
    [ -z "${main:-}" ] || kill -0 "$main" 2>/dev/null || exit 255 # benchmark.sh itself was killed: xargs ends here
    task=$(sed -E 's/.*--(env-id|suite) ([^ ]*).*/\2/' <<<"$1") seed=$(sed 's/.*--seed \([^ ]*\).*/\1/' <<<"$1")
    name=$(sed 's/.*--exp-name \([^ ]*\).*/\1/' <<<"$1")
    folder="$run_dir/${task//\//-}__${name}__$seed"
    # Python's flock, since macOS has no command of that name. Released when this shell ends or opens the next run's lock.
    { exec 9>>"$folder.lock"; } 2>/dev/null && "$python" -c 'import fcntl
try: fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: exit(75)' 2>/dev/null || code=$?
    if [ $code -eq 75 ]; then
        echo "$folder: another invocation has it"
        return
    elif [ $code -ne 0 ]; then
        echo "$folder.lock cannot be locked" >>"$failures"
    else
        [ -z "$(ls "$folder" 2>/dev/null)" ] || resume="--resume" # a lone .lock is no run yet
        OMP_NUM_THREADS=1 "$python" ${1#"$quoted "} $resume >>"$folder.log" 2>&1 || code=$?
        [ $code -eq 0 ] || echo "$folder.log (exit code $code)" >>"$failures"
    fi
    echo >>"$finished"
    local count now elapsed seconds_left
    count=$(wc -l <"$finished") now=$(date +%s)
    elapsed=$((now - start)) seconds_left=$(((now - start) * (left - count) / count))
    printf '%d of %d runs  %dm%02ds  left %dm%02ds  %s %s\n' "$count" "$left" $((elapsed / 60)) $((elapsed % 60)) \
        $((seconds_left / 60)) $((seconds_left % 60)) "$folder" "$([ $code -eq 0 ] || echo FAILED)"
}

if [ -n "$slurm" ]; then
    [ "$left" -gt 0 ] || { echo "all $total runs are finished: nothing to submit"; exit; }
    jobs=$((left < 1000 ? left : 1000)) # an array of more is refused by Slurm's defaults, so each job takes every 1000th run
    cat >"$run_dir/array.sbatch" <<SBATCH
#!/bin/bash
#SBATCH --job-name=gipo-benchmark
#SBATCH --array=1-$jobs
#SBATCH --cpus-per-task=$([ "$suite" = vla ] && echo 2 || echo 1)
#SBATCH --mem=$([ "$suite" = vla ] && echo 8G || echo 2G)
#SBATCH --time=04:00:00
#SBATCH --output=$run_dir/slurm-%A_%a.out
cd $(printf %q "$PWD")
commands=\$(cat <<'COMMANDS'
$pending
COMMANDS
)
run_dir=$run_dir python=$quoted quoted=$(printf %q "$quoted") failures=\$(mktemp) finished=\$(mktemp) start=\$(date +%s)
left=\$((($left - SLURM_ARRAY_TASK_ID) / $jobs + 1))
$(declare -f run)
for ((i = SLURM_ARRAY_TASK_ID; i <= $left; i += $jobs)); do run "\$(sed -n "\${i}p" <<<"\$commands")"; done
cat "\$failures" && [ ! -s "\$failures" ]
SBATCH
    echo "sbatch $run_dir/array.sbatch     # $left runs; afterwards: $quoted report.py"
    exit
fi

start=$(date +%s) finished=$(mktemp) failures=$(mktemp) main=$$
trap 'rm -f "$finished" "$failures"' EXIT
export -f run
export run_dir start finished failures left main python quoted
echo "$left of $total runs are left, $workers at a time, in $run_dir"
[ "$left" -eq 0 ] || printf '%s\n' "$pending" | tr '\n' '\0' | xargs -0 -n 1 -P "$workers" bash -c 'run "$0"'
if [ -s "$failures" ]; then
    echo "$(wc -l <"$failures") runs failed:" >&2
    cat "$failures" >&2
fi
"$python" report.py
[ "$suite" != quick ] || cat "results/benchmark-$steps-v"*.md
[ ! -s "$failures" ]
