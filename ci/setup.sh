#!/usr/bin/env bash
# make setup: .venv/ with what the lock names, every file checked against its hash, and the command `recipe`.
#
#   PYTHON=python3.12   this interpreter (default: the first of python3.11, 3.12, 3.10, python3 that will do)
#   LAUNCHER=1          only what a board's host needs to launch the pinned image: no torch
#   TORCH_INDEX=URL     where CPU builds of torch are found (a mirror, or empty to ask no index but pip's own)
#
# torch comes first and alone. Its CPU builds carry a local version (2.13.0+cpu) that exists only on PyTorch's CPU
# index, never on the ordinary one, so this line either brings a CPU build or fails: a machine without a GPU never
# downloads a CUDA build, and no other package is ever looked for on that index.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"

venv=.venv
stamp=$venv/setup.stamp # written last: a set-up that broke off leaves none, and the next one goes on from there
log=$venv/setup.log
torch_index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
kind=cpu
[ "${LAUNCHER:-0}" = 0 ] || kind=launcher

lock_for() { # KIND X.Y
    if [ "$1" = launcher ]; then echo requirements/launcher.txt; else echo "requirements/cpu-$2.txt"; fi
}

key_of() { # KIND X.Y: changes when the lock, the project's own metadata, this script or the folder does
    { echo "$root $1 $2"; cat "$(lock_for "$1" "$2")" pyproject.toml ci/setup.sh; } | sha256sum | cut -d' ' -f1
}

version_of() { # INTERPRETER: X.Y, or nothing where it does not run (a pyenv shim may exist and not run)
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

die() {
    printf 'setup: %s\n' "$@" >&2
    exit 4
}

# --- is there anything to do? ---------------------------------------------------------------------

have_kind='' have_version='' have_key='' have_root=''
ready() { # does the stamp say that all of this was done, for this lock and in this folder?
    [ -f $stamp ] && [ -x $venv/bin/python ] || return 1
    { read -r have_kind && read -r have_version && read -r have_key && read -r have_root; } <$stamp || return 1
    [ "$have_key" = "$(key_of "$have_kind" "$have_version")" ] || return 1
    [ "$have_kind" = cpu ] || [ "$kind" = launcher ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$PYTHON")" = "$have_version" ]
}

if ready; then exit 0; fi
echo "setup: making $venv (once; again only when its lock file or pyproject.toml changes)"
started=$SECONDS
# Two commands at once: the second waits, and finds the first one's work done.
if command -v flock >/dev/null; then
    exec 9<ci/setup.sh
    flock --nonblock 9 || { echo "setup: another set-up is at work here; waiting for it" && flock 9; }
    if ready; then exit 0; fi
fi
if [ "$(uname -s) $(uname -m)" != "Linux x86_64" ]; then
    echo "setup: made and tested for Linux x86_64; $(uname -s) $(uname -m) is untested"
fi

# --- which Python -----------------------------------------------------------------------------------

python='' version='' reasons=()
candidates=(python3.11 python3.12 python3.10 python3)
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
for candidate in "${candidates[@]}"; do
    version=$(version_of "$candidate")
    case $version in
    3.10 | 3.11 | 3.12) ;;
    '') reasons+=("  $candidate: not found, or does not run") && continue ;;
    *) reasons+=("  $candidate: is Python $version") && continue ;;
    esac
    if ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
        reasons+=("  $candidate: has no venv or ensurepip module (Debian, Ubuntu: apt install python$version-venv)")
        continue
    fi
    python=$candidate
    break
done
[ -n "$python" ] || die "no Python that will do; wanted: 3.10, 3.11 or 3.12 with the module venv. Looked at:" \
    "${reasons[@]}" "install one (Debian, Ubuntu: apt install python3 python3-venv) or name one: make setup PYTHON=/path/to/python3.11"
lock=$(lock_for "$kind" "$version")

# --- the steps ----------------------------------------------------------------------------------------

