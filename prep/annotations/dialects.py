"""The ways in which records are spelled, all turned into one canonical form (:mod:`prep.annotations.annotation`).

Input: the JSON text of a record. Output: a :class:`Reading`: the annotation, how its author calls each place, every
field that is wrong or not supported, and the names of fields that nobody reads.

The two common spellings (``conversations`` with ``from``/``value``, ``messages`` with ``role``/``content``) without
further fields cost one ``msgspec`` decode; everything else is read key by key. To add a dialect, add the key that it is
told by to :data:`_READERS` and a method that yields its turns.

What ``msgspec`` passes over in fields that nobody reads is checked here: that the bytes are UTF-8, and that they are
not nested deeper than a fixed bound (the interpreter's own depends on who calls).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from prep.annotations.annotation import Annotation, MediaItem
from prep.annotations.array_scanner import nesting_depth
from prep.annotations.boxes import BoxError, Shape, moved, number_shape
from prep.annotations.fields import (
    UNSUPPORTED_FIELDS,
    UNSUPPORTED_PART_FIELDS,
    UNSUPPORTED_TURN_FIELDS,
    says_something,
    unsupported,
)
from prep.annotations.media_fields import MediaReader, type_name
from prep.annotations.problems import Problems
from prep.annotations.tools import ToolError, answer_with_calls, result_text, system_with_tools
from schemas.annotation import LlavaRecord, MessagesRecord, ReasonCode, Turn
from schemas.qwen import DEFAULT_SYSTEM

ROLES = {
    "system": "system",
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "function_call": "call",
    "tool_call": "call",
    "observation": "result",
    "tool": "result",
    "tool_response": "result",
}
"""What each accepted role is, in any case of letters: calls are joined to the model's turn, results to the user's."""

MAX_DEPTH = 400
"""A record with more arrays and objects inside one another is rejected as ``bad_json``."""

_CANONICAL_ROLES = frozenset({"system", "human", "gpt"})
_COMMON_ROLES = {"system": "system", "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class _PlainTurn(Turn, frozen=True, gc=False, forbid_unknown_fields=True):
    pass


class _PlainLlava(LlavaRecord, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    """A record without other fields: the fast way in."""

    conversations: list[_PlainTurn]  # type: ignore[assignment]


class _PlainMessage(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    role: str
    content: str


class _PlainMessages(MessagesRecord, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    """The same of the other spelling."""

    messages: list[_PlainMessage]  # type: ignore[assignment]


_llava_decoder = msgspec.json.Decoder(_PlainLlava)
_messages_decoder = msgspec.json.Decoder(_PlainMessages)
# Python's float takes numbers beyond its range for infinite; what nobody reads may hold them.
_any_decoder = msgspec.json.Decoder(float_hook=float)


class Places(msgspec.Struct, frozen=True):
    """Names the places of a record as its author spelled them.

    Attributes:
        turns: JSON path of the list of turns.
        role: key of a turn's role.
        value: key of a turn's text.
        values: paths of the texts by turn, where they do not follow from the above.
    """

    turns: str = "$.conversations"
    role: str = "from"
    value: str = "value"
    values: tuple[str, ...] = ()

    def role_of(self, index: int) -> str:
        """Path of the role of a turn."""
        return self.values[index] if self.values else f"{self.turns}[{index}].{self.role}"

    def value_of(self, index: int) -> str:
        """Path of the text of a turn."""
        return self.values[index] if self.values else f"{self.turns}[{index}].{self.value}"


CONVERSATIONS = Places()
MESSAGES = Places("$.messages", "role", "content")


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What could be read of a record.

    Attributes:
        annotation: in canonical form; None where the turns could not be read.
        places: how its author spelled it.
        problems: what is wrong with its fields.
        unreadable: kinds of media (``image``, ``video``) whose names could not be read.
        unused: names of fields that nobody reads; of a turn ``conversations[].name``.
        embedded: bytes of media that came inside the record, by the name that the annotation gives them.
    """

    annotation: Annotation | None
    places: Places = CONVERSATIONS
    problems: Problems
    unreadable: frozenset[str] = frozenset()
    unused: tuple[str, ...] = ()
    embedded: Mapping[str, bytes] = {}


