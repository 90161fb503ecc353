"""Two chat templates that know tools, in the two ways that templates of Llamas have."""

from __future__ import annotations

import json
from pathlib import Path

from tools.verify.tiny_base import write_tiny_base

# As Qwen 2.5's: the tools in a turn of their own, any number of calls, behind the words beside them.
ALL_CALLS = (
    "{%- if tools %}{{- '<|system|>\nTools:' }}{%- for tool in tools %}{{- '\n' ~ (tool | tojson) }}{%- endfor %}"
    "{{- eos_token ~ '\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|' ~ message.role ~ '|>\n' }}"
    "{%- if message.role == 'assistant' %}{% generation %}{{- message.content }}"
    "{%- for call in message.tool_calls %}"
    "{{- '<call>' ~ call.function.name ~ ' ' ~ (call.function.arguments | tojson) ~ '</call>' }}{%- endfor %}"
    "{{- eos_token }}{% endgeneration %}{%- else %}{{- message.content ~ eos_token }}{%- endif %}{{- '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
)
# As Llama 3.1's: the tools in the first question, one call and no words beside it, the tool's answer as JSON.
ONE_CALL = (
    "{%- for message in messages %}{{- '<|' ~ message.role ~ '|>\n' }}"
    "{%- if 'tool_calls' in message %}"
    "{%- if message.tool_calls | length != 1 %}{{- raise_exception('only single tool-calls') }}{%- endif %}"
    "{%- set call = message.tool_calls[0].function %}"
    "{{- '{\"name\": \"' ~ call.name ~ '\", \"parameters\": ' ~ (call.arguments | tojson) ~ '}' }}"
    "{%- elif message.role == 'tool' %}{{- message.content | tojson }}"
    "{%- else %}{%- if loop.first and tools is not none %}{{- (tools | tojson) ~ '\n' }}{%- endif %}"
    "{{- message.content | trim }}{%- endif %}{{- eos_token ~ '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
)


def write_tool_base(folder: Path, template: str = ALL_CALLS) -> Path:
    """Write the tiny base with a template that knows tools, and positions enough for them; return the folder."""
    write_tiny_base(folder, context=1024)
    (folder / "chat_template.jinja").write_text(template)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 1024}))
    return folder
