"""Ollama's Modelfile: which GGUF file to load, the chat template, and what ends an answer.

Ollama does not run chat templates of Hugging Face. Its own form of one is found by
rendering a conversation and looking at what stands between the messages.

Source: Ollama's docs/modelfile.md and docs/template.md.
"""

from collections.abc import Sequence

from jlora.data.read.bad_rows import RowError
from jlora.data.tokenize.tokenizer import Tokenizer
from jlora.errors import CorruptError, UsageError

_SYSTEM, _USER, _ANSWER, _NEXT = (
    "JLORA_SYSTEM",
    "JLORA_USER",
    "JLORA_ANSWER",
    "JLORA_NEXT",
)
_CHAT = [("user", _USER), ("assistant", _ANSWER), ("user", _NEXT)]


def modelfile(gguf_file: str, tokenizer: Tokenizer) -> str:
    """Returns the contents of a Modelfile for a GGUF file in the same folder.

    Without a chat template, or with one that no template of Ollama's equals, it has none,
    and Ollama completes the bare text.
    """
    lines = [f"FROM ./{gguf_file}"]
    template = ollama_template(tokenizer)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    # Ollama strips quotes and knows no escapes. "?" stands for an id without a token.
    stops = [tokenizer.token(i) for i in sorted(tokenizer.stop_ids)]
    quotes = ('"""' if '"' in stop else '"' for stop in stops)
    lines += [
        f"PARAMETER stop {quote}{stop}{quote}"
        for quote, stop in zip(quotes, stops, strict=True)
        if stop != "?"
    ]
    return "\n".join(lines) + "\n"


def ollama_template(tokenizer: Tokenizer) -> str | None:
    """Returns the chat template in Ollama's language, None if there is no equal one."""
    try:
        texts = first, answer, following, end = _between(tokenizer, _CHAT)
    except (UsageError, RowError, CorruptError, ValueError):
        return None
    user = f"{{{{ if $i }}}}{following}{{{{ else }}}}{first}{{{{ end }}}}"
    system = ""
    try:
        head, after, *others = _between(tokenizer, [("system", _SYSTEM), *_CHAT])
        if others != [answer, following, end]:
            return None
        texts = [*texts, head, after]
        role = '(index $.Messages 0).Role "system"'
        user = (
            f"{{{{ if eq $i 0 }}}}{first}{{{{ else if and (eq $i 1) (eq {role}) }}}}"
            f"{after}{{{{ else }}}}{following}{{{{ end }}}}"
        )
        system = f'{{{{ else if eq .Role "system" }}}}{head}{{{{ .Content }}}}'
    except (RowError, ValueError):
        pass  # a template without system messages
    result = (
        "{{ range $i, $_ := .Messages }}"
        f'{{{{ if eq .Role "user" }}}}{user}{{{{ .Content }}}}'
        f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}'
        f"{system}{{{{ end }}}}{{{{ end }}}}{end}"
    )
    return None if '"""' in result or any("{{" in text for text in texts) else result


def _between(tokenizer: Tokenizer, messages: Sequence[tuple[str, str]]) -> list[str]:
    """Returns the text before each message of a conversation, and before the next answer.

    Without the BOS that llama.cpp puts in front by itself.

    Raises:
        RowError: the template refuses the conversation.
        ValueError: a message is not in the text, or not where it should be.
    """
    template = tokenizer.template()
    said = [{"role": role, "content": content} for role, content in messages]
    text = template.render(template.prepare(said), add_generation_prompt=True).text
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        text = text.removeprefix(tokenizer.token(tokenizer.bos_id))
    parts = []
    for _, content in messages:
        before, found, text = text.partition(content)
        if not found:
            raise ValueError(content)
        parts.append(before)
    return [*parts, text]