def decode_common(data: bytes) -> Annotation | None:
    """The annotation of a record in one of the two common spellings without other fields; None for any other."""
    try:
        # Looking for the key first keeps a record of the other spelling from being decoded in vain.
        if b'"conversations"' in data:
            record: LlavaRecord | MessagesRecord = _llava_decoder.decode(data)
            turns: list[Turn] = record.conversations  # type: ignore[union-attr]
        else:
            record = messages = _messages_decoder.decode(data)
            turns = [Turn(message.role, str(message.content)) for message in messages.messages]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if (record.image is not None and record.images is not None) or (
        record.video is not None and record.videos is not None
    ):
        return None
    if turns and not _CANONICAL_ROLES.issuperset([turn.role for turn in turns]):
        if not _COMMON_ROLES.keys() >= {turn.role for turn in turns}:
            return None
        turns = [Turn(_COMMON_ROLES[turn.role], turn.value) for turn in turns]
    return Annotation(
        turns=turns,
        images=_items(record.images if record.image is None else record.image),
        videos=_items(record.videos if record.video is None else record.video),
        id=record.id,
    )


def _items(names: str | list[str] | None) -> list[MediaItem]:
    if names is None:
        return []
    return [MediaItem(names)] if isinstance(names, str) else [MediaItem(name) for name in names]


def fault(data: bytes) -> str | None:
    """What is wrong with the text of a record, be it in a field that nobody reads."""
    try:
        if not data.isascii():
            data.decode()
    except UnicodeDecodeError as error:
        return f"not valid JSON: byte {error.start} is not UTF-8"
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and nesting_depth(data) > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} levels deep"
    return None


def read_record(data: bytes, embedded: Mapping[str, bytes] | None = None) -> Reading:
    """Read a record in any of the accepted spellings.

    Args:
        data: its JSON text.
        embedded: bytes of media that came beside it, by the name that it gives them.
    """
    reason = fault(data)
    if reason is not None:
        return _unreadable(ReasonCode.BAD_JSON, reason)
    annotation = decode_common(data)
    if annotation is not None:
        places = CONVERSATIONS if b'"conversations"' in data else MESSAGES
        return Reading(annotation=annotation, places=places, problems=Problems(), embedded=embedded or {})
    try:
        record = _any_decoder.decode(data)
    except msgspec.MsgspecError as error:
        return _unreadable(ReasonCode.BAD_JSON, f"not valid JSON: {error}")
    if not isinstance(record, dict):
        return _unreadable(ReasonCode.NOT_AN_OBJECT, f"the record is of type {type_name(record)}; expected an object")
    return _RecordReader(record, embedded or {}).read()


def _unreadable(code: ReasonCode, message: str) -> Reading:
    problems = Problems()
    problems.add(code, message)
    return Reading(annotation=None, problems=problems)


