#!/usr/bin/env bash
# ci/lint-workflows.sh: workflows, YAML and shell. The tools are those of requirements/tools.txt: make lint, or
# ci/tools.sh ci/lint-workflows.sh. Nothing here asks a network.
#
#   actionlint  syntax, expressions, labels of runners (.github/actionlint.yaml), and shellcheck over each `run:`.
#               A fork of rhysd/actionlint, which has had no release since March 2026 and does not know `queue:`
#   zizmor      security: triggers, permissions, credentials, pins, templates in scripts
#   yamllint    every YAML file, by .yamllint.yaml
#   and shellcheck over CI's own scripts, and that of the images
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
shopt -s globstar nullglob

workflows=(.github/workflows/*.yml)
if [ ${#workflows[@]} -gt 0 ]; then # a fork may have none
    actionlint -- "${workflows[@]}"
    zizmor --offline --quiet --no-progress --persona auditor --strict-collection .github
fi
yamllint --strict .
shellcheck --external-sources ci/**/*.sh docker/*.sh .ci/run
echo "workflows, YAML and shell: ${#workflows[@]} workflows, no complaint"
