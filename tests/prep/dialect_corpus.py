"""Records as other tools write them, each with the canonical record that it must equal or the code that rejects it.

``ROOT`` in a name stands for the media root. The media are written by :func:`write_media`.
"""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.media.item import ItemSettings
from tests.prep.test_images import random_image
from tests.prep.test_videos import write_video

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One record.

    Attributes:
        dialect: tool or format that it comes from.
        name: what is special about it; unique.
        record: as the tool writes it.
        canonical: the LLaVA record that it must equal; None if it must be rejected.
        untrained: answers without loss, counted from 0.
        settings: of each image and then of each video, if any has settings of its own.
        frames: names of the frames of each video that is a list of images.
        packed: the canonical record as it is packed, where that differs: with boxes in pixels of the resized images.
        code: that it must be rejected with; several are separated by blanks.
        unused: names of the fields that are counted.
    """

    dialect: str
    name: str
    record: Record
    canonical: Record | None = None
    untrained: tuple[int, ...] = ()
    settings: tuple[ItemSettings | None, ...] = ()
    frames: tuple[tuple[str, ...], ...] = ()
    packed: Record | None = None
    code: str = ""
    unused: tuple[str, ...] = ()


def _png(width: int, height: int, seed: int) -> bytes:
    buffer = io.BytesIO()
    random_image(width, height, seed=seed).save(buffer, "PNG")
    return buffer.getvalue()


PNG = _png(84, 56, seed=5)
BASE64 = base64.b64encode(PNG).decode()
DATA_URI = f"data:image/png;base64,{BASE64}"


def write_media(root: Path) -> None:
    """Write the media that the records name."""
    (root / "sub dir").mkdir()
    (root / "a.png").write_bytes(_png(120, 90, seed=1))
    random_image(60, 200, seed=2).save(root / "b.jpg")
    (root / "sub dir" / "c%20.png").write_bytes(_png(90, 90, seed=3))
    (root / "e.png").write_bytes(PNG)
    (root / "clip").mkdir()
    for index in range(6):
        frame = _png(112, 84, seed=10 + index)
        for name in (f"f{index}.png", f"clip/f{index}.png"):
            (root / name).write_bytes(frame)
    write_video(root / "v.mp4", 12, 2)


def as_text(record: Record, root: Path) -> bytes:
    """JSON text of a record, with the media root in its names."""
    return json.dumps(record, ensure_ascii=False).replace("ROOT", str(root)).encode()


def llava(*texts: str, system: str | None = None, **fields: Any) -> Record:
    """A canonical record: questions and answers in turn."""
    turns = [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]
    return {"conversations": ([] if system is None else [{"from": "system", "value": system}]) + turns, **fields}


def sharegpt(*turns: tuple[str, str], **fields: Any) -> Record:
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **fields}


def messages(*turns: tuple[str, Any], **fields: Any) -> Record:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **fields}


def user_parts(*parts: Any, **fields: Any) -> Record:
    """One question made of parts, and its answer."""
    return messages(("user", list(parts)), ("assistant", "A cat."), **fields)


def answer_with(**flags: Any) -> Record:
    """Two exchanges; the first answer has flags."""
    record = messages(("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "Bye"))
    record["messages"][1].update(flags)
    return record


def text(value: str) -> Record:
    return {"type": "text", "text": value}


WHAT = text("What is it?")
ONE = llava("<image>What is it?", "A cat.", image="a.png")
EMBEDDED = llava("<image>What is it?", "A cat.", image="e.png")
VIDEO = llava("<video>What is it?", "A cat.", video="v.mp4")
HELLO = llava("Hi", "Hello")
TWO = llava("Hi", "Hello", "And?", "Bye")

WEATHER: Record = {
    "name": "weather",
    "description": "Météo d'une ville",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TOOL: Record = {"type": "function", "function": WEATHER}
WEATHER_TEXT = (
    '{"type": "function", "function": {"name": "weather", "description": "Météo d\'une ville", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}'
)
TOOLS_TEXT = f"""

# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{WEATHER_TEXT}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
DEFAULT = "You are a helpful assistant."
CALL: Record = {"name": "weather", "arguments": {"city": "Orléans"}}
CALL_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Orléans"}}\n</tool_call>'
CALL_2: Record = {"name": "weather", "arguments": {"city": "Rome", "days": [1, 2.5]}}
CALL_2_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": [1, 2.5]}}\n</tool_call>'
RESULT_TEXT = "<tool_response>\nrain\n</tool_response>"
AGENT = llava("Rain?", CALL_TEXT, RESULT_TEXT, "Yes.", system=DEFAULT + TOOLS_TEXT)
OPENAI_CALL: Record = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Orléans"}'},
}


def openai_agent(*result: Any, **fields: Any) -> Record:
    """A question, a call, its results and the answer."""
    return {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
            *({"role": "tool", "tool_call_id": "call_1", "content": content} for content in result),
            {"role": "assistant", "content": "Yes."},
        ],
        "tools": [TOOL],
        **fields,
    }