class _RecordReader:
    """Reads a decoded record key by key into canonical turns and media, and collects what is wrong."""

    def __init__(self, record: dict[str, Any], embedded: Mapping[str, bytes]) -> None:
        self._record = record
        self._problems = Problems()
        self._unused: dict[str, None] = {}
        self._turns: list[Turn] = []
        self._places: list[str] = []
        self._untrained: set[int] = set()
        self._last_kind = ""
        self._inserts_tags: str | None = None
        self._media = MediaReader(record, embedded, self._fail)

    def read(self) -> Reading:
        """Everything that the record says."""
        record, used = self._record, {"id", "system", "tools", "objects", "fps", *MediaReader.FIELDS}
        for message in unsupported(record, UNSUPPORTED_FIELDS, "$"):
            self._fail(message, ReasonCode.UNSUPPORTED_FIELD)
        key = next((name for name in _READERS if record.get(name) is not None), None)
        if key is None:
            self._fail(
                "$.conversations is missing; give a list of turns {from, value}", ReasonCode.MISSING_CONVERSATIONS
            )
        else:
            reader, fields = _READERS[key]
            used |= {key, *fields}
            reader(self, key)
        turns_are_good = not self._problems
        self._add_system()
        self._media.finish(self._turns, self._inserts_tags)
        shapes, coordinates = self._objects()
        self._unused.update((name, None) for name in record if name not in used and name not in UNSUPPORTED_FIELDS)
        annotation = Annotation(
            turns=self._turns,
            images=self._media.items["image"],
            videos=self._media.items["video"],
            id=self._identity(),
            untrained=frozenset(self._untrained),
            shapes=shapes,
            coordinates=coordinates,
        )
        return Reading(
            annotation=annotation if turns_are_good else None,
            places=Places(values=tuple(self._places)),
            problems=self._problems,
            unreadable=frozenset(self._media.unreadable),
            unused=tuple(self._unused),
            embedded=self._media.embedded,
        )

    # The dialects: each method adds the turns of one.

    def conversations(self, key: str) -> None:
        """Turns as a list: ``from``/``value`` or ``role``/``content``."""
        turns = self._record[key]
        if not isinstance(turns, list):
            self._fail(f"$.{key} is of type {type_name(turns)}; expected an array of turns")
            return
        if not turns:
            self._fail(f"$.{key} is empty; give at least a question and an answer", ReasonCode.MISSING_CONVERSATIONS)
        self._messages(turns, f"$.{key}")

    def texts(self, key: str) -> None:
        """The Cauldron and FineVision: a list of ``{user, assistant}``; images without tags come first."""
        exchanges = self._record[key]
        self._inserts_tags = "\n"
        if not isinstance(exchanges, list):
            self._fail(f"$.{key} is of type {type_name(exchanges)}; expected an array of turns")
            return
        for index, exchange in enumerate(exchanges):
            where = f"$.{key}[{index}]"
            if not isinstance(exchange, dict):
                self._fail(f"{where} is of type {type_name(exchange)}; expected an object {{user, assistant}}")
                continue
            for role, name in (("human", "user"), ("gpt", "assistant")):
                self._add(role, self._text(exchange, name, where), f"{where}.{name}")
            self._count_unused(exchange, {"user", "assistant"}, f"{key}[]")
        if not exchanges:
            self._fail(f"$.{key} is empty; give at least a question and an answer", ReasonCode.MISSING_CONVERSATIONS)

    def alpaca(self, key: str) -> None:
        """``instruction``, ``input``, ``output`` and ``history``, as LLaMA-Factory joins them."""
        self._history()
        parts = [self._text(self._record, key, "$")]
        if says_something(self._record.get("input")):
            parts.append(self._text(self._record, "input", "$"))
        self._add("human", "\n".join(part for part in parts if part), "$.instruction")
        self._add("gpt", self._text(self._record, "output", "$"), "$.output")

    def query(self, key: str) -> None:
        """ms-swift: ``query``, ``response`` and ``history``."""
        self._history()
        self._add("human", self._text(self._record, key, "$"), f"$.{key}")
        self._add("gpt", self._text(self._record, "response", "$"), "$.response")

    def prompt(self, key: str) -> None:
        """TRL: ``prompt`` and ``completion``, texts or lists of messages. Only the completion is trained."""
        self._inserts_tags = ""
        for name, role in ((key, "human"), ("completion", "gpt")):
            value = self._record.get(name)
            first = len(self._turns)
            if isinstance(value, list):
                self._messages(value, f"$.{name}")
            else:
                self._add(role, self._text(self._record, name, "$"), f"$.{name}")
            if name == key:
                self._untrained |= {i for i in range(first, len(self._turns)) if self._turns[i].role == "gpt"}

    def plain_text(self, key: str) -> None:
        """Text for continued pretraining, with media tags anywhere."""
        self._add("text", self._text(self._record, key, "$"), f"$.{key}")

    # Their parts.

    def _messages(self, turns: list[Any], where: str) -> None:
        for index, turn in enumerate(turns):
            place = f"{where}[{index}]"
            if not isinstance(turn, dict):
                self._fail(f"{place} is of type {type_name(turn)}; expected an object")
                continue
            role_key, value_key = ("role", "content") if "role" in turn or "content" in turn else ("from", "value")
            for message in unsupported(turn, UNSUPPORTED_TURN_FIELDS, place):
                self._fail(message, ReasonCode.UNSUPPORTED_FIELD)
            role = self._text(turn, role_key, place)
            kind = ROLES.get(role.lower(), role)
            calls = self._calls(turn, place)
            has_content = not calls or turn.get(value_key) is not None
            content = self._content(turn, value_key, place) if has_content else ""
            try:
                content = answer_with_calls(content, calls) if calls else content
            except ToolError as error:
                self._fail(f"{place}.tool_calls: {error}")
            self._add(kind, content, f"{place}.{value_key}", is_trained=self._is_trained(turn, kind, place))
            used = {role_key, value_key, "loss", "train", "weight", "tool_calls", "function_call"}
            self._count_unused(turn, used | UNSUPPORTED_TURN_FIELDS.keys(), f"{where[2:]}[]")

    def _calls(self, turn: dict[str, Any], place: str) -> list[Any]:
        calls = turn.get("tool_calls") or []
        if not isinstance(calls, list):
            self._fail(f"{place}.tool_calls is of type {type_name(calls)}; expected an array")
            return []
        return [*calls, turn["function_call"]] if says_something(turn.get("function_call")) else calls

    def _is_trained(self, turn: dict[str, Any], kind: str, place: str) -> bool:
        """Whether a turn has a loss: ``loss`` (ms-swift), ``train`` and ``weight`` (0 or 1) say so of a gpt turn."""
        flags = [(name, turn[name]) for name in ("loss", "train", "weight") if turn.get(name) is not None]
        trained = True
        for name, value in flags:
            if value not in (0, 1):
                self._fail(
                    f"{place}.{name} is {str(value)[:40]}; allowed: true, false, 1, 0. Other weights of the loss are "
                    "not supported",
                    ReasonCode.UNSUPPORTED_FIELD,
                )
            elif value and kind not in ("gpt", "call"):
                self._fail(
                    f"{place}.{name} asks for a loss on a {kind} turn, which is not supported; only the model's turns "
                    "are trained",
                    ReasonCode.UNSUPPORTED_FIELD,
                )
            trained = trained and bool(value)
        return trained

    def _content(self, turn: dict[str, Any], key: str, place: str) -> str:
        """The text of a turn; of a list of parts a tag for each medium."""
        content = turn.get(key)
        if not isinstance(content, list):
            return self._text(turn, key, place)
        pieces: list[str] = []
        for index, part in enumerate(content):
            where = f"{place}.{key}[{index}]"
            if isinstance(part, str):
                pieces.append(part)
                continue
            if not isinstance(part, dict):
                self._fail(f"{where} is not a part of type text, image or video")
                continue
            for message in unsupported(part, UNSUPPORTED_PART_FIELDS, where):
                self._fail(message, ReasonCode.UNSUPPORTED_FIELD)
            kind = MediaReader.kind_of(part)
            if kind is not None:
                pieces.append(f"<{kind}>")
                self._media.add_part(kind, part, where)
                self._count_unused(part, MediaReader.PART_FIELDS | UNSUPPORTED_PART_FIELDS.keys(), "content[]")
            elif part.get("type", "text") == "text" and "text" in part:
                pieces.append(self._text(part, "text", where))
                self._count_unused(part, {"type", "text", "index"} | UNSUPPORTED_PART_FIELDS.keys(), "content[]")
            elif not any(part.get(name) for name in UNSUPPORTED_PART_FIELDS):
                self._fail(f"{where} is not a part of type text, image or video")
        return "".join(pieces)

    def _history(self) -> None:
        history = self._record.get("history")
        if not says_something(history):
            return
        if not isinstance(history, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
            for pair in history
        ):
            self._fail("$.history is not a list of pairs [question, answer]")
            return
        for index, (question, answer) in enumerate(history):
            self._add("human", question, f"$.history[{index}][0]")
            self._add("gpt", answer, f"$.history[{index}][1]")

    def _add(self, kind: str, text: str, place: str, *, is_trained: bool = True) -> None:
        """Add a turn; calls continue the model's turn, and further results the user's turn of the first one."""
        joins = bool(self._turns) and (
            (kind == "call" and self._last_kind in ("gpt", "call")) or (kind == "result" == self._last_kind)
        )
        try:
            if kind == "call":
                text = answer_with_calls("", [text])
        except ToolError as error:
            self._fail(f"{place}: {error}")
        if kind == "result":
            text = result_text(text)
            if not joins and self._last_kind not in ("gpt", "call"):
                self._fail(
                    f"{place} is the result of a tool, and the turn before it is none of the model's",
                    ReasonCode.BAD_TURN_ORDER,
                )
        if joins:
            if is_trained != (len(self._turns) - 1 not in self._untrained):
                self._fail(
                    f"{place} and the turn before it are one turn of the model, and only one of them has a loss",
                    ReasonCode.UNSUPPORTED_FIELD,
                )
            last = self._turns[-1]
            self._turns[-1] = Turn(last.role, f"{last.value}\n{text}" if last.value else text)
        else:
            if not is_trained and kind in ("gpt", "call"):
                self._untrained.add(len(self._turns))
            self._turns.append(Turn({"call": "gpt", "result": "human"}.get(kind, kind), text))
            self._places.append(place)
        self._last_kind = kind

    def _add_system(self) -> None:
        """Put a top-level ``system`` and ``tools`` into the system turn, the first one."""
        system, tools = self._record.get("system"), self._record.get("tools")
        has_turn = bool(self._turns) and self._turns[0].role == "system"
        if says_something(system):
            if not isinstance(system, str):
                self._fail(f"$.system is of type {type_name(system)}; expected a string")
                return
            if has_turn and self._turns[0].value != system:
                self._fail("$.system and a system turn are both given; give one of them")
                return
        elif has_turn:
            system = self._turns[0].value
        if says_something(tools):
            try:
                system = system_with_tools(system or DEFAULT_SYSTEM, tools)
            except ToolError as error:
                self._fail(f"$.tools: {error}")
        if not system:
            return
        if has_turn:
            self._turns[0] = Turn("system", system)
        elif self._turns and self._turns[0].role == "text":
            self._fail("$.text is for continued pretraining, which has no system message; remove $.system and $.tools")
        else:
            self._turns.insert(0, Turn("system", system))
            self._places.insert(0, "$.system")
            self._untrained = {index + 1 for index in self._untrained}

    def _objects(self) -> tuple[dict[int, tuple[Shape, ...]], str | None]:
        """ms-swift's ``objects``: boxes and names take the places of ``<bbox>`` and ``<ref-object>`` in the turns."""
        objects = self._record.get("objects")
        if not says_something(objects):
            return {}, None
        if not isinstance(objects, dict):
            self._fail(f"$.objects is of type {type_name(objects)}; expected an object {{ref, bbox}}")
            return {}, None
        self._count_unused(objects, {"ref", "bbox", "bbox_type", "image_id", "width", "height"}, "objects")
        names, boxes, images = (objects.get(key) or [] for key in ("ref", "bbox", "image_id"))
        kind = {None: "pixels", "real": "pixels", "norm1": "norm1"}.get(objects.get("bbox_type"), "")
        if not all(isinstance(value, list) for value in (names, boxes, images)) or not kind:
            self._fail('$.objects has ref, bbox and image_id as lists, and bbox_type as "real" or "norm1"')
            return {}, None
        if images and len(images) != len(boxes):
            self._fail(f"$.objects.image_id names {len(images)} images for {len(boxes)} boxes; give one for each box")
            return {}, None
        waiting = {"<ref-object>": iter(names), "<bbox>": iter(zip(boxes, images or [None] * len(boxes)))}
        wanted = {tag: sum(turn.value.count(tag) for turn in self._turns) for tag in waiting}
        for tag, values in (("<ref-object>", names), ("<bbox>", boxes)):
            if wanted[tag] != len(values):
                self._fail(f"$.objects has {len(values)} entries for {wanted[tag]} {tag} in the turns")
                return {}, None
        shapes: dict[int, tuple[Shape, ...]] = {}
        for index, turn in enumerate(self._turns):
            try:
                text, in_turn = _filled(turn.value, waiting)
            except BoxError as error:
                self._fail(f"$.objects.bbox: {error}", ReasonCode.BAD_BOX)
                continue
            self._turns[index] = Turn(turn.role, text)
            if in_turn:
                shapes[index] = tuple(in_turn)
        return shapes, kind

    def _identity(self) -> str | int | None:
        value = self._record.get("id")
        if isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
            self._fail(f"$.id is of type {type_name(value)}; expected a string or an integer")
            return None
        return value

    def _text(self, holder: dict[str, Any], key: str, where: str) -> str:
        if isinstance(holder.get(key), str):
            return str(holder[key])
        state = f"is of type {type_name(holder[key])}" if key in holder else "is missing"
        self._fail(f"{where}.{key} {state}; expected a string")
        return ""

    def _count_unused(self, holder: Mapping[str, Any], used: Iterable[str], where: str) -> None:
        self._unused.update((f"{where}.{name}", None) for name in holder.keys() - set(used))

    def _fail(self, message: str, code: ReasonCode = ReasonCode.BAD_FIELD) -> None:
        self._problems.add(code, message)


