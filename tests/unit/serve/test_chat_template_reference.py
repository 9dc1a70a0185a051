"""Templates in the manner of well-known models render as transformers' apply_chat_template renders them."""

import json
from pathlib import Path
from typing import Any

import pytest

from max import RequestError
from max.serve.chat_template import ChatTemplate
from max.serve.text_files import FolderText

transformers = pytest.importorskip("transformers")

LLAMA_3 = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}
    {{- 'Environment: ipython\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """
{%- macro turn(role, content) -%}
<|im_start|>{{ role }}
{{ content }}<|im_end|>
{% endmacro -%}
{%- if tools %}{{ turn('system', 'Tools: ' ~ tools | map(attribute='name') | join(', ')) }}{% endif -%}
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.last_user < 0 and message.role == 'user' %}{% set ns.last_user = index %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and '</think>' in message.content and loop.index0 < ns.last_user %}
{{ turn(message.role, message.content.split('</think>')[-1].lstrip('\\n')) }}
    {%- else %}
{{ turn(message.role, message.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}
"""

MISTRAL = """
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"]|trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """
{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{% set first = messages[0]['content'] ~ '\\n\\n' %}{% set turns = messages[1:] %}
{% else %}
{% set first = '' %}{% set turns = messages %}{% endif %}
{% for message in turns %}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + (first if loop.first else '') }}
{%- if message['content'] is string -%}
    {{ message['content'] | trim }}
{%- elif message['content'] is iterable -%}
    {%- for item in message['content'] -%}
        {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
    {%- endfor -%}
{%- else -%}
    {{ raise_exception("Invalid content type") }}
{%- endif -%}
{{ '<end_of_turn>\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

ZEPHYR = """
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{% generation %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endgeneration %}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

DEEPSEEK = """
{%- set ns = namespace(system='', is_first=true) -%}
{%- for message in messages -%}{%- if message['role'] == 'system' -%}
{%- set ns.system = ns.system + ('' if ns.is_first else '\\n\\n') + message['content'] -%}
{%- set ns.is_first = false -%}
{%- endif -%}{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages -%}
{%- if message['role'] == 'system' %}{% continue %}{% endif -%}
{%- if message['role'] == 'user' -%}{{ '<|User|>' + message['content'] }}{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{{ '<|Assistant|>' ~ message.content ~ '<|end▁of▁sentence|>' }}{%- endif -%}
{%- for name, value in message.items() if name not in ['role', 'content'] %}[{{ name }}={{ value }}]{% endfor -%}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}
"""

TEMPLATES = {
    "llama_3": LLAMA_3,
    "chatml": CHATML,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
    "deepseek": DEEPSEEK,
}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one_turn": [{"role": "user", "content": "  What is 1 < 2 & 3? \n"}],
    "system": [{"role": "system", "content": "Be “brief”."}, {"role": "user", "content": "Hällo 👋"}],
    "turns": [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "<think>why</think>\n\nbecause", "weight": None},
        {"role": "user", "content": ""},
    ],
}


@pytest.fixture(scope="module")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("reference")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[]))
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_renders_as_in_transformers(reference_folder: Path, template: str, conversation: str) -> None:
    (reference_folder / "chat_template.jinja").write_text(TEMPLATES[template])
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(reference_folder)
    ours = ChatTemplate.load(FolderText(reference_folder))
    assert ours is not None
    messages = CONVERSATIONS[conversation]
    tool = {"type": "function", "name": "add", "description": "a < b & 'c'", "parameters": {"z": 1, "a": ["é"]}}
    for settings in [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"add_generation_prompt": True, "tools": [tool]},
        {"add_generation_prompt": True, "enable_thinking": False, "bos_token": "<other>"},
    ]:
        expected = reference.apply_chat_template(messages, tokenize=False, **settings)
        assert ours.render(messages, **settings) == expected
        assert "user" in expected.lower() or "[INST]" in expected


def test_parts_of_content_render_as_in_transformers(reference_folder: Path) -> None:
    (reference_folder / "chat_template.jinja").write_text(GEMMA)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(reference_folder)
    ours = ChatTemplate.load(FolderText(reference_folder))
    assert ours is not None
    messages = [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]}]
    assert ours.render(messages) == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_refusal_is_one_in_transformers_too(reference_folder: Path) -> None:
    (reference_folder / "chat_template.jinja").write_text(MISTRAL)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(reference_folder)
    ours = ChatTemplate.load(FolderText(reference_folder))
    assert ours is not None
    messages = [{"role": "assistant", "content": "a"}]
    with pytest.raises(Exception, match="must alternate"):
        reference.apply_chat_template(messages, tokenize=False)
    with pytest.raises(RequestError, match="must alternate"):
        ours.render(messages)
