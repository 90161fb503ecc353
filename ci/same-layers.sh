#!/usr/bin/env bash
# ci/same-layers.sh: ends with 6 where FIRST and SECOND, what `python -m ci.layers` printed on two builders, differ.
set -euo pipefail

for layers in "${FIRST:-}" "${SECOND:-}"; do # a builder that failed has no output
    [[ $layers == '["sha256:'* ]] || { echo "no list of layers: '$layers'" >&2 && exit 2; }
done
if [ "$FIRST" != "$SECOND" ]; then
    printf 'error: two builders made other layers\n    %s\n    %s\n' "$FIRST" "$SECOND" >&2
    echo "  to do: what differs in docker/Dockerfile was made from the machine, the time, the path, or an order" >&2
    exit 6
fi
echo "two builders made the same layers: $FIRST"
