"""Tools, tool calls and tool results as the chat template of Qwen2.5 lays them out in text.

The checkpoint of Qwen2.5-VL has the tokens (``<tool_call>``, ``</tool_call>``) and its template does not mention tools;
the layout is that of the text models of the same family.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

_TOOLS_HEAD = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
_TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


class ToolError(ValueError):
    """Tools or a call that cannot be laid out; the message says why."""


def system_with_tools(system: str, tools: object) -> str:
    """The system text with the signatures of tools behind it.

    Args:
        system: the system text.
        tools: a list of objects ``{"type": "function", "function": {...}}`` or of bare functions, or one of them, or
            the JSON text of any of these.

    Raises:
        ToolError: they are something else.
    """
    tools = _parsed(tools, "tools")
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list):
        raise ToolError("tools are not a list of objects")
    lines = []
    for tool in tools:
        tool = _parsed(tool, "a tool")
        if not isinstance(tool, dict):
            raise ToolError("a tool is not an object")
        lines.append("\n" + _dump(tool if "function" in tool else {"type": "function", "function": tool}))
    return f"{system}{_TOOLS_HEAD}{''.join(lines)}{_TOOLS_TAIL}"


def call_text(call: object) -> str:
    """One call: an object ``{"name", "arguments"}``, alone, below ``function``, or as JSON text.

    Raises:
        ToolError: it has no name, or arguments that are not an object.
    """
    call = _parsed(call, "a tool call")
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ToolError('a tool call is not an object {"name", "arguments"}')
    arguments = _parsed(call.get("arguments", {}), "arguments")
    if not isinstance(arguments, dict):
        raise ToolError(f"the arguments of {call['name'][:40]!r} are not an object")
    return f'<tool_call>\n{{"name": {_dump(call["name"])}, "arguments": {_dump(arguments)}}}\n</tool_call>'


def answer_with_calls(content: str, calls: Iterable[object]) -> str:
    """The model's turn: what it says, if anything, and its calls, a line each."""
    return "\n".join([*([content] if content else []), *map(call_text, calls)])


def result_text(content: str) -> str:
    """A result, as a piece of the user's turn."""
    return f"<tool_response>\n{content}\n</tool_response>"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parsed(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ToolError(f"{what} is text that is not JSON ({error})") from error
