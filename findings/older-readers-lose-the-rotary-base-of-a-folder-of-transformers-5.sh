#!/usr/bin/env bash
# A Llama that transformers 5 saved is read with another rotary base by transformers 4 and by mlx-lm, without a word.
#
#   versions    transformers 5.24.0, 4.57.6; mlx-lm 0.32.2 on mlx 0.32.4 (which brings transformers 5); Python 3.11
#   behavior    transformers 5 write `rope_parameters: {rope_theta: ..., rope_type: default}` into config.json and no
#               `rope_theta` beside it. transformers 4.57 and mlx-lm look for `rope_theta` alone and take 10000 where
#               there is none. No warning; the model loads, and its answers are those of a worse one. Whoever shares a
#               folder writes both keys.
#   output      saved by 5.24.0 with 100000; rope_theta beside rope_parameters: None
#               transformers 4.57.6 reads 10000.0
#               mlx-lm 0.32.2 reads 10000.0
#
# Ends with 0 while that is so, with 1 where it has changed.
set -euo pipefail

python=${PYTHON:-python3.11}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

environment() { # NAME PACKAGES...: makes an environment and prints its Python
    "$python" -m venv "$place/$1"
    "$place/$1/bin/pip" install --quiet --disable-pip-version-check "${@:2}" >&2
    echo "$place/$1/bin/python"
}

five=$(environment five transformers==5.24.0)
four=$(environment four transformers==4.57.6)
mlx=$(environment mlx mlx-lm==0.32.2 'mlx[cpu]==0.32.4')

saved=$("$five" - "$place/model" <<'PYTHON' 2>/dev/null
import json, sys, transformers
shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
rope = {"rope_type": "default", "rope_theta": 100000.0}
transformers.LlamaConfig(**shape, rope_parameters=rope).save_pretrained(sys.argv[1])
config = json.load(open(sys.argv[1] + "/config.json"))
print(f"{config['rope_parameters']['rope_theta']:.0f}; rope_theta beside rope_parameters: {config.get('rope_theta')}")
PYTHON
)
read_by_4=$("$four" -c 'import sys, transformers
print(transformers.AutoConfig.from_pretrained(sys.argv[1]).rope_theta)' "$place/model" 2>/dev/null)
read_by_mlx=$("$mlx" -c 'import json, sys
from mlx_lm.models.llama import ModelArgs
print(ModelArgs.from_dict(json.load(open(sys.argv[1] + "/config.json"))).rope_theta)' "$place/model" 2>/dev/null)

printf 'saved by 5.24.0 with %s\ntransformers 4.57.6 reads %s\nmlx-lm 0.32.2 reads %s\n' \
    "$saved" "$read_by_4" "$read_by_mlx"
[[ $saved == '100000; '*None && ${read_by_4%.0} == 10000 && ${read_by_mlx%.0} == 10000 ]] || {
    echo 'this has changed'
    exit 1
}
