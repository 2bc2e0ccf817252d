"""Which tokens are trained: rows written out by hand for each template, ⟦ ⟧ around what is."""

import json

import pytest

from eightgig.data.formats import RowShape, read_example
from eightgig.data.render import Renderer
from eightgig.data.rules import Notes
from eightgig.data.tokenizer import render_settings
from tests.chats import CHATS, OFFICIAL_TEMPLATES, make_chat_tokenizer


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(*cities, content=""):
    functions = [{"name": "sun", "arguments": {"city": city}} for city in cities]
    return assistant(content, tool_calls=[{"type": "function", "function": f} for f in functions])


def result(content):
    return {"role": "tool", "name": "sun", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [{"type": "function", "function": {"name": "sun", "description": "Is it sunny?"}}]
SHAPES = {
    "one turn": {"messages": [user("Hi"), assistant("Hello")]},
    "system": {"messages": [SYSTEM, user("Hi"), assistant("Hello")]},
    "two turns": {"messages": [user("Hi"), assistant("Hello"), user("Bye"), assistant("See you")]},
    "system and three turns": {
        "messages": [
            SYSTEM,
            *(turn for n in ("one", "two", "three") for turn in (user(n), assistant(n.upper()))),
        ]
    },
    "blanks": {"messages": [user("  Hi \n"), assistant("Hello  \n")]},
    "lines and letters": {"messages": [user("Grüße\n\nß"), assistant("日本\n🙂")]},
    "text parts": {
        "messages": [
            user([{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]),
            assistant("Hello"),
        ]
    },
    "call": {"messages": [user("Sun?"), call("Bonn")]},
    "call, result, answer": {
        "messages": [user("Sun?"), call("Bonn"), result("yes"), assistant("It shines.")]
    },
    "two calls": {
        "messages": [
            user("Sun?"),
            call("Bonn", "Ulm"),
            result("yes"),
            result("no"),
            assistant("It shines."),
        ]
    },
    "tools": {"messages": [user("Hi"), assistant("Hello")], "tools": TOOLS},
    "reasoning": {"messages": [user("Hi"), assistant("Hello", reasoning="Be brief.")]},
    "reasoning in both turns": {
        "messages": [
            user("Hi"),
            assistant("Hello", reasoning="one"),
            user("Bye"),
            assistant("See you", reasoning="two"),
        ]
    },
    "reasoning in the last turn": {
        "messages": [
            user("Hi"),
            assistant("Hello"),
            user("Bye"),
            assistant("See you", reasoning="two"),
        ]
    },
    "last answer": {
        "messages": [user("Hi"), assistant("Hello"), user("Bye"), assistant("See you")],
        "train_on": "last_assistant",
    },
    "all tokens": {
        "messages": [user("Hi"), assistant("Hello"), user("Bye"), assistant("See you")],
        "train_on": "all",
    },
}

# Rows of each shape, in order; or the code of the finding, where the template cannot say it.
EXPECTED = {
    "gemma4_small": {
        "one turn": ["<bos><|turn>user\nHi<turn|>\n<|turn>model\n⟦Hello<turn|>⟧\n"],
        "system": [
            "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n"
            "<|turn>model\n⟦Hello<turn|>⟧\n"
        ],
        "two turns": [
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\n⟦Hello<turn|>⟧\n"
            "<|turn>user\nBye<turn|>\n<|turn>model\n⟦See you<turn|>⟧\n"
        ],
        "system and three turns": [
            "<bos><|turn>system\nBe brief.<turn|>\n"
            "<|turn>user\none<turn|>\n<|turn>model\n⟦ONE<turn|>⟧\n"
            "<|turn>user\ntwo<turn|>\n<|turn>model\n⟦TWO<turn|>⟧\n"
            "<|turn>user\nthree<turn|>\n<|turn>model\n⟦THREE<turn|>⟧\n"
        ],
        "blanks": ["<bos><|turn>user\nHi<turn|>\n<|turn>model\n⟦Hello<turn|>⟧\n"],
        "lines and letters": [
            "<bos><|turn>user\nGrüße\n\nß<turn|>\n<|turn>model\n⟦日本\n🙂<turn|>⟧\n"
        ],
        "text parts": ["<bos><|turn>user\nHiyou<turn|>\n<|turn>model\n⟦Hello<turn|>⟧\n"],
        "call": [
            "<bos><|turn>user\nSun?<turn|>\n<|turn>model\n"
            '⟦<|tool_call>call:sun{city:<|"|>Bonn<|"|>}<tool_call|><|tool_response>⟧'
        ],
        "call, result, answer": [
            "<bos><|turn>user\nSun?<turn|>\n<|turn>model\n"
            '⟦<|tool_call>call:sun{city:<|"|>Bonn<|"|>}<tool_call|><|tool_response>⟧'
            'response:sun{value:<|"|>yes<|"|>}<tool_response|>⟦It shines.<turn|>⟧\n'
        ],
        "two calls": [
            "<bos><|turn>user\nSun?<turn|>\n<|turn>model\n"
            '⟦<|tool_call>call:sun{city:<|"|>Bonn<|"|>}<tool_call|>'
            '<|tool_call>call:sun{city:<|"|>Ulm<|"|>}<tool_call|><|tool_response>⟧'
            'response:sun{value:<|"|>yes<|"|>}<tool_response|>'
            '<|tool_response>response:sun{value:<|"|>no<|"|>}<tool_response|>'
            "⟦It shines.<turn|>⟧\n"
        ],
        "tools": [
            "<bos><|turn>system\n<|tool>declaration:sun{description:"
            '<|"|>Is it sunny?<|"|>}<tool|><turn|>\n'
            "<|turn>user\nHi<turn|>\n<|turn>model\n⟦Hello<turn|>⟧\n"
        ],
        "reasoning": [
            "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
            "⟦<|channel>thought\nBe brief.\n<channel|>Hello<turn|>⟧\n"
        ],
        "reasoning in both turns": [
            "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
            "⟦<|channel>thought\none\n<channel|>Hello<turn|>⟧\n",
            "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
            "Hello<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\n"
            "⟦<|channel>thought\ntwo\n<channel|>See you<turn|>⟧\n",
        ],
        "reasoning in the last turn": [
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\n⟦Hello<turn|>⟧\n",
            "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
            "Hello<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\n"
            "⟦<|channel>thought\ntwo\n<channel|>See you<turn|>⟧\n",
        ],
        "last answer": [
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\nHello<turn|>\n"
            "<|turn>user\nBye<turn|>\n<|turn>model\n⟦See you<turn|>⟧\n"
        ],
        "all tokens": [
            "<bos>⟦<|turn>user\nHi<turn|>\n<|turn>model\nHello<turn|>\n"
            "<|turn>user\nBye<turn|>\n<|turn>model\nSee you<turn|>\n⟧"
        ],
    },
    "gemma4_large": {
        "one turn": [
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            "⟦Hello<turn|>⟧\n"
        ],
        "system": [
            "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n"
            "<|turn>model\n<|channel>thought\n<channel|>⟦Hello<turn|>⟧\n"
        ],
        "two turns": [
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            "⟦Hello<turn|>⟧\n",
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\nHello<turn|>\n"
            "<|turn>user\nBye<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            "⟦See you<turn|>⟧\n",
        ],
        "system and three turns": [
            "<bos><|turn>system\nBe brief.<turn|>\n"
            "<|turn>user\none<turn|>\n<|turn>model\n<|channel>thought\n<channel|>⟦ONE<turn|>⟧\n",
            "<bos><|turn>system\nBe brief.<turn|>\n"
            "<|turn>user\none<turn|>\n<|turn>model\nONE<turn|>\n"
            "<|turn>user\ntwo<turn|>\n<|turn>model\n<|channel>thought\n<channel|>⟦TWO<turn|>⟧\n",
            "<bos><|turn>system\nBe brief.<turn|>\n"
            "<|turn>user\none<turn|>\n<|turn>model\nONE<turn|>\n"
            "<|turn>user\ntwo<turn|>\n<|turn>model\nTWO<turn|>\n"
            "<|turn>user\nthree<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            "⟦THREE<turn|>⟧\n",
        ],
        "blanks": [
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            "⟦Hello<turn|>⟧\n"
        ],
        "lines and letters": [
            "<bos><|turn>user\nGrüße\n\nß<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            "⟦日本\n🙂<turn|>⟧\n"
        ],
        "text parts": [
            "<bos><|turn>user\nHiyou<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            "⟦Hello<turn|>⟧\n"
        ],
        "call": [
            "<bos><|turn>user\nSun?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            '⟦<|tool_call>call:sun{city:<|"|>Bonn<|"|>}<tool_call|><|tool_response>⟧'
        ],
        "call, result, answer": [
            "<bos><|turn>user\nSun?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            '⟦<|tool_call>call:sun{city:<|"|>Bonn<|"|>}<tool_call|><|tool_response>⟧',
            "<bos><|turn>user\nSun?<turn|>\n<|turn>model\n"
            '<|tool_call>call:sun{city:<|"|>Bonn<|"|>}<tool_call|><|tool_response>'
            'response:sun{value:<|"|>yes<|"|>}<tool_response|>⟦It shines.<turn|>⟧\n',
        ],
        "two calls": [
            "<bos><|turn>user\nSun?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            '⟦<|tool_call>call:sun{city:<|"|>Bonn<|"|>}<tool_call|>'
            '<|tool_call>call:sun{city:<|"|>Ulm<|"|>}<tool_call|><|tool_response>⟧',
            "<bos><|turn>user\nSun?<turn|>\n<|turn>model\n"
            '<|tool_call>call:sun{city:<|"|>Bonn<|"|>}<tool_call|>'
            '<|tool_call>call:sun{city:<|"|>Ulm<|"|>}<tool_call|><|tool_response>'
            'response:sun{value:<|"|>yes<|"|>}<tool_response|>'
            '<|tool_response>response:sun{value:<|"|>no<|"|>}<tool_response|>'
            "⟦It shines.<turn|>⟧\n",
        ],
        "tools": [
            "<bos><|turn>system\n<|tool>declaration:sun{description:"
            '<|"|>Is it sunny?<|"|>}<tool|><turn|>\n'
            "<|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>⟦Hello<turn|>⟧\n"
        ],
        "reasoning": [
            "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
            "⟦<|channel>thought\nBe brief.\n<channel|>Hello<turn|>⟧\n"
        ],
        "reasoning in both turns": [
            "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
            "⟦<|channel>thought\none\n<channel|>Hello<turn|>⟧\n",
            "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
            "Hello<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\n"
            "⟦<|channel>thought\ntwo\n<channel|>See you<turn|>⟧\n",
        ],
        "reasoning in the last turn": [
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            "⟦Hello<turn|>⟧\n",
            "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
            "Hello<turn|>\n<|turn>user\nBye<turn|>\n<|turn>model\n"
            "⟦<|channel>thought\ntwo\n<channel|>See you<turn|>⟧\n",
        ],
        "last answer": [
            "<bos><|turn>user\nHi<turn|>\n<|turn>model\nHello<turn|>\n"
            "<|turn>user\nBye<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            "⟦See you<turn|>⟧\n"
        ],
        "all tokens": [
            "<bos>⟦<|turn>user\nHi<turn|>\n<|turn>model\nHello<turn|>\n"
            "<|turn>user\nBye<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
            "See you<turn|>\n⟧"
        ],
    },
}

_LLAMA_START = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: 26 Jul 2024\n\n{}<|eot_id|>"
)
_LLAMA_USER = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
_LLAMA_ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_LLAMA_SUN = (
    _LLAMA_START.format("") + _LLAMA_USER.format("Sun?") + _LLAMA_ANSWER
    + '⟦{"name": "sun", "parameters": {"city": "Bonn"}}<|eot_id|>⟧'
)  # fmt: skip
EXPECTED["llama3"] = {
    "one turn": [
        _LLAMA_START.format("") + _LLAMA_USER.format("Hi") + _LLAMA_ANSWER + "⟦Hello<|eot_id|>⟧"
    ],
    "system": [
        _LLAMA_START.format("Be brief.") + _LLAMA_USER.format("Hi") + _LLAMA_ANSWER
        + "⟦Hello<|eot_id|>⟧"
    ],
    "two turns": [
        _LLAMA_START.format("") + _LLAMA_USER.format("Hi") + _LLAMA_ANSWER + "⟦Hello<|eot_id|>⟧"
        + _LLAMA_USER.format("Bye") + _LLAMA_ANSWER + "⟦See you<|eot_id|>⟧"
    ],
    "system and three turns": [
        _LLAMA_START.format("Be brief.")
        + _LLAMA_USER.format("one") + _LLAMA_ANSWER + "⟦ONE<|eot_id|>⟧"
        + _LLAMA_USER.format("two") + _LLAMA_ANSWER + "⟦TWO<|eot_id|>⟧"
        + _LLAMA_USER.format("three") + _LLAMA_ANSWER + "⟦THREE<|eot_id|>⟧"
    ],
    "blanks": [
        _LLAMA_START.format("") + _LLAMA_USER.format("Hi") + _LLAMA_ANSWER + "⟦Hello<|eot_id|>⟧"
    ],
    "lines and letters": [
        _LLAMA_START.format("") + _LLAMA_USER.format("Grüße\n\nß") + _LLAMA_ANSWER
        + "⟦日本\n🙂<|eot_id|>⟧"
    ],
    "text parts": [
        _LLAMA_START.format("") + _LLAMA_USER.format("Hi\nyou") + _LLAMA_ANSWER
        + "⟦Hello<|eot_id|>⟧"
    ],
    "call": [_LLAMA_SUN],
    "call, result, answer": [
        _LLAMA_SUN + '<|start_header_id|>ipython<|end_header_id|>\n\n"yes"<|eot_id|>'
        + _LLAMA_ANSWER + "⟦It shines.<|eot_id|>⟧"
    ],
    "two calls": "data.template_refused",
    "tools": [
        _LLAMA_START.format("") + "<|start_header_id|>user<|end_header_id|>\n\nFunctions:\n"
        + json.dumps(TOOLS[0]) + "\nHi<|eot_id|>" + _LLAMA_ANSWER + "⟦Hello<|eot_id|>⟧"
    ],
    "reasoning": "data.reasoning_lost",
    "reasoning in both turns": "data.reasoning_lost",
    "reasoning in the last turn": "data.reasoning_lost",
    "last answer": [
        _LLAMA_START.format("") + _LLAMA_USER.format("Hi") + _LLAMA_ANSWER + "Hello<|eot_id|>"
        + _LLAMA_USER.format("Bye") + _LLAMA_ANSWER + "⟦See you<|eot_id|>⟧"
    ],
    "all tokens": [
        "<|begin_of_text|>⟦" + _LLAMA_START.format("").removeprefix("<|begin_of_text|>")
        + _LLAMA_USER.format("Hi") + _LLAMA_ANSWER + "Hello<|eot_id|>"
        + _LLAMA_USER.format("Bye") + _LLAMA_ANSWER + "See you<|eot_id|>⟧"
    ],
}  # fmt: skip

_HI = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
_BYE = "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
_SUN = "<|im_start|>user\nSun?<|im_end|>\n<|im_start|>assistant\n"
_NO_THOUGHT = "<think>\n\n</think>\n\n"
_CALL = '<tool_call>\n{"name": "sun", "arguments": {"city": "Bonn"}}\n</tool_call>'
_CALLS = _CALL + '\n<tool_call>\n{"name": "sun", "arguments": {"city": "Ulm"}}\n</tool_call>'
EXPECTED["qwen3"] = {
    "one turn": [_HI + "⟦" + _NO_THOUGHT + "Hello<|im_end|>⟧\n"],
    "system": [
        "<|im_start|>system\nBe brief.<|im_end|>\n" + _HI + "⟦" + _NO_THOUGHT + "Hello<|im_end|>⟧\n"
    ],
    "two turns": [
        _HI + "⟦" + _NO_THOUGHT + "Hello<|im_end|>⟧\n",
        _HI + "Hello<|im_end|>\n" + _BYE + "⟦" + _NO_THOUGHT + "See you<|im_end|>⟧\n",
    ],
    "system and three turns": [
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nONE<|im_end|>⟧\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nONE<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nTWO<|im_end|>⟧\n",
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nONE<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nTWO<|im_end|>\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nTHREE<|im_end|>⟧\n",
    ],
    "blanks": [
        "<|im_start|>user\n  Hi \n<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nHello  \n<|im_end|>⟧\n"
    ],
    "lines and letters": [
        "<|im_start|>user\nGrüße\n\nß<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\n日本\n🙂<|im_end|>⟧\n"
    ],
    "text parts": [
        "<|im_start|>user\nHi\nyou<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nHello<|im_end|>⟧\n"
    ],
    "call": [_SUN + "⟦" + _NO_THOUGHT + _CALL + "<|im_end|>⟧\n"],
    # Behind a result the call counts as part of the same answer and loses its empty thought.
    "call, result, answer": [
        _SUN + "⟦" + _NO_THOUGHT + _CALL + "<|im_end|>⟧\n",
        _SUN + _CALL + "<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nyes\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt shines.<|im_end|>⟧\n",
    ],
    "two calls": [
        _SUN + "⟦" + _NO_THOUGHT + _CALLS + "<|im_end|>⟧\n",
        _SUN + _CALLS + "<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nyes\n</tool_response>\n"
        "<tool_response>\nno\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt shines.<|im_end|>⟧\n",
    ],
    "tools": [
        "<|im_start|>system\n<tools>\n" + json.dumps(TOOLS[0]) + "\n</tools><|im_end|>\n"
        + _HI + "⟦" + _NO_THOUGHT + "Hello<|im_end|>⟧\n"
    ],
    "reasoning": [_HI + "⟦<think>\nBe brief.\n</think>\n\nHello<|im_end|>⟧\n"],
    "reasoning in both turns": [
        _HI + "⟦<think>\none\n</think>\n\nHello<|im_end|>⟧\n",
        _HI + "Hello<|im_end|>\n" + _BYE + "⟦<think>\ntwo\n</think>\n\nSee you<|im_end|>⟧\n",
    ],
    "reasoning in the last turn": [
        _HI + "⟦<think>\n\n</think>\n\nHello<|im_end|>⟧\n",
        _HI + "Hello<|im_end|>\n" + _BYE + "⟦<think>\ntwo\n</think>\n\nSee you<|im_end|>⟧\n",
    ],
    "last answer": [
        _HI + "Hello<|im_end|>\n" + _BYE + "⟦<think>\n\n</think>\n\nSee you<|im_end|>⟧\n"
    ],
    "all tokens": [
        "<|im_start|>⟦" + _HI.removeprefix("<|im_start|>") + "Hello<|im_end|>\n" + _BYE
        + "<think>\n\n</think>\n\nSee you<|im_end|>\n⟧"
    ],
}  # fmt: skip

EXPECTED["mistral"] = {
    "one turn": ["<s>[INST] Hi[/INST]⟦ Hello</s>⟧"],
    "system": ["<s>[INST] Be brief.\n\nHi[/INST]⟦ Hello</s>⟧"],
    "two turns": ["<s>[INST] Hi[/INST]⟦ Hello</s>⟧[INST] Bye[/INST]⟦ See you</s>⟧"],
    # The system text stands before the last question, whatever the question is.
    "system and three turns": [
        "<s>[INST] Be brief.\n\none[/INST]⟦ ONE</s>⟧",
        "<s>[INST] one[/INST] ONE</s>[INST] Be brief.\n\ntwo[/INST]⟦ TWO</s>⟧",
        "<s>[INST] one[/INST] ONE</s>[INST] two[/INST] TWO</s>"
        "[INST] Be brief.\n\nthree[/INST]⟦ THREE</s>⟧",
    ],
    "blanks": ["<s>[INST]   Hi \n[/INST]⟦ Hello</s>⟧"],
    "lines and letters": ["<s>[INST] Grüße\n\nß[/INST]⟦ 日本\n🙂</s>⟧"],
    "text parts": ["<s>[INST] Hi\nyou[/INST]⟦ Hello</s>⟧"],
    "call": [
        '<s>[INST] Sun?[/INST]⟦[TOOL_CALLS] [{"name": "sun", "arguments": {"city": "Bonn"}}]</s>⟧'
    ],
    "call, result, answer": [
        '<s>[INST] Sun?[/INST]⟦[TOOL_CALLS] [{"name": "sun", "arguments": {"city": "Bonn"}}]</s>⟧'
        '[TOOL_RESULTS] {"content": "yes"}[/TOOL_RESULTS]⟦ It shines.</s>⟧'
    ],
    "two calls": [
        '<s>[INST] Sun?[/INST]⟦[TOOL_CALLS] [{"name": "sun", "arguments": {"city": "Bonn"}}, '
        '{"name": "sun", "arguments": {"city": "Ulm"}}]</s>⟧'
        '[TOOL_RESULTS] {"content": "yes"}[/TOOL_RESULTS]'
        '[TOOL_RESULTS] {"content": "no"}[/TOOL_RESULTS]⟦ It shines.</s>⟧'
    ],
    "tools": [
        "<s>[AVAILABLE_TOOLS] " + json.dumps(TOOLS) + "[/AVAILABLE_TOOLS][INST] Hi[/INST]"
        "⟦ Hello</s>⟧"
    ],
    "reasoning": "data.reasoning_lost",
    "reasoning in both turns": "data.reasoning_lost",
    "reasoning in the last turn": "data.reasoning_lost",
    "last answer": ["<s>[INST] Hi[/INST] Hello</s>[INST] Bye[/INST]⟦ See you</s>⟧"],
    "all tokens": ["<s>⟦[INST] Hi[/INST] Hello</s>[INST] Bye[/INST] See you</s>⟧"],
}

_SMOL = "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
EXPECTED["smollm2"] = {
    "one turn": [_SMOL + _HI + "⟦Hello<|im_end|>⟧\n"],
    "system": ["<|im_start|>system\nBe brief.<|im_end|>\n" + _HI + "⟦Hello<|im_end|>⟧\n"],
    "two turns": [
        _SMOL + _HI + "⟦Hello<|im_end|>⟧\n" + _BYE + "⟦See you<|im_end|>⟧\n"
    ],
    "system and three turns": [
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n⟦ONE<|im_end|>⟧\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n⟦TWO<|im_end|>⟧\n"
        "<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n⟦THREE<|im_end|>⟧\n"
    ],
    "blanks": [
        _SMOL + "<|im_start|>user\n  Hi \n<|im_end|>\n<|im_start|>assistant\n"
        "⟦Hello  \n<|im_end|>⟧\n"
    ],
    "lines and letters": [
        _SMOL + "<|im_start|>user\nGrüße\n\nß<|im_end|>\n<|im_start|>assistant\n"
        "⟦日本\n🙂<|im_end|>⟧\n"
    ],
    "text parts": [
        _SMOL + "<|im_start|>user\nHi\nyou<|im_end|>\n<|im_start|>assistant\n"
        "⟦Hello<|im_end|>⟧\n"
    ],
    "call": "data.content_lost",
    "call, result, answer": "data.content_lost",
    "two calls": "data.content_lost",
    "tools": [_SMOL + _HI + "⟦Hello<|im_end|>⟧\n"],
    "reasoning": "data.reasoning_lost",
    "reasoning in both turns": "data.reasoning_lost",
    "reasoning in the last turn": "data.reasoning_lost",
    "last answer": [
        _SMOL + _HI + "Hello<|im_end|>\n" + _BYE + "⟦See you<|im_end|>⟧\n"
    ],
    "all tokens": [
        "<|im_start|>⟦" + _SMOL.removeprefix("<|im_start|>") + _HI + "Hello<|im_end|>\n" + _BYE
        + "See you<|im_end|>\n⟧"
    ],
}  # fmt: skip


def needs_template(chat: str) -> None:
    path = OFFICIAL_TEMPLATES.get(chat)
    if path is not None and not path.exists():
        pytest.skip(f"Google's chat template is not here: {path.name}")


def render(chat: str, row: dict):
    tokenizer = make_chat_tokenizer(chat)
    notes = Notes(file="rows.jsonl", line=1)
    example = read_example(row, RowShape(format="messages", columns={}), notes)
    train_on = row.get("train_on", "assistant")
    rows = Renderer(render_settings(tokenizer)).render(example, notes, train_on=train_on)
    return tokenizer, example, rows, notes


def marked(tokenizer, row) -> str:
    """The text of a row with ⟦ ⟧ around what is trained."""
    pieces, start = [], 0
    ids, is_trained = row.input_ids.tolist(), row.is_trained.tolist()
    for end in range(1, len(ids) + 1):
        if end == len(ids) or is_trained[end] != is_trained[start]:
            text = tokenizer.decode(ids[start:end])
            pieces.append(f"⟦{text}⟧" if is_trained[start] else text)
            start = end
    return "".join(pieces)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chat", CHATS)
def test_the_trained_tokens_are_those_written_out_by_hand(chat, shape):
    needs_template(chat)
    expected = EXPECTED[chat][shape]
    tokenizer, _, rows, notes = render(chat, SHAPES[shape])
    codes = [finding.code for finding in notes.findings if finding.severity == "error"]
    if isinstance(expected, str):
        assert codes[:1] == [expected]
        assert rows == ()
        return
    assert codes == []
    assert [marked(tokenizer, row) for row in rows] == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chat", CHATS)
def test_every_row_begins_with_the_tokens_that_a_server_sends(chat, shape):
    needs_template(chat)
    tokenizer, example, rows, _ = render(chat, SHAPES[shape])
    prompts = []
    for index in example.trained if rows else ():
        thinking = {"enable_thinking": True} if "reasoning" in example.messages[index] else {}
        prompt = tokenizer.apply_chat_template(
            list(map(dict, _joined(chat, example.messages[:index]))),
            tools=list(example.tools) or None,
            add_generation_prompt=True,
            return_dict=False,
            **thinking,
        )
        prompts.append(prompt)
    if SHAPES[shape].get("train_on") in ("last_assistant", "all"):
        prompts = prompts[-1:]
    for prompt in prompts:
        matching = [row for row in rows if row.input_ids[: len(prompt)].tolist() == prompt]
        trained = [row for row in matching if row.is_trained[len(prompt)]]
        assert trained, f"no row trains what follows {tokenizer.decode(prompt)!r}"


def _joined(chat, messages):
    if chat.startswith("gemma4"):
        return messages
    return [
        {**m, "content": "\n".join(part["text"] for part in m["content"])}
        if isinstance(m["content"], list)
        else m
        for m in messages
    ]


@pytest.mark.parametrize("answer", ["\n\nHello", "\n\n"])
def test_a_prompt_keeps_its_tokens_where_the_answer_begins_with_blanks(answer):
    tokenizer, _, rows, _ = render(
        "smollm2", {"messages": [user("Hi"), assistant(answer + "!"), user("Bye"), assistant("!")]}
    )
    prompt = tokenizer.apply_chat_template(
        [user("Hi")], add_generation_prompt=True, return_dict=False
    )
    first = rows[0]
    assert first.input_ids[: len(prompt)].tolist() == prompt
    assert tokenizer.decode(first.input_ids[first.is_trained]) == answer + "!<|im_end|>"
    assert marked(tokenizer, first).endswith("<|im_end|>⟧\n")
    # As history the same text is cut otherwise, so the last answer has a row of its own.
    assert len(rows) == 2
    whole = tokenizer.apply_chat_template(
        [user("Hi"), assistant(answer + "!"), user("Bye")],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert rows[1].input_ids[: len(whole)].tolist() == whole


def test_a_prompt_of_a_long_text_without_control_tokens_keeps_its_tokens():
    source = "{% for m in messages %}{{ m.content + ('<|eot_id|>' if loop.index is even else '') }}"
    source += "{% endfor %}"
    tokenizer = make_chat_tokenizer("llama3", source)
    notes = Notes(file="rows.jsonl", line=1)
    row = {"messages": [user("the question " * 90), assistant("the answer")]}
    example = read_example(row, RowShape(format="messages", columns={}), notes)
    rows = Renderer(render_settings(tokenizer)).render(example, notes)
    assert notes.findings == []
    (rendered,) = rows
    prompt = tokenizer("the question " * 90, add_special_tokens=False)["input_ids"]
    assert rendered.input_ids[: len(prompt)].tolist() == prompt
    trained = tokenizer.decode(rendered.input_ids[rendered.is_trained])
    assert trained == "the answer<|eot_id|>"