def _filled(text: str, waiting: Mapping[str, Iterator[Any]]) -> tuple[str, list[Shape]]:
    """A text with the next names and boxes in the places of its placeholders, and the boxes in it."""
    pieces: list[str] = []
    shapes: list[Shape] = []
    length = 0
    rest = text
    while True:
        cut = min((rest.find(tag), tag) if tag in rest else (len(rest), "") for tag in waiting)
        position, tag = cut
        pieces.append(rest[:position])
        length += position
        if not tag:
            return "".join(pieces), shapes
        if tag == "<bbox>":
            values, image = next(waiting[tag])
            if not isinstance(values, list):
                raise BoxError(f"{str(values)[:40]!r} is not a list of numbers")
            written, shape = number_shape(values, image=image)
            shapes.append(moved(shape, length))
        else:
            written = str(next(waiting[tag]))
        pieces.append(written)
        length += len(written)
        rest = rest[position + len(tag) :]


_READERS: dict[str, tuple[Callable[[_RecordReader, str], None], tuple[str, ...]]] = {
    "conversations": (_RecordReader.conversations, ()),
    "messages": (_RecordReader.conversations, ()),
    "texts": (_RecordReader.texts, ()),
    "instruction": (_RecordReader.alpaca, ("input", "output", "history")),
    "query": (_RecordReader.query, ("response", "history")),
    "prompt": (_RecordReader.prompt, ("completion",)),
    "text": (_RecordReader.plain_text, ()),
}
"""The key that each dialect is told by, in the order in which they are looked for; its reader, and its other keys."""
