#!/usr/bin/env bash
# From a bare machine to a language model you trained: environment, data, training, evaluation, plots.
#
#   ./launch_training.sh                        uses all GPUs, or the CPU if there are none
#   ./launch_training.sh --max_steps=1000       all arguments are passed to training.py (see: python training.py --help)
#   ./launch_training.sh configs/my.toml        another configuration; prepare its data first
#   NGPUS=2 ./launch_training.sh                fewer GPUs
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 ./launch_training.sh      on each of several machines; 10.0.0.1 is rank 0
#   NNODES=1:4 ...                              elastic: resumes from the last save with the machines that are left
#   sbatch slurm/train.sbatch [options]         the same under Slurm
#
# Training that crashes is started again, RESTARTS (3) times at most. SIGTERM and SIGUSR1 end everything with exit code
# 75, Ctrl-C with 130: training saves first, and the same command continues.
#
# Several machines share the folder (or each has a copy of code, .venv and data) and RUN_DIR. Further variables:
# MASTER_PORT (29500), LOCAL_ADDR (this machine's address if its name does not resolve), RUN_ID.
# NCCL finds its network by itself. If it does not, NCCL_DEBUG=INFO shows what it chose, NCCL_SOCKET_IFNAME=eth0 (and
# GLOO_SOCKET_IFNAME) names the interface, NCCL_IB_HCA=mlx5_0 the InfiniBand card. None is set here: what repairs one
# cluster breaks another.
#
# Without a GPU it trains a small model on the Python language reference, in about two minutes on 2 cores.
# Run it again to resume: finished steps are skipped. Needs Python >= 3.11; installs into .venv only, or into the
# virtual environment that is active.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf '\n== %s\n' "$*"; }

# run COMMAND...: wait for a command in the background, since bash answers no signal while one is in the foreground.
run() {
    "$@" &
    wait $!
}

# stop CODE: end what is running, then this script.
stop() {
    trap '' TERM USR1 INT
    trap - ERR
    # shellcheck disable=SC2046 # several process ids
    kill $(jobs -p) 2>/dev/null || true
    wait
    exit "$1"
}

# make_environment FILE...: create a virtual environment and install the requirements in FILE... when they change.
make_environment() {
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        local python candidate
        for candidate in python3.13 python3.12 python3.11 python3 python; do
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
        done
        [ -n "${python:-}" ] || { echo "Python >= 3.11 is needed; found $(python3 --version 2>&1 || true)" >&2; return 1; }
        if [ ! -x .venv/bin/pip ]; then
            say "environment: .venv ($("$python" --version))"
            run "$python" -m venv .venv || { echo "no virtual environment: install Python's venv (Debian: apt install python3-venv)" >&2; return 1; }
        fi
        export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
    fi
    local stamp file
    for file in "$@"; do
        stamp="${VIRTUAL_ENV:-$CONDA_PREFIX}/.nano416-${file##*/}"
        if ! cmp -s "$file" "$stamp"; then
            say "packages: $file (torch is large, this can take minutes)"
            run python -m pip install --disable-pip-version-check -q -r "$file"
            cp "$file" "$stamp"
        fi
    done
}

# first_shards FOLDER: true if enough is there for training to start.
first_shards() {
    { [ -f "$1/progress.json" ] || [ -f "$1/meta.json" ]; } && [ -f "$1/val_000000.bin" ] && [ -f "$1/train_000000.bin" ]
}

[ "${BASH_SOURCE[0]}" = "$0" ] || return 0 # sourced by tests/run.sh, for the functions

trap 'stop 75' TERM USR1
trap 'stop 130' INT
stage="environment"
trap 'echo "launch_training.sh: stopped in stage: $stage" >&2' ERR
make_environment requirements.txt

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
export NGPUS=${NGPUS:-$((gpus > 1 ? gpus : 1))}
config=()
case "${1:-}" in *.toml | *.json) ;; *) [ "$gpus" -gt 0 ] || config=(configs/sample.toml) ;; esac

stage="data"
case " ${1:-} $* " in
    *.toml\ * | *.json\ * | *" --sources"*) ;; # the user's own data
    *)
        if [ "$gpus" -eq 0 ]; then
            [ -f data/sample/meta.json ] || { say "data: the Python language reference"; run python data_pipeline.py sample; }
        else
            say "data: FineWeb-Edu, 10B tokens (20 GB; continues a partial download; training starts with the first shards)"
            [ -f data/hellaswag_val.jsonl ] || run python eval_hellaswag.py --download || echo "continuing without HellaSwag" >&2
            python data_pipeline.py download &
            export NANO416_DOWNLOAD=$! # launcher.py ends it
            until first_shards data/fineweb_edu; do
                kill -0 $NANO416_DOWNLOAD 2>/dev/null || wait $NANO416_DOWNLOAD # a failed download ends this script
                sleep 1
            done
        fi
        ;;
esac

say "training: $NGPUS process(es), $gpus GPU(s) visible"
if [ "$gpus" -eq 0 ]; then
    # On shared cores, threads that spin long at a barrier keep the last one from arriving (EXPERIMENTS.md).
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
elif [ "$NGPUS" != 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # as torchrun
fi
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # or a restarted worker finds the dead one's keys (pytorch#167288)
exec python -m nano416.launcher training.py "${config[@]}" "$@"
