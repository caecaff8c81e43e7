"""Writes tests/golden/chat: tiny tokenizers, and what Transformers makes of conversations.

Run once, with transformers and tokenizers installed:
    python tests/golden/make_chat_golden.py

bytes.json is a byte-level BPE as in Llama 3 and SmolLM2, metaspace.json a BPE with byte
fallback as in Llama 2. cases.json holds templates as models have them, and for each some
conversations with their text, ids and, where the template marks answers, their mask.
"""

import json
from pathlib import Path

import tokenizers
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent / "chat"
TEXT = [
    "You are a helpful assistant. The user asks, the assistant answers the question.",
    "What is the sum of two numbers? The sum of two and three is five.",
    "def add(a, b):\n    return a + b\n\n# Returns the sum.\n",
    "The quick brown fox jumps over the lazy dog 0123456789.",
]
CONTROLS = [
    *("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = """\
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}
        {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + "
    "message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% endif %}{% endfor %}"
)
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
TOOLS = """\
{{- bos_token }}
{%- set ns = namespace(count=0) %}
{%- if tools is not none %}
    {{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) ~ '\n\n' }}{%- endfor %}
    {{- '<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'ignored' %}{%- continue %}{%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' }}
    {%- if 'tool_calls' in message %}
        {%- for call in message.tool_calls %}{{- call.function | tojson }}{%- endfor %}
    {%- else %}{{- message.content | trim }}{%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
# In the manner of Llama 3.1 and later: today's date, tools in the system or user turn, one
# call at a time, results as "ipython".
LLAMA31 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- set system_text = "" %}
{%- set turns = messages %}
{%- if messages[0]["role"] == "system" %}
    {%- set system_text = messages[0]["content"] | trim %}
    {%- set turns = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system_text }}{{- "<|eot_id|>" }}
{%- for message in turns %}
    {%- if not (message.role == "ipython" or message.role == "tool" or "tool_calls" in message) %}
        {{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" }}
        {{- message["content"] | trim + "<|eot_id|>" }}
    {%- elif "tool_calls" in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("one tool call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
DATE = "26 Jul 2024"  # Transformers would take today
ASK = {"role": "user", "content": "What is the sum of two and three?"}
ANSWER = {"role": "assistant", "content": "The sum is five."}
SYSTEM = {
    "role": "system",
    "content": "You answer with one word; caf\u00e9 \U0001f600.",
}
CONVERSATIONS = {
    "one": [ASK, ANSWER],
    "system": [SYSTEM, ASK, ANSWER],
    "two": [ASK, ANSWER, {"role": "user", "content": 'And\n\nof a < b, "x"?'}, ANSWER],
}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds <two> caf\u00e9s & more"},
}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 3}}}],
}
TOOL_CONVERSATIONS = {
    "call": [ASK, CALL, {"role": "tool", "content": "5"}, ANSWER],
    "one": [ASK, ANSWER],
}
TEMPLATES = {
    "chatml": ("bytes", "<|im_start|>", "<|im_end|>", CHATML, None),
    "generation": ("bytes", "<|im_start|>", "<|im_end|>", GENERATION, None),
    "llama3": ("bytes", "<|begin_of_text|>", "<|eot_id|>", LLAMA3, None),
    "llama31": ("bytes", "<|begin_of_text|>", "<|eot_id|>", LLAMA31, [TOOL]),
    "tools": ("bytes", "<|begin_of_text|>", "<|eot_id|>", TOOLS, [TOOL]),
    "llama2": ("metaspace", "<s>", "</s>", LLAMA2, None),
    "mistral": ("metaspace", "<s>", "</s>", MISTRAL, None),
    "zephyr": ("metaspace", "<s>", "</s>", ZEPHYR, None),
}


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=CONTROLS,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXT, "system user assistant\n\n"] * 2, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first", split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        min_frequency=1,
        special_tokens=[*CONTROLS[:3], *(f"<0x{byte:02X}>" for byte in range(256))],
        max_token_length=4,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    document = json.loads(tokenizer.to_str())
    # The byte tokens are vocabulary, not control tokens; the template adds BOS.
    document["added_tokens"] = document["added_tokens"][:3]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, text[0]],
        "pair": [bos, text[0], bos, text[1]],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    return Tokenizer.from_str(json.dumps(document))


def expected(tokenizer, messages, tools, has_mask: bool) -> dict:
    prompt = tokenizer.apply_chat_template(
        messages[:-1],
        tools=tools,
        add_generation_prompt=True,
        tokenize=False,
        date_string=DATE,
    )
    out = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        return_dict=True,
        return_assistant_tokens_mask=has_mask,
        date_string=DATE,
    )
    text = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, date_string=DATE
    )
    case = {"messages": messages, "tools": tools, "text": text, "prompt": prompt}
    case["ids"] = out["input_ids"]
    if has_mask:
        case["mask"] = out["assistant_masks"]
    return case


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for name, make in (("bytes", byte_level), ("metaspace", metaspace)):
        (HERE / f"{name}.json").write_text(make().to_str(), encoding="utf-8")
    versions = (
        f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}"
    )
    document = {"versions": versions, "templates": {}}
    for name, (file, bos, eos, template, tools) in TEMPLATES.items():
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(HERE / f"{file}.json"),
            bos_token=bos,
            eos_token=eos,
            chat_template=template,
        )
        conversations = dict(TOOL_CONVERSATIONS if tools else CONVERSATIONS)
        if name == "mistral":  # it has no place for a system turn
            del conversations["system"]
        document["templates"][name] = {
            "tokenizer": file,
            "bos_token": bos,
            "eos_token": eos,
            "template": template,
            "cases": {
                key: expected(tokenizer, messages, tools, name == "generation")
                for key, messages in conversations.items()
            },
        }
    (HERE / "cases.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
