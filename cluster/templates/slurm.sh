#!/usr/bin/env bash
# Start:  sbatch FILE    in the folder that the recipe's relative paths start from
# Follow: tail -F __NAME__-JOB.out
# End:    scancel --batch --signal=TERM JOB    saves a checkpoint first; scancel JOB doesn't
# The nodes share a bucket: each keeps its copy of rows and models in ~/.cache/prefray (ray.cache_dir).  # if shares_nothing
# Keys:   of the environment that sbatch is called in: __KEYS__  # if stores
# A run that isn't done at the time limit saves, and goes on when the job starts again by itself.
#SBATCH --job-name=__NAME__
#SBATCH --nodes=__ALLOCATION__
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=__CPUS__
#SBATCH --gpus-per-node=__GPUS__  # if gpus
#SBATCH --mem=__MEMORY__G  # if memory
#SBATCH --time=__TIME__
#SBATCH --partition=__PARTITION__  # if partition
#SBATCH --account=__ACCOUNT__  # if account
#SBATCH --no-kill  # if autoscales
#SBATCH --requeue
#SBATCH --signal=B:USR1@__NOTICE__
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append

set -euo pipefail
set +u  # if setup
__SETUP__  # if setup
set -u  # if setup

work=$(mktemp -d)
cat > "$work/recipe.yaml" <<'__END__'
__RECIPE_TEXT__
__END__
start=(__START__)
resume=(__AGAIN__)
sweep_file=__SWEEP_FILE__
gpus=__GPUS__

child=
stopped=
time_is_up=

fail() {
    echo "prefray: $1" >&2
    exit 1
}

# Runs a command, and hands on to it what is to end the job, once: a second SIGTERM would keep it from saving.
attend() {
    local status signals
    "$@" <&0 &
    child=$!
    while true; do
        signals=$stopped
        status=0
        wait "$child" || status=$?
        [[ $signals != "$stopped" ]] || break
    done
    child=
    return "$status"
}

# shellcheck disable=SC2329 # it is invoked by traps
stop() {
    if [[ -z $child ]]; then exit 143; fi
    if [[ -z $stopped ]]; then kill -TERM "$child" || true; fi
    stopped+=x
}

end_all() {
    trap '' TERM USR1
    jobs -p | xargs -r kill 2> /dev/null || true
    wait || true
    rm -rf "$work"
}

start_node() {
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --nodelist="$node" --cpus-per-task="$SLURM_CPUS_PER_TASK" \
        ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$gpus" --temp-dir="/tmp/ray-$SLURM_JOB_ID" \
        --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --disable-usage-stats "$@" &
}

trap stop TERM INT
trap 'time_is_up=yes; stop' USR1
trap end_all EXIT

# Whoever doesn't have the job's environment can't talk to its Ray.
unset RAY_ADDRESS
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')

# Jobs that share a machine have ports of their own.
port=$((20000 + SLURM_JOB_ID % 5000 * 2))
head_ip=$(python -c 'import ray.util; print(ray.util.get_node_ip_address())')
address=$head_ip:$port
nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")

start_node "$SLURMD_NODENAME" --head --node-ip-address="$head_ip" --port="$port" --ray-client-server-port=$((port + 1)) \
    --dashboard-host=127.0.0.1
head=$!
deadline=$((SECONDS + 300))
until attend ray health-check --address "$address" > /dev/null 2>&1; do
    if [[ -n $stopped ]]; then exit 143; fi
    kill -0 "$head" 2> /dev/null || fail "Ray's head could not be started; what it says stands above"
    ((SECONDS < deadline)) || fail "Ray's head on $SLURMD_NODENAME doesn't answer at $address after 5 minutes"
    sleep 1
done

for node in $nodes; do
    if [[ $node != "$SLURMD_NODENAME" ]]; then start_node "$node" --address="$address"; fi
done
attend python - "$address" "$(wc -w <<< "$nodes")" 600 << 'PYTHON' || exit
import sys
import time

import ray

address, wanted, patience = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
ray.init(address, log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + patience
while (found := sum(node["Alive"] for node in ray.nodes())) < wanted:
    if time.monotonic() > deadline:
        sys.exit(f"prefray: {found} of {wanted} nodes have started Ray after {patience / 60:g} minutes; the others' words stand above")
    time.sleep(1)
PYTHON

command=("${start[@]}")
if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -z $sweep_file || -e $sweep_file ]]; then
    command=("${resume[@]}")
fi
if [[ -n $stopped ]]; then exit 143; fi
status=0
attend env RAY_ADDRESS="$address" "${command[@]}" || status=$?

if [[ $status == 143 && -n $time_is_up ]]; then
    trap - EXIT
    end_all
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
