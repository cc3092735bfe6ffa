#!/usr/bin/env bash
# Side-by-side benchmark: GIPO, PPO and the published baselines on Meta-World, many runs at a time, resumable.
#
#   ./benchmark.sh quick        GIPO, PPO's clip on the same replay (0.2 and 0.5) and textbook PPO: 2 tasks, 1 seed (a quarter of an hour on 2 cores)
#   ./benchmark.sh main         eight Meta-World tasks, six methods, replay of 5,120 and 20,000 steps, three seeds (about 15 hours on 2 cores)
#   ./benchmark.sh age          five of the tasks with replay of 100,000 and of 512 steps (about 10 hours)
#   ./benchmark.sh authors      the ten tasks of the GIPO authors' own experiments, replay of 20,000 steps, one seed
#   ./benchmark.sh tune         clip and learning rate of PPO, sigma and learning rate of GIPO, on two tasks and the seeds 1 and 2
#   ./benchmark.sh setup        GIPO without one part of its setup, textbook PPO with the bins: three tasks, three seeds (three hours)
#   ./benchmark.sh gymnasium    five MuJoCo tasks of Gymnasium, 1,000,000 steps
#   ./benchmark.sh graphgpo     GraphGPO, GiGPO and GRPO on Sokoban, ten seeds (--steps counts episodes)
#   ./benchmark.sh popo         POPO, its baselines and its ablations on Countdown, five seeds (about an hour on one core)
#   ./benchmark.sh lag          six objectives on Countdown with answers that are 0, 4 and 16 iterations old, five seeds (20 minutes on 2 cores)
#   ./benchmark.sh smollm2      POPO, GRPO, GRPO-filter and DAPO on a pretrained language model, three seeds (setup: docs/popo_countdown.md)
#   ./benchmark.sh vla          GIPO and PPO on LIBERO, tiny preset, two buffer sizes, three seeds (6 hours on 2 cores; needs requirements-vla.txt)
#   ./benchmark.sh throughput   steps per second against version 1, the stock environment and the arithmetic limit (half an hour)
#
# Options: --tasks "a b"  --seeds "1 2"  --methods "ppo gipo"  --regimes "5120 20000"  --steps N  --workers N  --dry-run  --slurm
#
# A run that is finished (a JSON with equal arguments and algorithm version in results/ or in its run folder) is skipped, an
# interrupted one resumed. Several invocations may run at once: none starts a run that another one has. Exit code 1 if a run failed.
set -euo pipefail
cd "$(dirname "$0")"

EIGHT="reach-v3 push-v3 door-open-v3 drawer-open-v3 drawer-close-v3 button-press-topdown-v3 window-open-v3 window-close-v3" # of MT10's ten
FIVE="button-press-topdown-v3 door-open-v3 drawer-open-v3 push-v3 window-open-v3"
AUTHORS="assembly-v3 basketball-v3 bin-picking-v3 box-close-v3 button-press-v3 button-press-wall-v3 button-press-topdown-v3"
AUTHORS+=" button-press-topdown-wall-v3 coffee-button-v3 coffee-pull-v3"
MUJOCO="HalfCheetah-v5 Hopper-v5 Walker2d-v5 Ant-v5 Swimmer-v5"
SIX="gipo ppo-clip-0.2 ppo-clip-0.5 sapo none ppo"

