#!/usr/bin/env bash
# A Llama that transformers 5 saved is read with another rotary base by transformers 4 and by mlx-lm, without a word.
#
#   versions    transformers 5.24.0, 4.57.6; mlx-lm 0.32.2 on mlx 0.32.4, in one environment with 5.24.0; Python 3.11
#   behavior    transformers 5 write `rope_parameters: {rope_theta: ..., rope_type: default}` into config.json and no
#               `rope_theta` beside it. transformers 4.57 look for `rope_theta` alone, and so does the Llama of mlx-lm,
#               which itself runs on transformers 5: in one environment, the two read two bases from one file. Where
#               there is none they take 10000. The model loads, and answers like a worse one. Whoever shares a folder
#               writes both keys.
#   output      saved by transformers 5.24.0, which reads 100000.0; rope_theta beside rope_parameters: None
#               mlx-lm 0.32.2 reads 10000
#               transformers 4.57.6 reads 10000.0
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

newer=$(environment newer mlx-lm==0.32.2 'mlx[cpu]==0.32.4' transformers==5.24.0)
older=$(environment older transformers==4.57.6)

saved_and_read() {
    "$newer" - "$place/model" 2>"$place/said" <<'PYTHON'
import json, sys, transformers
from mlx_lm.models.llama import ModelArgs

shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
rope = {"rope_type": "default", "rope_theta": 100000.0}
transformers.LlamaConfig(**shape, rope_parameters=rope).save_pretrained(sys.argv[1])
config = json.load(open(sys.argv[1] + "/config.json"))
read = transformers.AutoConfig.from_pretrained(sys.argv[1]).rope_parameters["rope_theta"]
print(f"saved by transformers 5.24.0, which reads {read}; rope_theta beside rope_parameters: {config.get('rope_theta')}")
print(f"mlx-lm 0.32.2 reads {ModelArgs.from_dict(config).rope_theta}")
PYTHON
    "$older" - "$place/model" 2>>"$place/said" <<'PYTHON'
import sys, transformers

print(f"transformers 4.57.6 reads {transformers.AutoConfig.from_pretrained(sys.argv[1]).rope_theta}")
PYTHON
}

expected='saved by transformers 5.24.0, which reads 100000.0; rope_theta beside rope_parameters: None
mlx-lm 0.32.2 reads 10000
transformers 4.57.6 reads 10000.0'
found=$(saved_and_read) || true
echo "$found"
[[ $found == "$expected" ]] && ! grep -i rope "$place/said" || { # what they say beside that names no rope
    echo 'this has changed'
    exit 1
}
