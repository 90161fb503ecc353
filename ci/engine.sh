#!/usr/bin/env bash
# ci/engine.sh: a Docker engine, buildx and a base image, for a Debian machine that can reach no registry.
# What is there already is left as it is; on a machine with Docker and a registry there is nothing to do here.
#
#   engine  docker.io from this machine's own packages; `dockerd` is started by hand where none answers, and left running
#   buildx  Debian's docker-buildx (trixie and later), unpacked as a plugin of the docker command
#   base    recipes-base:bookworm, made with debootstrap: Debian 12 with its Python 3.11. A stand-in for a registry's
#           base image, so what is built on it is a local build
#
#   DEBIAN_MIRROR=URL   where Debian's packages come from (default: as this machine's package sources say)
set -euo pipefail

base=recipes-base:bookworm
log=/var/log/dockerd-by-hand.log

say() { printf 'engine: %s (%d s)\n' "$1" $SECONDS; }

die() {
    printf 'engine: %s\n' "$@" >&2
    exit 4
}

apt_install() { # PACKAGE...: the ordinary way of this machine
    command -v apt-get >/dev/null || die "no apt-get here to install $* with" "install Docker as its own pages say"
    [ "$(id -u)" = 0 ] || die "$* must be installed, which only root can do" "apt-get install $*"
    say "apt-get install $*"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

mirror() { # the address of Debian's main archive, as this machine's package sources have it; nothing where they do not
    local found=${DEBIAN_MIRROR:-}
    # shellcheck disable=SC2016  # $(REPO_URI) is apt's own word
    [ -n "$found" ] || found=$(apt-get indextargets --format '$(REPO_URI)' \
        'Created-By: Packages' 'Origin: Debian' 'Component: main' | head -n 1)
    echo "$found"
}

add_buildx() { # its signature is checked by apt, in lists of its own: this machine's package sources stay as they are
    local into=${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins work archive
    local apt=(apt-get -qq)
    archive=$(mirror)
    [ -n "$archive" ] || die "no Debian mirror in this machine's package sources" "name one: DEBIAN_MIRROR=URL ci/engine.sh"
    work=$(mktemp -d)
    chmod 755 "$work"
    mkdir -p "$work/lists" "$work/cache"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $archive trixie main" >"$work/sources.list"
    apt+=(-o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null)
    apt+=(-o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
    say "docker-buildx -> $into"
    (cd "$work" && "${apt[@]}" update && "${apt[@]}" download docker-buildx && dpkg-deb -x docker-buildx_*.deb unpacked)
    mkdir -p "$into"
    install -m 755 "$work/unpacked/usr/libexec/docker/cli-plugins/docker-buildx" "$into/"
    rm -rf "$work"
}

start_engine() {
    [ "$(id -u)" = 0 ] || die "no Docker engine answers, and only root can start one" "systemctl start docker"
    say "dockerd, started by hand; its log: $log"
    setsid nohup dockerd >"$log" 2>&1 </dev/null &
    for _ in $(seq 60); do
        if docker info >/dev/null 2>&1; then return; fi
        sleep 0.5
    done
    tail -n 5 "$log" >&2
    die "dockerd does not answer after 30 s; the end of its log is above"
}

make_base() { # on Ubuntu too: there debootstrap knows Debian's archive itself, and Debian's keys are a package
    local root archive keys=/usr/share/keyrings/debian-archive-keyring.gpg
    [ "$(id -u)" = 0 ] || die "a base image is made by debootstrap, which only root can do"
    command -v debootstrap >/dev/null && [ -e $keys ] || apt_install debootstrap debian-archive-keyring
    root=$(mktemp -d)
    archive=$(mirror)
    say "$base from ${archive:-the archive that debootstrap knows}"
    debootstrap --variant=minbase --include=python3,python3-venv --force-check-gpg --keyring=$keys \
        bookworm "$root" ${archive:+"$archive"} >"$root.log" 2>&1 || {
        tail -n 5 "$root.log" >&2
        die "debootstrap failed; its whole output is in $root.log"
    }
    tar -C "$root" --numeric-owner --exclude './dev/*' --exclude './var/cache/apt/*' --exclude './var/lib/apt/lists/*' \
        --exclude './var/log/*' --exclude ./etc/machine-id -c . |
        docker import --change 'ENV PATH=/usr/local/bin:/usr/bin:/bin' --change 'CMD ["/bin/sh"]' - $base >/dev/null
    rm -rf "$root" "$root.log"
}

command -v dockerd >/dev/null || docker info >/dev/null 2>&1 || apt_install docker.io
docker buildx version >/dev/null 2>&1 || add_buildx
docker info >/dev/null 2>&1 || start_engine
docker image inspect $base >/dev/null 2>&1 || make_base
say "an engine answers: $(docker version --format '{{.Server.Version}}'), $(docker buildx version | cut -d' ' -f2), base $base"