# -------------------- Methods --------------------
# Suite, name, script and flags; a name without more is the script as it is. To add a method, add a line.
# "replay" stands for --buffer-size and the size that --regimes names.
PPO="ppo_baseline.py replay --num-steps 16 --minibatch-size 128 --policy-head categorical --ratio per-dim --ent-coef 0.001" # as GIPO but for the objective
AGE_50="--replay-age-min 50 --max-age 200 --buffer-groups 2048 --max-reuse 100" # replay at least 50 iterations old
METHODS="
core      gipo                    gipo_continuous.py replay
core      gipo-sigma-0.1          gipo_continuous.py replay --sigma 0.1
core      gipo-sigma-0.5          gipo_continuous.py replay --sigma 0.5
core      gipo-lr-6e-4            gipo_continuous.py replay --learning-rate 6e-4
core      gipo-sigma-0.1-lr-6e-4  gipo_continuous.py replay --sigma 0.1 --learning-rate 6e-4
core      gipo-sigma-0.5-lr-6e-4  gipo_continuous.py replay --sigma 0.5 --learning-rate 6e-4
core      gipo-gaussian           gipo_continuous.py replay --policy-head gaussian
core      gipo-joint              gipo_continuous.py replay --ratio joint --sigma 0.4 --ent-coef 0.004
core      gipo-no-recompute       gipo_continuous.py replay --no-recompute-advantages
core      gipo-ent-coef-0         gipo_continuous.py replay --ent-coef 0
core      sapo                    gipo_continuous.py replay --trust-weight sapo
core      none                    gipo_continuous.py replay --trust-weight none
core      ppo                     ppo_baseline.py
core      ppo-categorical         ppo_baseline.py --policy-head categorical
core      ppo-clip-0.1            $PPO --clip-coef 0.1
core      ppo-clip-0.2            $PPO --clip-coef 0.2
core      ppo-clip-0.3            $PPO --clip-coef 0.3
core      ppo-clip-0.5            $PPO --clip-coef 0.5
core      ppo-clip-0.8            $PPO --clip-coef 0.8
core      ppo-clip-0.1-lr-6e-4    $PPO --clip-coef 0.1 --learning-rate 6e-4
core      ppo-clip-0.2-lr-6e-4    $PPO --clip-coef 0.2 --learning-rate 6e-4
core      ppo-clip-0.3-lr-6e-4    $PPO --clip-coef 0.3 --learning-rate 6e-4
core      ppo-clip-0.5-lr-6e-4    $PPO --clip-coef 0.5 --learning-rate 6e-4
graphgpo  grpo                    graphgpo_sokoban.py --advantage grpo
graphgpo  gigpo                   graphgpo_sokoban.py --advantage gigpo
graphgpo  graphgpo                graphgpo_sokoban.py --advantage graphgpo
graphgpo  gigpo-step              graphgpo_sokoban.py --advantage gigpo --beta-episode 0
graphgpo  graphgpo-step           graphgpo_sokoban.py --advantage graphgpo --beta-episode 0
graphgpo  gigpo-entropy-0.03      graphgpo_sokoban.py --advantage gigpo --ent-coef 0.03
graphgpo  graphgpo-entropy-0.03   graphgpo_sokoban.py --advantage graphgpo --ent-coef 0.03
graphgpo  graphgpo-omega-0.5      graphgpo_sokoban.py --advantage graphgpo --omega 0.5
graphgpo  graphgpo-inf            graphgpo_sokoban.py --advantage graphgpo --unreachable-distance inf
graphgpo  gigpo-lr-3e-4           graphgpo_sokoban.py --advantage gigpo --learning-rate 3e-4
graphgpo  gigpo-lr-3e-3           graphgpo_sokoban.py --advantage gigpo --learning-rate 3e-3
graphgpo  graphgpo-lr-3e-4        graphgpo_sokoban.py --advantage graphgpo --learning-rate 3e-4
graphgpo  graphgpo-lr-3e-3        graphgpo_sokoban.py --advantage graphgpo --learning-rate 3e-3
graphgpo  gigpo-step-gym          graphgpo_sokoban.py --advantage gigpo --beta-episode 0 --reward gym-sokoban
graphgpo  graphgpo-step-gym       graphgpo_sokoban.py --advantage graphgpo --beta-episode 0 --reward gym-sokoban
popo      grpo                    popo_countdown.py --method grpo
popo      grpo-filter             popo_countdown.py --method grpo-filter
popo      dapo                    popo_countdown.py --method dapo
popo      popo                    popo_countdown.py --method popo
popo      popo-stale              popo_countdown.py --replay-age-min 10 --max-age 20 --buffer-groups 512
popo      popo-pi_old             popo_countdown.py --objective pi_old
popo      popo-behaviour          popo_countdown.py --objective behaviour
popo      popo-ineff              popo_countdown.py --replay ineff
popo      popo-uncapped           popo_countdown.py --is-cap inf
popo      popo-gipo               popo_countdown.py --objective gipo
popo      popo-sapo               popo_countdown.py --objective sapo
popo      popo-cispo              popo_countdown.py --objective cispo
popo      popo-m2po               popo_countdown.py --objective m2po
popo      grpo-gipo               popo_countdown.py --method grpo --objective gipo
popo      grpo-sapo               popo_countdown.py --method grpo --objective sapo
popo      grpo-cispo              popo_countdown.py --method grpo --objective cispo
popo      grpo-m2po               popo_countdown.py --method grpo --objective m2po
popo      grpo-decoupled-lag-4    popo_countdown.py --method grpo --lag 4
popo      grpo-pi_old-lag-4       popo_countdown.py --method grpo --objective pi_old --lag 4
popo      grpo-gipo-lag-4         popo_countdown.py --method grpo --objective gipo --lag 4
popo      grpo-sapo-lag-4         popo_countdown.py --method grpo --objective sapo --lag 4
popo      grpo-cispo-lag-4        popo_countdown.py --method grpo --objective cispo --lag 4
popo      grpo-m2po-lag-4         popo_countdown.py --method grpo --objective m2po --lag 4
popo      grpo-decoupled-lag-16   popo_countdown.py --method grpo --lag 16
popo      grpo-pi_old-lag-16      popo_countdown.py --method grpo --objective pi_old --lag 16
popo      grpo-gipo-lag-16        popo_countdown.py --method grpo --objective gipo --lag 16
popo      grpo-gipo-sigma-1       popo_countdown.py --method grpo --objective gipo --sigma 1
popo      grpo-gipo-sigma-1-lag-4 popo_countdown.py --method grpo --objective gipo --lag 4 --sigma 1
popo      grpo-gipo-geometric     popo_countdown.py --method grpo --objective gipo --is-level geometric
popo      grpo-gipo-geometric-lag-4 popo_countdown.py --method grpo --objective gipo --lag 4 --is-level geometric
popo      grpo-gipo-sigma-1-lag-16 popo_countdown.py --method grpo --objective gipo --lag 16 --sigma 1
popo      grpo-gipo-sigma-2-lag-16 popo_countdown.py --method grpo --objective gipo --lag 16 --sigma 2
popo      grpo-gipo-sigma-4-lag-16 popo_countdown.py --method grpo --objective gipo --lag 16 --sigma 4
popo      grpo-gipo-sequence-lag-16 popo_countdown.py --method grpo --objective gipo --lag 16 --is-level sequence --sigma 2
popo      grpo-gipo-geometric-lag-16 popo_countdown.py --method grpo --objective gipo --lag 16 --is-level geometric
popo      grpo-sapo-lag-16        popo_countdown.py --method grpo --objective sapo --lag 16
popo      grpo-cispo-lag-16       popo_countdown.py --method grpo --objective cispo --lag 16
popo      grpo-m2po-lag-16        popo_countdown.py --method grpo --objective m2po --lag 16
popo      grpo-fast               popo_countdown.py --method grpo --learning-rate 3e-4
popo      popo-fast               popo_countdown.py --method popo --learning-rate 3e-4
popo      popo-stale-fast         popo_countdown.py --replay-age-min 10 --max-age 20 --buffer-groups 512 --learning-rate 3e-4
popo      popo-pi_old-fast        popo_countdown.py --objective pi_old --learning-rate 3e-4
popo      popo-age-50-fast        popo_countdown.py $AGE_50 --learning-rate 3e-4
popo      popo-age-50-uncapped-fast  popo_countdown.py $AGE_50 --learning-rate 3e-4 --is-cap inf
popo      grpo-lr-1e-3            popo_countdown.py --method grpo --learning-rate 1e-3
popo      popo-lr-1e-3            popo_countdown.py --method popo --learning-rate 1e-3
popo      popo-pi_old-lr-1e-3     popo_countdown.py --objective pi_old --learning-rate 1e-3
vla       gipo                    gipo_vla_libero.py replay --preset tiny --trust-weight gipo
vla       ppo                     gipo_vla_libero.py replay --preset tiny --trust-weight ppo
vla       sapo                    gipo_vla_libero.py replay --preset tiny --trust-weight sapo
vla       none                    gipo_vla_libero.py replay --preset tiny --trust-weight none
"