# What a step has started ends with this script, however early a signal comes: the shell itself knows its jobs.
# shellcheck disable=SC2046  # process ids
trap 'kill $(jobs -pr) 2>/dev/null || true' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step() { # MESSAGE HELP COMMAND...: runs it quietly with a sign of life; on failure shows the end of its log
    local message=$1 help=$2 begun=$SECONDS said=0 child last
    shift 2
    echo "setup: $message"
    PYTHONUNBUFFERED=1 "$@" >"$log" 2>&1 </dev/null &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        sleep 0.2
        last=$(tail -n 5 "$log" 2>/dev/null | grep -vi uninstall | tail -n 1 | tr -d '\r' | cut -c 1-90) || last=
        if [ -t 1 ]; then
            printf '\r\033[K  %3d s  %s' $((SECONDS - begun)) "${last:-...}"
        elif [ $((SECONDS - begun - said)) -ge 10 ]; then
            said=$((SECONDS - begun))
            printf '  %3d s  %s\n' $said "${last:-...}"
        fi
    done
    [ ! -t 1 ] || printf '\r\033[K'
    if ! wait "$child"; then
        tail -n 15 "$log" | sed 's/^/  /' >&2
        die "failed: $message" "$help" "the whole output is in $log; nothing needs to be undone: run the same command again"
    fi
}

fresh=''
if [ ! -x $venv/bin/python ] || [ "$(version_of $venv/bin/python)" != "$version" ] ||
    { [ -n "$have_root" ] && [ "$have_root" != "$root" ]; } || ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
    fresh=1
fi
mkdir -p $venv
rm -f $stamp
if [ -n "$fresh" ]; then
    log=$(mktemp) # --clear empties the folder
    step "1/5 Python $version ($(command -v "$python")) -> $venv" "does '$python -m venv' work here?" \
        "$python" -m venv --clear $venv
    rm -f "$log"
    log=$venv/setup.log
else
    echo "setup: 1/5 Python $version in $venv is kept"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)
locked=(install --progress-bar off --no-compile --no-deps --require-hashes --only-binary :all:)

# The lock's torch requirement: its line and the continuation lines with its hashes.
awk '/^torch==/ { on = 1 } on { print; if (!/\\$/) exit }' "$lock" >$venv/torch.txt
torch=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' $venv/torch.txt)
if [ "$kind" = launcher ]; then
    echo "setup: 2/5 no torch: a board's host needs none"
elif [ -z "$torch" ]; then
    echo "setup: 2/5 NO TORCH: $lock has no line for it (see its head). Training and the tests that need torch will"
    echo "       not run on Python $version. Python 3.11 trains: \`uv python install 3.11\`, on Ubuntu python3.11-venv of"
    echo "       ppa:deadsnakes/ppa; or \`make lock\` where PyTorch's CPU index can be reached"
else
    # Few tries and short waits: where the wheel comes from elsewhere (PIP_FIND_LINKS, a mirror), an index that
    # cannot be reached costs seconds.
    step "2/5 $torch, the CPU build (about 200 MB)" \
        "is ${torch_index:-the package index} reachable? Else set TORCH_INDEX to a mirror, or PIP_FIND_LINKS to a folder with the wheel" \
        "${pip[@]}" "${locked[@]}" --retries 1 --timeout 10 ${torch_index:+--extra-index-url "$torch_index"} -r $venv/torch.txt
fi
step "3/5 what $lock names" "is the package index reachable (pip's settings, proxy)?" \
    "${pip[@]}" "${locked[@]}" -r "$lock"
# pip would compile on one core: 39 s for torch and transformers where two cores take 24.
compile_all() { $venv/bin/python -m compileall -q -j 0 $venv/lib || true; } # some files are of a newer Python
step "4/5 bytecode, on all cores" "does $venv/bin/python run?" compile_all
step "5/5 the command $venv/bin/recipe" "is pyproject.toml sound?" \
    "${pip[@]}" install --no-index --no-deps --no-build-isolation --editable .

printf '%s\n' "$kind" "$version" "$(key_of "$kind" "$version")" "$root" >$stamp.new
mv $stamp.new $stamp
echo "setup: ready in $((SECONDS - started)) s"