def _good(dialect: str, name: str, record: Record, canonical: Record, **options: Any) -> Case:
    return Case(dialect=dialect, name=name, record=record, canonical=canonical, **options)


def _bad(dialect: str, name: str, record: Record, code: str = "bad_field") -> Case:
    return Case(dialect=dialect, name=name, record=record, code=code)


def _llava() -> list[Case]:
    return [
        _good("LLaVA", "one image", ONE, ONE),
        _good("LLaVA", "images in order", llava("<image> or <image>?", "b", images=["a.png", "b.jpg"]),
              llava("<image> or <image>?", "b", image=["a.png", "b.jpg"])),
        _good("LLaVA", "later turn", llava("Hi", "Hello", "\n<image>", "A cat.", image="a.png"),
              llava("Hi", "Hello", "\n<image>", "A cat.", images=["a.png"])),
        _good("LLaVA", "video and image", llava("<video> and <image>", "x", image="a.png", video="v.mp4"),
              llava("<video> and <image>", "x", images=["a.png"], videos=["v.mp4"])),
        _good("LLaVA", "nulls and empty fields", {**ONE, "videos": None, "video": [], "note": "", "tools": []}, ONE),
        _good("LLaVA", "further fields", {**ONE, "width": 640, "img": "a.png"}, ONE, unused=("width", "img")),
        _good("LLaVA", "further fields of a turn",
              {"conversations": [{"from": "human", "value": "Hi", "name": "Ann"}, {"from": "gpt", "value": "Hello"}]},
              HELLO, unused=("conversations[].name",)),
        _bad("LLaVA", "more images than tags", llava("<image>", "x", images=["a.png", "b.jpg"]), "tag_mismatch"),
        _bad("LLaVA", "image and images", {**ONE, "images": ["a.png"]}),
        _bad("LLaVA", "audio", {**HELLO, "audio": "a.wav"}, "unsupported_field"),
        _bad("LLaVA", "tag in an answer", llava("<image>", "<image>", image="a.png"), "tag_in_answer"),
        _bad("LLaVA", "value is missing", {"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}),
    ]  # fmt: skip


def _sharegpt() -> list[Case]:
    return [
        _good("ShareGPT", "roles user and assistant", sharegpt(("user", "Hi"), ("assistant", "Hello")), HELLO),
        _good("ShareGPT", "roles in any case", sharegpt(("Human", "Hi"), ("GPT", "Hello")), HELLO),
        _good("ShareGPT", "roles in capitals", sharegpt(("USER", "Hi"), ("Assistant", "Hello")), HELLO),
        _good("ShareGPT", "system field", sharegpt(("human", "Hi"), ("gpt", "Hello"), system="Be brief."),
              llava("Hi", "Hello", system="Be brief.")),
        _good("ShareGPT", "system turn", sharegpt(("System", "Be brief."), ("human", "Hi"), ("gpt", "Hello")),
              llava("Hi", "Hello", system="Be brief.")),
        _good("ShareGPT", "empty system field", sharegpt(("human", "Hi"), ("gpt", "Hello"), system=""), HELLO),
        _bad("ShareGPT", "system twice", sharegpt(("system", "A"), ("human", "Hi"), ("gpt", "x"), system="B")),
        _bad("ShareGPT", "unknown role", sharegpt(("human", "Hi"), ("bot", "Hello")), "unknown_role"),
        _bad("ShareGPT", "answer first", sharegpt(("gpt", "Hello"), ("human", "Hi")), "bad_turn_order"),
        _bad("ShareGPT", "conversations and messages", {**HELLO, **messages(("user", "a"), ("assistant", "b"))}),
    ]  # fmt: skip


def _sharegpt_tools() -> list[Case]:
    agent = (
        ("human", "Rain?"),
        ("function_call", json.dumps(CALL)),
        ("observation", "rain"),
        ("gpt", "Yes."),
    )
    both = json.dumps([CALL, CALL_2])
    return [
        _good("ShareGPT with tools", "tools as text", sharegpt(*agent, tools=json.dumps([WEATHER])), AGENT),
        _good("ShareGPT with tools", "tools as objects", sharegpt(*agent, tools=[TOOL]), AGENT),
        _good("ShareGPT with tools", "system and tools", sharegpt(*agent, tools=[TOOL], system="Be brief."),
              llava("Rain?", CALL_TEXT, RESULT_TEXT, "Yes.", system="Be brief." + TOOLS_TEXT)),
        _good("ShareGPT with tools", "no tools", sharegpt(("human", "Hi"), ("gpt", "Hello"), tools="[]"), HELLO),
        _good("ShareGPT with tools", "two calls in one turn",
              sharegpt(("human", "Rain?"), ("function_call", both), ("observation", "rain"), ("observation", "sun"),
                       ("gpt", "Both.")),
              llava("Rain?", f"{CALL_TEXT}\n{CALL_2_TEXT}", f"{RESULT_TEXT}\n{RESULT_TEXT.replace('rain', 'sun')}",
                    "Both.")),
        _good("ShareGPT with tools", "further fields of a call are counted",
              sharegpt(agent[0], ("function_call", json.dumps({**CALL, "id": 7})), *agent[2:]),
              llava("Rain?", CALL_TEXT, RESULT_TEXT, "Yes."), unused=("conversations[].value[].id",)),
        _good("ShareGPT with tools", "call after text",
              sharegpt(("human", "Rain?"), ("gpt", "I look."), *agent[1:]),
              llava("Rain?", f"I look.\n{CALL_TEXT}", RESULT_TEXT, "Yes.")),
        _bad("ShareGPT with tools", "call is not JSON",
             sharegpt(("human", "Rain?"), ("function_call", "weather(Rome)"), ("observation", "x"), ("gpt", "Yes."))),
        _bad("ShareGPT with tools", "result without a call",
             sharegpt(("observation", "rain"), ("gpt", "Yes.")), "bad_turn_order"),
        _bad("ShareGPT with tools", "tools are a sentence", sharegpt(*agent, tools="weather")),
        _bad("ShareGPT with tools", "tool without a name", sharegpt(*agent, tools=[{}])),
        _bad("ShareGPT with tools", "function that is text", sharegpt(*agent, tools=[{"function": "weather"}])),
    ]  # fmt: skip


def _openai() -> list[Case]:
    def question(content: Any, **fields: Any) -> Record:
        return messages(("user", content), ("assistant", "A cat."), **fields)

    def image_url(url: Any) -> Record:
        return {"type": "image_url", "image_url": url}

    return [
        _good("OpenAI", "texts", messages(("user", "Hi"), ("assistant", "Hello")), HELLO),
        _good("OpenAI", "developer", messages(("developer", "Be brief."), ("user", "Hi"), ("assistant", "Hello")),
              llava("Hi", "Hello", system="Be brief.")),
        _good("OpenAI", "image_url as a path", question([image_url({"url": "a.png"}), WHAT]), ONE),
        _good("OpenAI", "image_url as a string", question([image_url("a.png"), WHAT]), ONE),
        _good("OpenAI", "image_url as a file URL", question([image_url({"url": "file://ROOT/a.png"}), WHAT]), ONE),
        _good("OpenAI", "image_url as a data URI", question([image_url({"url": DATA_URI}), WHAT]), EMBEDDED),
        _good("OpenAI", "answer in parts", messages(("user", "Hi"), ("assistant", [text("Hel"), text("lo")])), HELLO),
        _good("OpenAI", "detail is counted", question([image_url({"url": "a.png", "detail": "low"}), WHAT]), ONE,
              unused=("content[].image_url.detail",)),
        _good("OpenAI", "parts of the Responses API",
              question([{"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "What is it?"}]),
              ONE),
        _bad("OpenAI", "data URI that is not base64", question([image_url({"url": "data:image/png,abc"}), WHAT])),
        _bad("OpenAI", "data URI that is cut", question([image_url({"url": DATA_URI[:-2]}), WHAT])),
        _bad("OpenAI", "file URL outside the root", question([image_url({"url": "file:///etc/a.png"}), WHAT]),
             "media_outside_root"),
        _bad("OpenAI", "remote image", question([image_url({"url": "https://x.org/a.png"}), WHAT]),
             "media_outside_root"),
        _bad("OpenAI", "input_audio", question([{"type": "input_audio", "input_audio": {"data": "x"}}, WHAT]),
             "unsupported_field"),
        _bad("OpenAI", "refusal",
             {"messages": [{"role": "user", "content": "Hi"},
                           {"role": "assistant", "content": "No", "refusal": "No."}]}, "unsupported_field"),
        _bad("OpenAI", "images beside the content of a turn",
             {"messages": [{"role": "user", "content": "What is it?", "images": ["a.png"]},
                           {"role": "assistant", "content": "A cat."}]}, "unsupported_field"),
        _bad("OpenAI", "no content", messages(("user", "Hi"), ("assistant", None))),
    ]  # fmt: skip


def _openai_tools() -> list[Case]:
    image_result = [text("rain"), {"type": "image_url", "image_url": {"url": "a.png"}}]
    functions = openai_agent("rain", functions=[WEATHER])
    del functions["tools"]
    legacy = {
        "messages": [
            {"role": "user", "content": "Rain?"},
            {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{\"city\": "
                                                                                                    "\"Orléans\"}"}},
            {"role": "function", "name": "weather", "content": "rain"},
            {"role": "assistant", "content": "Yes."},
        ],
        "functions": [WEATHER],
    }  # fmt: skip
    with_text = openai_agent("rain")
    with_text["messages"][1]["content"] = "I look."
    bad_arguments = openai_agent("rain")
    bad_arguments["messages"][1]["tool_calls"] = [{"function": {"name": "weather", "arguments": "Orléans"}}]
    of_user = openai_agent("rain")
    of_user["messages"][0]["tool_calls"] = [OPENAI_CALL]
    of_another_type = openai_agent("rain")
    of_another_type["messages"][1]["tool_calls"] = [{**OPENAI_CALL, "type": "custom"}]
    ids = ("messages[].tool_calls[].id", "messages[].tool_call_id")
    return [
        _good("OpenAI with tools", "call and result", openai_agent("rain"), AGENT, unused=ids),
        _good("OpenAI with tools", "two results", openai_agent("rain", "rain"),
              llava("Rain?", CALL_TEXT, f"{RESULT_TEXT}\n{RESULT_TEXT}", "Yes.", system=DEFAULT + TOOLS_TEXT),
              unused=ids),
        _good("OpenAI with tools", "result with an image", openai_agent(image_result),
              llava("Rain?", CALL_TEXT, "<tool_response>\nrain<image>\n</tool_response>", "Yes.",
                    system=DEFAULT + TOOLS_TEXT, image="a.png"), unused=ids),
        _good("OpenAI with tools", "text before the call", with_text,
              llava("Rain?", f"I look.\n{CALL_TEXT}", RESULT_TEXT, "Yes.", system=DEFAULT + TOOLS_TEXT), unused=ids),
        _good("OpenAI functions", "functions", functions, AGENT, unused=ids),
        _good("OpenAI functions", "function_call", legacy, AGENT, unused=("messages[].name",)),
        _bad("OpenAI with tools", "arguments are not JSON", bad_arguments),
        _bad("OpenAI with tools", "user calls a tool", of_user),
        _bad("OpenAI with tools", "call of another type", of_another_type, "unsupported_field"),
        _bad("OpenAI functions", "tools and functions", openai_agent("rain", functions=[WEATHER])),
        _bad("OpenAI with tools", "no turn after the result",
             {"messages": openai_agent("rain")["messages"][:3]}, "bad_turn_order"),
    ]  # fmt: skip


def _qwen_vl_utils() -> list[Case]:
    def image(**fields: Any) -> Record:
        return user_parts({"type": "image", "image": "a.png", **fields}, WHAT)

    def video(**fields: Any) -> Record:
        return user_parts({"type": "video", "video": "v.mp4", **fields}, WHAT)

    return [
        _good("qwen-vl-utils", "image", image(), ONE),
        _good("qwen-vl-utils", "file URL", image(image="file://ROOT/a.png"), ONE),
        _good("qwen-vl-utils", "file URL is literal", image(image="file://ROOT/sub dir/c%20.png"),
              llava("<image>What is it?", "A cat.", image="sub dir/c%20.png")),
        _good("qwen-vl-utils", "video", video(), VIDEO),
        _good("qwen-vl-utils", "image without a type", user_parts({"image": "a.png"}, {"text": "What is it?"}), ONE),
        _good("qwen-vl-utils", "bounds of an image", image(min_pixels=50176, max_pixels=100352), ONE,
              settings=(ItemSettings(min_pixels=50176, max_pixels=100352),)),
        _good("qwen-vl-utils", "size of an image", image(resized_height=280, resized_width=420), ONE,
              settings=(ItemSettings(resized_height=280, resized_width=420),)),
        _good("qwen-vl-utils", "rate of a video", video(fps=1.5, min_frames=4, max_frames=8, total_pixels=1e6), VIDEO,
              settings=(ItemSettings(fps=1.5, min_frames=4, max_frames=8, total_pixels=1000000),)),
        _good("qwen-vl-utils", "frames of a video", video(nframes=6, video_start=0.5, video_end=5), VIDEO,
              settings=(ItemSettings(nframes=6, video_start=0.5, video_end=5.0),)),
        _good("qwen-vl-utils", "rate of an image is counted", image(fps=2), ONE, unused=("content[].fps",)),
        _bad("qwen-vl-utils", "rate and frames", video(fps=1, nframes=4)),
        _bad("qwen-vl-utils", "height alone", image(resized_height=280)),
        _bad("qwen-vl-utils", "bounds in the wrong order", image(min_pixels=2000, max_pixels=1000)),
        _bad("qwen-vl-utils", "end before the start", video(video_start=2, video_end=1)),
        _bad("qwen-vl-utils", "rate of 0", video(fps=0)),
        _bad("qwen-vl-utils", "settings without a medium", user_parts({"type": "image", "max_pixels": 9}, WHAT)),
        _bad("qwen-vl-utils", "text beside a medium", user_parts({"image": "a.png", "text": "What is it?"})),
        _bad("qwen-vl-utils", "medium in a text", user_parts({"type": "text", "text": "Hi", "image": "a.png"})),
        _bad("qwen-vl-utils", "audio", user_parts({"type": "audio", "audio": "a.wav"}, WHAT), "unsupported_field"),
    ]  # fmt: skip


def _llama_factory() -> list[Case]:
    turns = (("user", "<image>What is it?"), ("assistant", "A cat."))
    return [
        _good("LLaMA-Factory", "images", messages(*turns, images=["a.png"]), ONE),
        _good("LLaMA-Factory", "empty columns", messages(*turns, images=["a.png"], system="", tools="", audios=[]),
              ONE),
        _good("LLaMA-Factory", "observation after a call in messages",
              messages(("user", "Rain?"), ("function_call", json.dumps(CALL)), ("observation", "rain"),
                       ("assistant", "Yes."), tools=json.dumps([WEATHER])), AGENT),
        _bad("LLaMA-Factory", "images without tags", messages(("user", "Hi"), ("assistant", "x"), images=["a.png"]),
             "tag_mismatch"),
        _bad("LLaMA-Factory", "kto_tag", messages(*turns, images=["a.png"], kto_tag=True), "unsupported_field"),
        _bad("LLaMA-Factory", "audios", messages(*turns, images=["a.png"], audios=["a.wav"]), "unsupported_field"),
    ]  # fmt: skip


def _swift() -> list[Case]:
    tools = json.dumps([TOOL])
    agent = (("user", "Rain?"), ("tool_call", json.dumps(CALL)), ("tool_response", "rain"), ("assistant", "Yes."))
    return [
        _good("ms-swift query", "query and response", {"query": "Hi", "response": "Hello"}, HELLO),
        _good("ms-swift query", "history",
              {"history": [["Hi", "Hello"]], "query": "And?", "response": "Bye", "system": "Be brief."},
              llava("Hi", "Hello", "And?", "Bye", system="Be brief.")),
        _good("ms-swift query", "images without tags",
              {"query": "Same?", "response": "No.", "images": ["a.png", "b.jpg"]},
              llava("<image><image>Same?", "No.", images=["a.png", "b.jpg"])),
        _good("ms-swift query", "images with tags", {"query": "Is <image>?", "response": "No.", "images": ["a.png"]},
              llava("Is <image>?", "No.", image="a.png")),
        _good("ms-swift query", "video and image without tags",
              {"query": "Same?", "response": "No.", "images": ["a.png"], "videos": ["v.mp4"]},
              llava("<video><image>Same?", "No.", image="a.png", video="v.mp4")),
        _bad("ms-swift query", "no response", {"query": "Hi"}),
        _bad("ms-swift query", "rejected_response", {"query": "Hi", "response": "a", "rejected_response": "b"},
             "unsupported_field"),
        _bad("ms-swift query", "history of texts", {"query": "Hi", "response": "a", "history": ["Hi", "Hello"]}),
        _good("ms-swift messages", "images", messages(("user", "<image>What is it?"), ("assistant", "A cat."),
                                                      images=["a.png"]), ONE),
        _good("ms-swift messages", "images as objects",
              messages(("user", "<image>What is it?"), ("assistant", "A cat."), images=[{"path": "a.png"}]), ONE),
        _good("ms-swift messages", "video", messages(("user", "<video>What is it?"), ("assistant", "A cat."),
                                                     videos=["v.mp4"]), VIDEO),
        _bad("ms-swift messages", "images without tags",
             messages(("user", "What is it?"), ("assistant", "A cat."), images=["a.png"]), "tag_mismatch"),
        _bad("ms-swift messages", "loss_scale", {"messages": [{"role": "user", "content": "Hi"}, {
            "role": "assistant", "content": "x", "loss_scale": 2}]}, "unsupported_field"),
        _bad("ms-swift messages", "rejected_messages",
             {**messages(("user", "Hi"), ("assistant", "x")), "rejected_messages": [{"role": "user"}]},
             "unsupported_field"),
        _good("ms-swift agent", "tool_call and tool_response", messages(*agent, tools=tools), AGENT),
        _good("ms-swift agent", "tool", messages(*agent[:2], ("tool", "rain"), agent[3], tools=tools), AGENT),
        _bad("ms-swift agent", "call without a name",
             messages(agent[0], ("tool_call", '{"arguments": {}}'), *agent[2:], tools=tools)),
    ]  # fmt: skip


def _objects() -> list[Case]:
    """120x90 pixels are resized to 140x112 where an image has at least 16 tokens: times 7/6, and times 56/45."""

    def swift(question: str, answer: str, objects: Record) -> Record:
        return messages(("user", f"<image>{question}"), ("assistant", answer), images=["a.png"], objects=objects)

    def located(question: str, answer: str) -> Record:
        return llava(f"<image>{question}", answer, image="a.png")

    return [
        _good("ms-swift objects", "box", swift("Where?", "<bbox>", {"bbox": [[10, 20, 30, 40]]}),
              located("Where?", "[10, 20, 30, 40]"), packed=located("Where?", "[12, 25, 35, 50]")),
        _good("ms-swift objects", "names and boxes",
              swift("Find <ref-object>", "<bbox> and <bbox>",
                    {"ref": ["cats"], "bbox": [[1, 2, 3, 4], [5, 6, 7, 8]], "bbox_type": "real"}),
              located("Find cats", "[1, 2, 3, 4] and [5, 6, 7, 8]"),
              packed=located("Find cats", "[1, 2, 4, 5] and [6, 7, 8, 10]")),
        _good("ms-swift objects", "size that ms-swift fills in itself",
              swift("Where?", "<bbox>", {"bbox": [[10, 20, 30, 40]], "width": [120], "height": [90]}),
              located("Where?", "[10, 20, 30, 40]"), packed=located("Where?", "[12, 25, 35, 50]"),
              unused=("objects.width", "objects.height")),
        _good("ms-swift objects", "shares of the image",
              swift("Where?", "<bbox>", {"bbox": [[0, 0.25, 0.5, 1]], "bbox_type": "norm1"}),
              located("Where?", "[0, 0.25, 0.5, 1]"), packed=located("Where?", "[0, 28, 70, 112]")),
        _good("ms-swift objects", "second of two images",
              messages(("user", "<image><image>Where?"), ("assistant", "<bbox>"), images=["b.jpg", "a.png"],
                       objects={"bbox": [[10, 20, 30, 40]], "image_id": [1]}),
              llava("<image><image>Where?", "[10, 20, 30, 40]", images=["b.jpg", "a.png"]),
              packed=llava("<image><image>Where?", "[12, 25, 35, 50]", images=["b.jpg", "a.png"])),
        _good("ms-swift objects", "point", swift("Where?", "<bbox>", {"bbox": [[10, 20]], "image_id": [0]}),
              located("Where?", "[10, 20]"), packed=located("Where?", "[12, 25]")),
        _bad("ms-swift objects", "fewer boxes", swift("Where?", "<bbox><bbox>", {"bbox": [[1, 2, 3, 4]]})),
        _bad("ms-swift objects", "name that is no text", swift("Find <ref-object>", "It", {"ref": [None]})),
        _bad("ms-swift objects", "unknown type", swift("Where?", "<bbox>", {"bbox": [[1, 2, 3, 4]], "bbox_type": "x"})),
        _bad("ms-swift objects", "three numbers", swift("Where?", "<bbox>", {"bbox": [[1, 2, 3]]}),
             "bad_box"),
        _bad("ms-swift objects", "not a number", swift("Where?", "<bbox>", {"bbox": [[1, 2, 3, "4"]]}),
             "bad_box"),
    ]  # fmt: skip


def _alpaca() -> list[Case]:
    return [
        _good("alpaca", "instruction", {"instruction": "Hi", "input": "", "output": "Hello"}, HELLO),
        _good("alpaca", "instruction and input", {"instruction": "Translate", "input": "Hund", "output": "dog"},
              llava("Translate\nHund", "dog")),
        _good("alpaca", "input alone", {"instruction": "", "input": "Hi", "output": "Hello"}, HELLO),
        _good("alpaca", "system and history",
              {"instruction": "And?", "output": "Bye", "history": [["Hi", "Hello"]], "system": "Be brief."},
              llava("Hi", "Hello", "And?", "Bye", system="Be brief.")),
        _good("alpaca", "images", {"instruction": "<image>What is it?", "output": "A cat.", "images": ["a.png"]}, ONE),
        _good("alpaca", "text of a template is counted",
              {"instruction": "Hi", "input": "", "output": "Hello", "text": "Below is an instruction"}, HELLO,
              unused=("text",)),
        _bad("alpaca", "no output", {"instruction": "Hi", "input": "there"}),
        _bad("alpaca", "outputs to choose from", {"instruction": "Hi", "output": ["Hello", "No"]}),
        _bad("alpaca", "images without tags", {"instruction": "Hi", "output": "x", "images": ["a.png"]},
             "tag_mismatch"),
        _bad("alpaca", "chosen", {"instruction": "Hi", "output": "x", "chosen": "a"}, "unsupported_field"),
    ]  # fmt: skip


def _hugging_face() -> list[Case]:
    exchange = {"user": "What is it?", "assistant": "A cat."}
    first = llava("<image>\nWhat is it?", "A cat.", image="a.png")
    named = {"type": "image", "index": 1, "text": None}
    return [
        _good("FineVision", "image", {"images": ["a.png"], "texts": [exchange], "source": "s"}, first,
              unused=("source",)),
        _good("FineVision", "bytes", {"images": [{"bytes": BASE64, "path": None}], "texts": [exchange]},
              llava("<image>\nWhat is it?", "A cat.", image="e.png")),
        _good("FineVision", "two exchanges", {"texts": [exchange, exchange]},
              llava("What is it?", "A cat.", "What is it?", "A cat.")),
        _bad("FineVision", "exchange without an answer", {"texts": [{"user": "Hi"}]}),
        _bad("FineVision", "weight of the loss of an exchange", {"texts": [{**exchange, "loss_scale": 0.5}]},
             "unsupported_field"),
        _bad("FineVision", "exchanges as lists", {"texts": [["Hi", "Hello"]]}),
        _good("Cauldron", "two images", {"images": ["a.png", "b.jpg"], "texts": [{**exchange, "source": "vqa"}]},
              llava("<image>\n<image>\nWhat is it?", "A cat.", images=["a.png", "b.jpg"]), unused=("texts[].source",)),
        _good("Cauldron", "tags in the text",
              {"images": ["a.png"], "texts": [{"user": "What is <image>?", "assistant": "A cat."}]},
              llava("What is <image>?", "A cat.", image="a.png")),
        _good("Cauldron", "no image", {"images": [], "texts": [{"user": "Hi", "assistant": "Hello"}]}, HELLO),
        _bad("Cauldron", "tag without an image", {"texts": [{"user": "<image>", "assistant": "x"}]}, "tag_mismatch"),
        _bad("Cauldron", "no exchange", {"images": ["a.png"], "texts": []}, "missing_conversations"),
        _good("Hugging Face", "path", {**ONE, "image": {"path": "a.png", "bytes": None}}, ONE),
        _good("Hugging Face", "bytes", {**ONE, "image": None, "images": [{"bytes": BASE64}]}, EMBEDDED),
        _good("Hugging Face", "bytes and path", {**ONE, "image": {"bytes": BASE64, "path": "x.png"}}, EMBEDDED),
        _good("Hugging Face", "data URI in a field", {**ONE, "image": DATA_URI}, EMBEDDED),
        _good("Hugging Face", "file URL in a field", {**ONE, "image": "file://ROOT/a.png"}, ONE),
        _good("Hugging Face", "parts by index",
              messages(("user", [named, text("and"), {**named, "index": 0}]), ("assistant", "x"),
                       images=["a.png", "b.jpg"]),
              llava("<image>and<image>", "x", images=["b.jpg", "a.png"])),
        _good("Hugging Face", "parts of a table", user_parts({**WHAT, "image": None}), llava("What is it?", "A cat.")),
        _bad("Hugging Face", "index of no image", user_parts(named, WHAT, images=["a.png"])),
        _bad("Hugging Face", "bytes that are not base64", {**ONE, "image": {"bytes": "a.png"}}),
        _bad("Hugging Face", "neither path nor bytes", {**ONE, "image": {"name": "a.png"}}),
    ]  # fmt: skip


def _trl() -> list[Case]:
    prompt = [{"role": "user", "content": "Hi"}]
    long_prompt = [*prompt, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And?"}]
    parts = [{"role": "user", "content": [{"type": "image"}, WHAT]}]
    answer = [{"role": "assistant", "content": "A cat."}]
    return [
        _good("TRL", "strings", {"prompt": "Hi", "completion": "Hello"}, HELLO),
        _good("TRL", "image and strings", {"prompt": "What is it?", "completion": "A cat.", "image": "a.png"}, ONE),
        _good("TRL messages", "messages", {"prompt": prompt, "completion": [{"role": "assistant", "content": "Hello"}]},
              HELLO),
        _good("TRL messages", "answers of the prompt are not trained",
              {"prompt": long_prompt, "completion": [{"role": "assistant", "content": "Bye"}]}, TWO, untrained=(0,)),
        _good("TRL messages", "image parts", {"prompt": parts, "completion": answer, "images": ["a.png"]}, ONE),
        _good("TRL messages", "images without parts",
              {"prompt": [{"role": "user", "content": "What is it?"}], "completion": answer, "images": ["a.png"]}, ONE),
        _bad("TRL", "no completion", {"prompt": "Hi"}),
        _bad("TRL", "chosen and rejected", {"prompt": "Hi", "completion": "x", "chosen": "a", "rejected": "b"},
             "unsupported_field"),
        _bad("TRL", "label of KTO", {"prompt": "Hi", "completion": "x", "label": False}, "unsupported_field"),
        _bad("TRL messages", "completion by the user", {"prompt": prompt, "completion": prompt}, "bad_turn_order"),
        _bad("TRL messages", "completion as an object", {"prompt": prompt, "completion": answer[0]}),
    ]  # fmt: skip


def _pretraining() -> list[Case]:
    return [
        _good("pretraining", "text", {"text": "Once upon a time."}, {"text": "Once upon a time."}),
        _good("pretraining", "interleaved", {"text": "A cat <image> and a dog <image>.", "images": ["a.png", "b.jpg"]},
              {"text": "A cat <image> and a dog <image>.", "images": ["a.png", "b.jpg"]}),
        _good("pretraining", "image first", {"text": "<image>A cat.", "image": "a.png", "url": "x"},
              {"text": "<image>A cat.", "image": "a.png"}, unused=("url",)),
        _bad("pretraining", "image without a tag", {"text": "A cat.", "image": "a.png"}, "tag_mismatch"),
        _bad("pretraining", "system", {"text": "Once.", "system": "Be brief."}),
        _bad("pretraining", "no text", {"text": " "}, "empty_turn"),
        _bad("pretraining", "end of text", {"text": "One.<|endoftext|>Two."}, "reserved_token"),
        _bad("pretraining", "list of texts", {"text": ["One.", "Two."]}),
    ]  # fmt: skip


def _frames() -> list[Case]:
    names = [f"f{index}.png" for index in range(6)]
    plain = llava("<video>What is it?", "A cat.", video="frames")
    return [
        _good("frames", "nested list", {**plain, "video": None, "videos": [names]}, plain, frames=(tuple(names),)),
        _good("frames", "rate", {**plain, "video": None, "videos": [names], "fps": 2}, plain,
              frames=(tuple(names),), settings=(ItemSettings(fps=2.0),)),
        _good("frames", "rate of each",
              {**plain, "video": None, "videos": [names], "fps": [0.5]}, plain,
              frames=(tuple(names),), settings=(ItemSettings(fps=0.5),)),
        _good("frames", "part", user_parts({"type": "video", "video": names, "fps": 4}, WHAT), plain,
              frames=(tuple(names),), settings=(ItemSettings(fps=4.0),)),
        _good("frames", "sample_fps", user_parts({"type": "video", "video": names, "sample_fps": 1}, WHAT), plain,
              frames=(tuple(names),), settings=(ItemSettings(fps=1.0),)),
        _good("frames", "fps without a video is counted", {**HELLO, "fps": 2}, HELLO, unused=("fps",)),
        _good("frames", "rate of the record beside a part is counted",
              user_parts({"type": "video", "video": names}, WHAT, fps=4), plain, frames=(tuple(names),),
              unused=("fps",)),
        _good("frames", "sample_fps beside fps, which is counted",
              user_parts({"type": "video", "video": names, "sample_fps": 1, "fps": 4}, WHAT), plain,
              frames=(tuple(names),), settings=(ItemSettings(fps=1.0),), unused=("content[].fps",)),
        _good("frames", "one frame", user_parts({"type": "video", "video": names[:1]}, WHAT), plain,
              frames=((names[0],),)),
        _good("frames", "folder", user_parts({"type": "video", "video": "clip"}, WHAT), {**plain, "video": "clip"}),
        _bad("frames", "image that is a folder", user_parts({"type": "image", "image": "clip"}, WHAT),
             "unsupported_media"),
        _bad("frames", "no frame", {**plain, "video": None, "videos": [[]]}),
        _bad("frames", "rates for other videos", {**plain, "video": None, "videos": [names], "fps": [1, 2]}),
        _bad("frames", "frame without a name", {**plain, "video": None, "videos": [["f0.png", None]]}),
        _bad("frames", "image as a list", user_parts({"type": "image", "image": names}, WHAT)),
    ]  # fmt: skip


def _loss() -> list[Case]:
    calls = messages(("user", "Rain?"), ("assistant", "I look."), ("tool_call", json.dumps(CALL)))
    calls["messages"][1]["loss"] = False
    no_loss = answer_with(loss=False)
    no_loss["messages"][3]["loss"] = False
    wants_loss = answer_with()
    wants_loss["messages"][0]["loss"] = True
    return [
        _good("loss of turns", "loss: false", answer_with(loss=False), TWO, untrained=(0,)),
        _good("loss of turns", "train: false", answer_with(train=False), TWO, untrained=(0,)),
        _good("loss of turns", "weight: 0", answer_with(weight=0), TWO, untrained=(0,)),
        _good("loss of turns", "loss: true", answer_with(loss=True, weight=1.0, train=None), TWO),
        _good("loss of turns", "after a system turn", {**answer_with(weight=0.0), "system": "Be brief."},
              llava("Hi", "Hello", "And?", "Bye", system="Be brief."), untrained=(0,)),
        _bad("loss of turns", "weight: 0.5", answer_with(weight=0.5), "unsupported_field"),
        _bad("loss of turns", "train_detail",
             answer_with(train_detail=[{"begin_offset": 0, "end_offset": 2, "train": False}]), "unsupported_field"),
        _bad("loss of turns", "weight as text", answer_with(weight="0"), "unsupported_field"),
        _bad("loss of turns", "loss of a question", wants_loss, "unsupported_field"),
        _bad("loss of turns", "no loss at all", no_loss, "no_targets"),
        _bad("loss of turns", "half a turn", calls, "unsupported_field"),
    ]  # fmt: skip


CASES: tuple[Case, ...] = (
    *_llava(),
    *_sharegpt(),
    *_sharegpt_tools(),
    *_openai(),
    *_openai_tools(),
    *_qwen_vl_utils(),
    *_llama_factory(),
    *_swift(),
    *_objects(),
    *_alpaca(),
    *_hugging_face(),
    *_trl(),
    *_pretraining(),
    *_frames(),
    *_loss(),
)
"""All records."""