die() { echo "error: $1" >&2; exit 2; }

suite="${1:-}"
case "$suite" in
    quick) tasks="reach-v3 button-press-topdown-v3" seeds="1" methods="gipo ppo-clip-0.2 ppo-clip-0.5 ppo" regimes="5120" steps=200000 ;;
    main) tasks="$EIGHT" seeds="4 5 6" methods="$SIX" regimes="5120 20000" steps=300000 ;;
    age) tasks="$FIVE" seeds="4 5 6" methods="$SIX" regimes="100000 512" steps=300000 ;;
    authors) tasks="$AUTHORS" seeds="4" methods="gipo ppo-clip-0.2 ppo-clip-0.5" regimes="20000" steps=300000 ;;
    tune) tasks="button-press-topdown-v3 door-open-v3" seeds="1 2" regimes="5120" steps=300000
        methods=$(awk '$1 == "core" && $2 ~ /^(gipo(-sigma-0.[15])?|ppo-clip-0.[1235])(-lr-6e-4)?$/ { print $2 }' <<<"$METHODS" | tr '\n' ' ') ;;
    setup) tasks="door-open-v3 drawer-open-v3 button-press-topdown-v3" seeds="4 5 6" regimes="5120" steps=300000
        methods="gipo gipo-gaussian gipo-joint gipo-no-recompute gipo-ent-coef-0 ppo ppo-categorical" ;;
    gymnasium) tasks="$MUJOCO" seeds="4 5 6" methods="gipo ppo-clip-0.2 ppo" regimes="5120" steps=1000000 ;;
    graphgpo) tasks="Sokoban" seeds="1 2 3 4 5 6 7 8 9 10" methods="grpo gigpo graphgpo" regimes="-" steps=32000 ;;
    popo) tasks="countdown-3" seeds="1 2 3 4 5" methods="grpo grpo-filter dapo popo popo-stale popo-pi_old popo-behaviour" regimes="-" steps=51200 ;;
    lag) tasks="countdown-3" seeds="1 2 3 4 5" regimes="-" steps=51200
        methods="grpo $(awk '$1 == "popo" && $2 ~ /^grpo-([^-]*-lag-.*|gipo|sapo|cispo|m2po)$/ { print $2 }' <<<"$METHODS" | tr '\n' ' ')" ;;
    smollm2) tasks="countdown-2" seeds="4 5 6" methods="popo grpo grpo-filter dapo" regimes="-" steps=768 ;;
    vla) tasks="libero_spatial" seeds="1 2 3" methods="ppo gipo" regimes="recent stale" steps=102400 ;;
    throughput) ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${0##*/}"; [[ "$suite" = "" || "$suite" = -h || "$suite" = --help ]] || die "unknown suite '$suite': quick, main, age, authors, tune, setup, gymnasium, graphgpo, popo, lag, smollm2, vla or throughput"; exit 0 ;;
esac
shift
workers=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) dry_run="" slurm="" at_once=""
megabytes=1300 # of memory that a run takes, at most
case $suite in vla) megabytes=9000 ;; smollm2) megabytes=6000 ;; esac # LIBERO: five processes
cgroup=/sys/fs/cgroup # limits of a container
read -r quota period 2>/dev/null <"$cgroup/cpu.max" || quota=max
read -r memory 2>/dev/null <"$cgroup/memory.max" || memory=max
fitting=$(($(getconf _PHYS_PAGES 2>/dev/null || echo 4000000) / 1000 * $(getconf PAGESIZE) / 1000 / megabytes))
limits=$fitting
[ "$quota" = max ] || limits+=" $((quota / period))"
[ "$memory" = max ] || limits+=" $((memory / 1000000 / megabytes))"
for limit in $limits; do
    [ "$limit" -ge "$workers" ] || workers=$((limit > 0 ? limit : 1))
