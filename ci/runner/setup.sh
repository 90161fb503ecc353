#!/usr/bin/env bash
# ci/runner/setup.sh [--check] BOARD: makes this machine the runner of its board. As root; what is there is kept, so it
# can be run again. --check changes nothing, lists what would change, and ends with 4 where that is anything.
#
# One machine, one board, one runner: the hooks before and after a job look at all nodes of the machine, so a second
# board's job would be refused for the first one's, or end it.
#
#   RUNNER_REPOSITORY=owner/name    whose hardware.yml, at main, this machine serves
#   RUNNER_TARBALL=file RUNNER_VERSION=x.y.z RUNNER_SHA256=...
#                                   GitHub's runner, fetched by you from its release page, with the hash that stands
#                                   there. No version is known here and nothing is downloaded: not needed again once
#                                   /opt/recipes-runner/current is there
#   DESTDIR=folder                  put everything below this folder and run none of the system's commands: for tests
#
# Not done here, but looked at: driver and firmware, huge pages or the IOMMU. README.md says how. Never run beside a card.
set -euo pipefail
source=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)

die() {
    printf 'runner: %s\n' "$@" >&2
    exit 4
}

check=''
[ "${1:-}" != --check ] || { check=1 && shift; }
[ $# = 1 ] || { echo "which board? A machine is the runner of one: ci/runner/setup.sh [--check] n300" >&2 && exit 2; }
board=$1
if [[ $board = cpu* ]] || ! [[ $board =~ ^[a-z0-9]+(-[a-z0-9]+)*$ ]] || ! grep -q "^$board:" "$source/../../common/hardware.yaml"; then
    echo "runner: $board is no board of common/hardware.yaml" >&2
    exit 2
fi

root=${DESTDIR:-}
repository=${RUNNER_REPOSITORY:-} tarball=${RUNNER_TARBALL:-} version=${RUNNER_VERSION:-} sha256=${RUNNER_SHA256:-}
env=/etc/recipes-runner.env
workflow='' have_runner='' serves=''
if [ -e "$root$env" ]; then
    workflow=$(sed -n 's/^RECIPES_RUNNER_WORKFLOW=//p' "$root$env")
    serves=$(sed -n 's/^RECIPES_RUNNER_BOARD=//p' "$root$env")
fi
[ "${serves:-$board}" = "$board" ] ||
    die "this machine is the runner of $serves, and a machine has one" \
        "for $board instead: systemctl disable --now recipes-runner@$serves.path; take RECIPES_RUNNER_BOARD out of $env"
[ ! -e "$root/opt/recipes-runner/current" ] || have_runner=1
if [ -z "$check" ]; then # all that is asked of you, before anything is touched
    [ -n "$root" ] || [ "$(id -u)" = 0 ] || die "as root, or with --check"
    [ -n "$repository$workflow" ] || die "whose hardware.yml does this machine serve? RUNNER_REPOSITORY=owner/name"
    [ -n "$tarball$have_runner" ] ||
        die "no runner here, and none is fetched by itself" "RUNNER_TARBALL=file RUNNER_VERSION=x.y.z RUNNER_SHA256=..."
fi
if [ -n "$repository" ]; then
    [[ $repository =~ ^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$ ]] || die "RUNNER_REPOSITORY=$repository is no owner/name"
    workflow=$repository/.github/workflows/hardware.yml
fi
if [ -n "$tarball" ]; then
    [[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || die "RUNNER_VERSION= the version of $tarball, as 2.0.0"
    [[ $sha256 =~ ^[0-9a-f]{64}$ ]] || die "RUNNER_SHA256= the hash of $tarball, from its release page"
    echo "$sha256  $tarball" | sha256sum --check --quiet || die "$tarball is not what was named"
fi
changes=0

change() { # WHAT COMMAND...: says what is missing; makes it good, unless only asked
    local what=$1
    shift
    changes=$((changes + 1))
    if [ -n "$check" ]; then
        echo "missing: $what"
    else
        echo "now:     $what"
        "$@"
    fi
}

system() { # COMMAND...: one of this machine, which a folder has none of
    if [ -n "$root" ]; then echo "         (with DESTDIR not run: $*)"; else "$@"; fi
}

folder() { # PATH MODE OWNER:GROUP
    if [ ! -d "$root$1" ]; then
        change "the folder $1, mode $2, of $3" mkdir -p "$root$1"
        if [ -z "$check" ]; then
            system chown "$3" "$root$1"
            chmod "$2" "$root$1"
        fi
    fi
}

file() { # FROM PATH MODE: root's, so that no job can change it
    if ! cmp -s "$1" "$root$2"; then change "$2" install -D -m "$3" "$1" "$root$2"; fi
}

unpack() {
    local into=$root/opt/recipes-runner/$version
    mkdir -p "$into"
    tar -xzf "$tarball" -C "$into" --no-same-owner
    ln -sfn "$version" "$root/opt/recipes-runner/current"
}

# --- the user, its folders, its files ------------------------------------------------------------------------------

if [ -z "$root" ] && ! getent passwd recipes-runner >/dev/null; then
    change "the user recipes-runner, without a password or a shell" useradd --system --user-group \
        --home-dir /var/lib/recipes-runner --no-create-home --shell /usr/sbin/nologin --groups docker recipes-runner
fi
folder /var/lib/recipes-runner 1770 root:recipes-runner # sticky: what is root's there stays there
folder /var/lib/recipes-runner/jit 2770 root:recipes-runner
folder /var/lib/recipes-runner/work 0700 recipes-runner:recipes-runner
folder /var/lib/recipes-runner/home 0700 recipes-runner:recipes-runner # RECIPES_HOME of every job
for name in job-started.sh job-completed.sh run-once.sh; do
    file "$source/$name" "/usr/local/lib/recipes-runner/$name" 0755
done
for name in recipes-runner@.service recipes-runner@.path recipes-quarantine.service recipes-quarantine.path; do
    file "$source/$name" "/etc/systemd/system/$name" 0644
done
file "$source/99-tenstorrent-runner.rules" /etc/udev/rules.d/99-tenstorrent-runner.rules 0644

settings=$(mktemp)
trap 'rm -f "$settings"' EXIT
if [ -n "$workflow" ]; then # two lines are ours; the others are yours, a proxy's address say, and so is the file's mode
    mode=0644
    printf 'RECIPES_RUNNER_WORKFLOW=%s\nRECIPES_RUNNER_BOARD=%s\n' "$workflow" "$board" >"$settings"
    if [ -e "$root$env" ]; then
        mode=$(stat --format %a "$root$env")
        sed '/^RECIPES_RUNNER_\(WORKFLOW\|BOARD\)=/d' "$root$env" >>"$settings"
    fi
    file "$settings" "$env" "$mode"
else
    change "$env: RUNNER_REPOSITORY=owner/name"
fi

if [ -n "$tarball" ] && [ "$(readlink "$root/opt/recipes-runner/current" || true)" != "$version" ]; then
    change "GitHub's runner $version in /opt/recipes-runner" unpack
elif [ -z "$tarball$have_runner" ]; then
    change "GitHub's runner: RUNNER_TARBALL=, RUNNER_VERSION=, RUNNER_SHA256="
fi

if [ $changes -gt 0 ] && [ -z "$check" ]; then
    system systemctl daemon-reload
    system udevadm control --reload
    system udevadm trigger --subsystem-match=tenstorrent
    system systemctl enable --now recipes-quarantine.path
    system systemctl enable --now "recipes-runner@$board.path"
fi

# --- what a person sets up -----------------------------------------------------------------------------------------

shopt -s nullglob
proc=${RECIPES_SYSFS_ROOT:-}
groups=("$proc"/sys/kernel/iommu_groups/*)
if [ ${#groups[@]} -gt 0 ] && ! grep -qw iommu=pt "$proc/proc/cmdline"; then
    echo "memory:  the IOMMU translates: no huge pages needed, and a board reaches only what it was given"
elif grep -q ' /dev/hugepages-1G hugetlbfs .*pagesize=1\(024M\|G\)' "$proc/proc/mounts"; then
    echo "memory:  no IOMMU; 1 GiB pages at /dev/hugepages-1G. A board can reach all of this machine's memory: README.md"
else
    echo "memory:  neither an IOMMU that translates nor 1 GiB pages at /dev/hugepages-1G: README.md"
fi
driver=$(cat "$proc/sys/module/tenstorrent/version" 2>/dev/null || echo none)
echo "driver:  $driver; firmware, nodes and the rest: recipe doctor --hw $board"
if [ $changes = 0 ]; then echo "nothing to do"; fi
[ -z "$check" ] || [ $changes = 0 ] || exit 4
