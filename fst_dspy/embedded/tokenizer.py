"""The tokenizer: byte-level BPE that spends few tokens on DSPy's format and reproduces any text.

Two departures from the usual recipe, both to make copying easy for a small model and prompts short:

- A word has the same tokens wherever it stands. Where no space stands before a word (after a line
  break, a quote, a bracket), the normaliser puts a glue character and a space; the decoder takes
  both out. The glue is the byte 0xFF, which no UTF-8 text holds, so nothing is ever lost.
- The fixed phrases of DSPy's adapters and of ``dspy.ReAct``, and a stock of whole words, are tokens
  of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL = (PAD, END, *(f"<|{role}|>" for role in ROLES))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CONTEXT_LENGTH = 2048

# What the byte-level alphabet writes for a space, and the byte that no UTF-8 text holds.
_SPACE, _GLUE = "\u0120", "\u00ff"
_HIGH = "\u00a1-\u00ac\u00ae-\u00ff\u0122-\u0143"  # the bytes of non-ASCII letters
_BARE_WORD = rf"(?<![A-Za-z0-9{_SPACE}{_HIGH}])(?<![A-Za-z]')(?=[A-Za-z])"

# What dspy.ReAct writes; see below.
_REACT = (
    " next_thought",
    " next_tool_name",
    " next_tool_args",
    "Given the fields `~",
    "`, produce the fields `~",
    " \n        You are an Agent. In each episode, you will be given the fields `~",
    "` as input. And you can see your past trajectory so far.\n        Your goal is to use one or"
    " more of the supplied tools to collect any necessary information for producing `~",
    "`.\n        \n        To do this, you will interleave next_thought, next_tool_name, and"
    " next_tool_args in each turn, and also when finishing the task.\n        After each tool call,"
    " you receive a resulting observation, which gets appended to your trajectory.\n        \n"
    "        When writing next_thought, you may reason about the current situation and plan for"
    " future steps.\n        When selecting the next_tool_name and its next_tool_args, the tool"
    " must be one of:\n        \n        (1)",
    ", whose description is <desc>~",
    "</desc>. It takes arguments {'~",
    "</desc>. It takes arguments {",
    " Marks the task as complete. That is, signals that all information for producing the"
    " outputs, i.e. `~",
    "`, are now available to be extracted.</desc>. It takes arguments {}.\n        When providing"
    " `next_tool_args`, the value inside the field must be in JSON format",
    "': {'type': 'string'}}.\n       ",
    "` (dict[str, Any]):",
    "        # note: the value you produce must adhere to the JSON schema:"
    ' {"type": "object", "additionalProperties": true}',
    "        # note: the value you produce must adhere to the JSON schema:"
    r" {\"type\": \"object\", \"additionalProperties\": true}",
    " (must be formatted as a valid Python dict[str, Any])",
    " Use this nested XML structure: <~",
    ">...</~",
    '{"~',
    '"}',
    "{}",
)

# Phrases of the adapters and of ReAct; "~" marks where a word joins on, so that its glue is part
# of the token.
_PHRASES = (
    "Your input fields are:\n1. `~",
    "` (str):",
    "` (str): \n2. `~",
    "` (str): \n3. `~",
    "\n2. `~",
    "\n3. `~",
    "\nYour output fields are:\n1. `~",
    "\nAll interactions will be structured in the following way, with the appropriate values"
    " filled in.\n\n[[ ##",
    "[[ ##",
    " ## ]]\n{~",
    "}\n\n[[ ##",
    "}\n\n[[ ## completed ## ]]\nIn adhering to this structure, your objective is: \n       ",
    " ## ]]\n~",
    " ## ]]\n",
    "\n\n[[ ##",
    ".\n\n[[ ##",
    "\n       ",
    ".\n       ",
    "\n\nRespond with the corresponding output fields, starting with the field `[[ ##",
    " ## ]]`, then `[[ ##",
    " ## ]]`, and then ending with the marker for `[[ ## completed ## ]]`.",
    "\n~",
    "\n\n[[ ## completed ## ]]\n",
    "\n\n[[ ## completed ## ]]",
    "This is an example of the task, though some input or output fields are not supplied.\n\n[[ ##",
    "Not supplied for this particular example. ",
    # Types that are not plain text.
    " (must be formatted as a valid Python str)",
    "        # note: the value you produce must exactly match (no extra characters) one of:",
    " (must be formatted as a valid Python Literal['~",
    "` (Literal['~",
    "', '~",
    "'])",
    "']): \n2. `~",
    "']): \n3. `~",
    "']):",
    " ## ]]`",
    ", then `[[ ##",
    ", and then ending with the marker for `[[ ## completed ## ]]`.",
    "\n\n[[ ## completed ## ]]\nIn adhering to this structure, your objective is: \n       ",
    # XMLAdapter.
    "\nAll interactions will be structured in the following way, with the appropriate values"
    " filled in.\n\n<~",
    ">\n{~",
    "}\n</~",
    "<~",
    "</~",
    "\n</~",
    ".\n</~",
    ">\n~",
    ">\n",
    ">\n\n<~",
    ">\nIn adhering to this structure, your objective is: \n       ",
    ">\n\nRespond with the corresponding output fields wrapped in XML tags `<~",
    ">`, then `<~",
    ">`.",
    "This is an example of the task, though some input or output fields are not supplied.\n\n<~",
    # JSONAdapter.
    "\nAll interactions will be structured in the following way, with the appropriate values"
    " filled in.\n\nInputs will have the following structure:\n\n[[ ##",
    '}\n\nOutputs will be a JSON object with the following fields.\n\n{\n  "~',
    '": "{~',
    '}",\n  "~',
    '",\n  "~',
    '.",\n  "~',
    '}"\n}\nIn adhering to this structure, your objective is: \n       ',
    '"\n}\nIn adhering to this structure, your objective is: \n       ',
    "\n\nRespond with a JSON object in the following order of fields: `~",
    "`, then `~",
    "`.",
    '{\n  "~',
    '": "~',
    '": "',
    '"\n}',
    '": {\n    "~',
    '": {}\n}',
    '"\n  }\n}',
    # dspy.ReAct.
    *_REACT,
    # Turns of fst_dspy.env.
    "(nothing yet)",
)


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [normalizers.ByteLevel(), normalizers.Replace(Regex(_BARE_WORD), _GLUE + _SPACE)]
    )


def _normalized(phrase: str) -> str:
    text = _normalizer().normalize_str(phrase.removesuffix("~"))
    return text + _GLUE if phrase.endswith("~") else text


def _normalized_phrases() -> list[str]:
    return sorted(map(_normalized, _PHRASES), key=len, reverse=True)


def _escape(text: str) -> str:
    return "".join("\\" + char if char in r"\.[](){}*+?^$|#`-" else char for char in text)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    space, glue = _SPACE, _GLUE
    newline = "\u010a"
    phrases = "|".join(_escape(phrase) for phrase in _normalized_phrases())
    word = rf"{space}?[A-Za-z{_HIGH.replace(chr(255), chr(254))}]+(?:'[a-z]+)?"
    number = rf"{space}?[0-9]"
    mark = rf"{space}?[^A-Za-z0-9{space}{newline}{_HIGH}]{glue}?"
    blank = rf"{newline}{glue}|{newline}+|{space}+(?={space})|{space}|{glue}"
    pattern = "|".join([phrases, word, number, mark, blank, "."])
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def train(texts: Iterable[str], words: Sequence[str], pieces: int) -> Tokenizer:
    """A tokenizer with a token for each of ``words`` and up to ``pieces`` learned from ``texts``.

    Deterministic. ``pieces`` includes the 256 bytes.
    """
    whole = [*_normalized_phrases(), *(_SPACE + word for word in words)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = _pre_tokenizer()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        initial_alphabet=sorted(alphabet),
        max_token_length=12,
        min_frequency=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    # These go in by hand: taught by merges, each would cost several useless tokens on the way.
    vocab: dict[str, int] = {}
    by_id = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    for token in [*SPECIAL, *whole, *by_id]:
        vocab.setdefault(token, len(vocab))
    return _assembled(vocab, learned["merges"])


def extended(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[Tokenizer, dict[int, str]]:
    """``tokenizer`` with a token for each phrase and word that it has none for, after all others.

    Returns:
        The new one, and the text of every token it has more, by id.
    """
    model = json.loads(tokenizer.to_str())["model"]
    vocab: dict[str, int] = dict(model["vocab"])
    added: dict[int, str] = {}
    texts = [phrase.removesuffix("~") for phrase in _PHRASES]
    known = [*zip(map(_normalized, _PHRASES), texts, strict=True)]
    for token, text in [*known, *((_SPACE + word, " " + word) for word in words)]:
        if token not in vocab:
            vocab[token] = len(vocab)
            added[vocab[token]] = text
    return _assembled(vocab, model["merges"]), added


def _assembled(vocab: dict[str, int], merges: Sequence[Sequence[str]]) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[(a, b) for a, b in merges], ignore_merges=True)
    )
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Fuse(), decoders.Replace(_GLUE + _SPACE, ""), decoders.ByteLevel()]
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` for ``AutoTokenizer``."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": CONTEXT_LENGTH,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