done
meaningless="" # options
case $suite in graphgpo) meaningless="--tasks --regimes" ;; popo | lag | smollm2) meaningless="--regimes" ;; throughput) meaningless="--seeds --methods --regimes --workers --slurm" ;; esac
while [ $# -gt 0 ]; do
    [[ " $meaningless " != *" $1 "* ]] || die "$1 means nothing for $suite: drop it"
    case "$1" in
        --tasks | --seeds | --methods | --regimes | --steps | --workers)
            [[ $# -ge 2 && "$2" != --* ]] || die "$1 needs a value"
            [ "$1" != --workers ] || at_once="%$2"
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
table=core unit=--total-timesteps task_flag=--env-id
run_dir="runs/benchmark-$steps" more="--eval-every 0 --no-overlap" # as many runs as cores: one process each
case $suite in
    graphgpo) table=graphgpo run_dir="runs/graphgpo-$steps" unit=--total-episodes more="" ;;
    popo | lag) table=popo run_dir="runs/popo-$steps" more="--eval-every 5120" ;;
    smollm2) table=popo run_dir="runs/popo-smollm2-$steps" more="--model smollm2 --kl-coef 0.05 --num-prompts 8"
        more+=" --updates-per-iteration 2 --max-new-tokens 10 --eval-every 192 --eval-episodes 48" ;;
    vla) table=vla run_dir="runs/vla-tiny" task_flag=--suite more="--eval-every 0" ;; # without the steps: demonstrations and clones are shared
