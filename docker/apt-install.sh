#!/bin/bash
# apt-install.sh PACKAGE...: installs from the one archive that /etc/apt/sources.list names, on a base without
# certificates. docker/Dockerfile mounts those of the public authorities beside this script, and over them, where the
# build was given CA_BUNDLE, the secret `ca`.
#
# Ubuntu's snapshot service answers 503 now and then: apt asks ten times. Without Error-Mode=any a list that cannot be
# fetched is a warning, and the installation goes on without it.
set -euo pipefail

authorities=/run/secrets/ca.pem
[ -e $authorities ] || authorities=/run/certificates/ca.pem
said=$(mktemp)
export DEBIAN_FRONTEND=noninteractive

die() {
    printf 'apt-install: %s\n' "$@" >&2
    exit 1
}

from_archive() { # TIMES WORD...: apt-get, which asks again so many times; its complaints are shown and kept
    local times=$1
    shift
    apt-get -o Acquire::https::CaInfo=$authorities -o Acquire::Retries="$times" -o APT::Update::Error-Mode=any "$@" \
        2>&1 | tee "$said" >&2
}

archive=$(sed -n 's/^deb .*\(https\?:[^ ]*\).*/\1/p' /etc/apt/sources.list | head -n 1)
if ! from_archive 0 update; then # first without asking again: minutes of that mend no certificate
    if grep -qi certificate "$said"; then
        die "the archive's certificate is signed by no authority that this build knows: $archive" \
            "behind a proxy or on a private network name the PEM file of yours: CA_BUNDLE=ca.pem"
    fi
    from_archive 10 update || die "the archive gives no complete package lists: $archive" \
        "try again later, or name another of the same content: APT_MIRROR=URL"
fi
from_archive 10 install --yes --no-install-recommends "$@"
rm -rf /var/lib/apt/lists/* "$said"