esac
buffer_of() { # regime -> its size; LIBERO's have names, since a rollout of the tiny preset has 1,024 steps
    case $table-$1 in
        core-[1-9]*) [[ "$1" =~ ^[1-9][0-9]*$ ]] && echo "$1" && return ;;
        vla-fresh) echo 1024 && return ;; vla-recent) echo 10240 && return ;; vla-stale) echo 102400 && return ;; # stale keeps the whole run
    esac
    die "--regimes: '$1' is no $([ $table = vla ] && echo "regime: fresh, recent or stale" || echo "number of steps, such as 5120")"
}
for regime in $regimes; do [[ "$regime" = - && "$meaningless" = *--regimes* ]] || buffer_of "$regime" >/dev/null; done
commands="" once=" " # methods without replay run once, whatever the regimes
for regime in $regimes; do
    for seed in $seeds; do # seeds before methods: every cell has a first number early
        for method in $methods; do
            line=$(awk -v table="$table" -v name="$method" '$1 == table && $2 == name { $1 = $2 = ""; print }' <<<"$METHODS")
            [ -n "$line" ] || die "--methods: '$method' is no line of the table in benchmark.sh; there are: $(awk -v table="$table" '$1 == table { printf "%s ", $2 }' <<<"$METHODS")"
            line+=" " # so that words end with one
            if [[ "$line" == *" replay "* ]]; then
                size=$(buffer_of "$regime")
                line=${line/ replay / --buffer-size $size } name=${method}_$regime
            else
                [[ "$once" != *" $method $seed "* ]] || continue
                once+=" $method $seed " name=$method
                [ "$regime" = - ] || name+=_on-policy
            fi
            for task in $tasks; do
                commands+="$quoted$(printf ' %s' $line) $task_flag $task --seed $seed --exp-name $name $unit $steps --run-dir $run_dir${more:+ $more}"$'\n'
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
    local task seed name folder resume="" code=0 outcome=""
    [ -z "${main:-}" ] || kill -0 "$main" 2>/dev/null || exit 255 # benchmark.sh itself was killed: xargs ends here
    task=$(sed -E 's/.*--(env-id|suite) ([^ ]*).*/\2/' <<<"$1") seed=$(sed 's/.*--seed \([^ ]*\).*/\1/' <<<"$1")
    name=$(sed 's/.*--exp-name \([^ ]*\).*/\1/' <<<"$1")
    folder="$run_dir/${task//\//-}__${name}__$seed"
    # Python's flock, since macOS has no command of that name. Released when this shell ends or opens the next run's lock.
    { exec 9>>"$folder.lock"; } 2>/dev/null && "$python" -c 'import fcntl
try: fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: exit(75)
except OSError: pass # a file system without locks' 2>/dev/null || code=$?
    if [ $code -eq 75 ]; then
        echo "$folder: another invocation has it"
        return
    elif [ $code -ne 0 ]; then
        outcome="FAILED: $folder.lock cannot be locked"
    else
        [ ! -e "$folder/args.json" ] || resume="--resume"
        eval "OMP_NUM_THREADS=1 $1 $resume" >>"$folder.log" 2>&1 || code=$? # quotes in a flag as in the printed command
        case $code in
            0) sed -n 's/^model name[^:]*: //p;T;q' /proc/cpuinfo >"$folder/machine" 2>/dev/null || true ;; # for report.py
            129 | 130 | 143) outcome="interrupted: $folder goes on with the same command" ;; # 128 + HUP, INT or TERM
            *) outcome="FAILED: exit code $code, see $folder.log" ;;
        esac
    fi
    [ -z "${main:-}" ] || kill -0 "$main" 2>/dev/null || { echo "$folder ${outcome%%:*}" && exit 255; } # Ctrl-C removed the lists
    [ -z "$outcome" ] || echo "$outcome" >>"$failures"
    echo >>"$finished"
    local count now elapsed seconds_left
    count=$(wc -l <"$finished") now=$(date +%s)
    elapsed=$((now - start)) seconds_left=$(((now - start) * (left - count) / count))
    printf '%d of %d runs  %dm%02ds  left %dm%02ds  %s %s\n' "$count" "$left" $((elapsed / 60)) $((elapsed % 60)) \
        $((seconds_left / 60)) $((seconds_left % 60)) "$folder" "${outcome%%:*}"
}

if [ -n "$slurm" ]; then
    [ "$left" -gt 0 ] || { echo "all $total runs are finished: nothing to submit"; exit; }
    jobs=$((left < 1000 ? left : 1000)) # an array of more is refused by Slurm's defaults, so each job takes every 1000th run
    job="$run_dir/$suite-$(cksum <<<"$pending" | cut -d " " -f 1).sbatch" # another one for other runs
    cat >"$job" <<SBATCH
#!/bin/bash
#SBATCH --job-name=gipo-benchmark
#SBATCH --array=1-$jobs$at_once
#SBATCH --cpus-per-task=$([ "$suite" = vla ] && echo 2 || echo 1)
#SBATCH --mem=$((megabytes * 4 / 3))M
#SBATCH --time=04:00:00
#SBATCH --output=$run_dir/slurm-%A_%a.out
cd $(printf %q "$PWD")
commands=\$(cat <<'COMMANDS'
$pending
COMMANDS
)
run_dir=$run_dir python=$quoted failures=\$(mktemp) finished=\$(mktemp) start=\$(date +%s)
left=\$((($left - SLURM_ARRAY_TASK_ID) / $jobs + 1))
$(declare -f run)
for ((i = SLURM_ARRAY_TASK_ID; i <= $left; i += $jobs)); do run "\$(sed -n "\${i}p" <<<"\$commands")"; done
cat "\$failures" && [ ! -s "\$failures" ]
SBATCH
    echo "sbatch $job     # $left runs; afterwards: $quoted report.py"
    exit
fi

start=$(date +%s) finished=$(mktemp) failures=$(mktemp) main=$$
trap 'rm -f "$finished" "$failures"' EXIT
export -f run
export run_dir start finished failures left main python
echo "$left of $total runs are left, $workers at a time, in $run_dir"
[ "$left" -eq 0 ] || printf '%s\n' "$pending" | tr '\n' '\0' | xargs -0 -n 1 -P "$workers" bash -c 'run "$0"'
if [ -s "$failures" ]; then
    echo "$(wc -l <"$failures") runs failed or were interrupted:" >&2
    cat "$failures" >&2
fi
"$python" report.py
[ "$suite" != quick ] || cat "results/benchmark-$steps-v"*.md
[ ! -s "$failures" ]
