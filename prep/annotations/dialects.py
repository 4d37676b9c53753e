"""Maps a record of any dialect to one canonical form (:mod:`prep.annotations.annotation`).

Input: the JSON text of a record. Output: a :class:`~prep.annotations.reading.Reading`: the annotation, every field that
is wrong or not supported, and the names of unused fields.

A dialect is recognized by a field. To add one, add a function here that reads its turns, under :func:`dialect`, which
names its fields; nothing else lists them. Turns, media, tools and ``objects`` are read by the modules of these names,
the same for all dialects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import msgspec

from prep.annotations.annotation import Annotation
from prep.annotations.fields import UNSUPPORTED_FIELDS, UNSUPPORTED_TURN_FIELDS, says_something
from prep.annotations.media_fields import MediaReader
from prep.annotations.objects import place_objects
from prep.annotations.plain import PLAIN_FIELDS, convert_plain, fault
from prep.annotations.problems import Problems
from prep.annotations.reading import CONVERSATIONS, MESSAGES, FieldReader, Places, Reading, type_name
from prep.annotations.turns import TurnReader
from schemas.annotation import ReasonCode

_Record = dict[str, Any]

# Fields that no struct names may hold numbers beyond the range of a float, which Python reads as infinite.
_decoder = msgspec.json.Decoder(float_hook=float)

_WHERE = re.compile(r"\(byte (\d+)\)")
_NOT_JSON = re.compile(rb"NaN|Infinity|None|True|False|'")


_ReadTurns = Callable[[_Record, TurnReader], None]


class _Dialect(NamedTuple):
    """One dialect, as :func:`dialect` declares it."""

    read: _ReadTurns
    fields: tuple[str, ...] = ()
    inserts_tags: str | None = None


_DIALECTS: dict[str, _Dialect] = {}
"""The dialects by the field that each is recognized by. The first one that a record has counts."""

_TURN_LISTS = ("conversations", "messages", "texts")
_SHARED_FIELDS = frozenset({"id", "system", "tools", "functions", "objects"})

FIELDS = {*_SHARED_FIELDS, *MediaReader.FIELDS}
"""Fields of a record that some dialect uses."""


def dialect(key: str, *fields: str, inserts_tags: str | None = None) -> Callable[[_ReadTurns], _ReadTurns]:
    """Declare a dialect; the decorated function adds a record's turns.

    Args:
        key: the field that it is recognized by.
        fields: its further fields.
        inserts_tags: if the text has no tag for its media, they come first, each followed by this text. None: the
            dialect requires tags.
    """

    def declare(read: _ReadTurns) -> _ReadTurns:
        _DIALECTS[key] = _Dialect(read, fields, inserts_tags)
        FIELDS.update((key, *fields))
        return read

    return declare


def is_known(field: str) -> bool:
    """Whether a field of a record is read: some dialect uses it, or it is refused."""
    return field in FIELDS or field in UNSUPPORTED_FIELDS


def marks_record(fields: Collection[str]) -> bool:
    """Whether these are the fields of a record, and not of one of its turns. A turn may have a ``text``."""
    return not (_DIALECTS.keys() - {"text"} | MediaReader.FIELDS - {"fps"}).isdisjoint(fields)


@dialect("conversations")
def _conversations(record: _Record, turns: TurnReader) -> None:
    """LLaVA and ShareGPT: a list of ``{from, value}``."""
    turns.add_messages(record["conversations"], "$.conversations")


@dialect("messages")
def _messages(record: _Record, turns: TurnReader) -> None:
    """OpenAI, ``qwen_vl_utils`` and ms-swift: a list of ``{role, content}``."""
    turns.add_messages(record["messages"], "$.messages")


@dialect("texts", inserts_tags="\n")
def _texts(record: _Record, turns: TurnReader) -> None:
    """The Cauldron and FineVision: a list of ``{user, assistant}``."""
    exchanges = record["texts"]
    if not isinstance(exchanges, list):
        turns.fail(f"$.texts is of type {type_name(exchanges)}; expected an array of exchanges {{user, assistant}}")
        return
    if not exchanges:
        turns.fail("$.texts is empty; give at least a question and an answer", ReasonCode.MISSING_CONVERSATIONS)
    for index, exchange in enumerate(exchanges):
        where = f"$.texts[{index}]"
        if not isinstance(exchange, dict):
            turns.fail(f"{where} is of type {type_name(exchange)}; expected an object {{user, assistant}}")
            continue
        turns.add_field("human", exchange, "user", where)
        turns.add_field("gpt", exchange, "assistant", where)
        turns.fields.account(exchange, {"user", "assistant"}, "texts[]", where=where, refused=UNSUPPORTED_TURN_FIELDS)


@dialect("instruction", "input", "output", "history")
def _alpaca(record: _Record, turns: TurnReader) -> None:
    """``instruction``, ``input`` and ``output``, joined as by LLaMA-Factory."""
    _history(record, turns)
    parts = [turns.text(record, "instruction", "$")]
    if says_something(record.get("input")):
        parts.append(turns.text(record, "input", "$"))
    turns.add("human", "\n".join(part for part in parts if part), "$.instruction")
    turns.add_field("gpt", record, "output")


@dialect("query", "response", "history", inserts_tags="")
def _query(record: _Record, turns: TurnReader) -> None:
    """ms-swift: ``query`` and ``response``."""
    _history(record, turns)
    turns.add_field("human", record, "query")
    turns.add_field("gpt", record, "response")


@dialect("prompt", "completion", inserts_tags="")
def _prompt(record: _Record, turns: TurnReader) -> None:
    """TRL: ``prompt`` and ``completion``, strings or lists of messages. Only the completion is trained."""
    for key, kind in (("prompt", "human"), ("completion", "gpt")):
        if isinstance(record.get(key), list):
            turns.add_messages(record[key], f"$.{key}")
        else:
            turns.add_field(kind, record, key)
        if key == "prompt":
            turns.untrained |= {index for index, turn in enumerate(turns.turns) if turn.role == "gpt"}


@dialect("text")
def _text(record: _Record, turns: TurnReader) -> None:
    """Text for continued pretraining, with media tags anywhere."""
    turns.add_field("text", record, "text")


def _history(record: _Record, turns: TurnReader) -> None:
    """Earlier exchanges, as pairs of question and answer."""
    history = record.get("history")
    if not says_something(history):
        return
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in history
    ):
        turns.fail("$.history is not a list of pairs [question, answer]")
        return
    for index, (question, answer) in enumerate(history):
        turns.add("human", question, f"$.history[{index}][0]")
        turns.add("gpt", answer, f"$.history[{index}][1]")


def read_record(data: bytes, embedded: Mapping[str, bytes] | None = None) -> Reading:
    """Read a record of any dialect.

    Args:
        data: its JSON text.
        embedded: bytes of media that come beside the text, by the name that it gives them.
    """
    reason = fault(data)
    if reason is not None:
        return _unreadable(ReasonCode.BAD_JSON, reason)
    try:
        record = _decoder.decode(data)
    except msgspec.MsgspecError as error:
        return _unreadable(ReasonCode.BAD_JSON, f"not valid JSON: {error}{_hint(data, str(error))}")
    if not isinstance(record, dict):
        return _unreadable(ReasonCode.NOT_AN_OBJECT, f"the record is of type {type_name(record)}; expected an object")
    return _read_plain(record, embedded or {}) or _read(record, embedded or {})


def _hint(data: bytes, error: str) -> str:
    """What the text is instead of JSON, if an error at a byte of it shows that."""
    where = _WHERE.search(error)
    word = None if where is None else _NOT_JSON.match(data, int(where[1]))
    if word is None:
        return ""
    if word[0] in (b"NaN", b"Infinity"):
        return f"; JSON has no {word[0].decode()}: write null or text"
    return "; it is written as Python: write it with `json.dumps`"


def _read_plain(record: _Record, embedded: Mapping[str, bytes]) -> Reading | None:
    """Read a record in one of the two common spellings whose other fields, if any, have no effect."""
    if any(map(is_known, record.keys() - PLAIN_FIELDS)):
        return None
    annotation = convert_plain({name: value for name, value in record.items() if name in PLAIN_FIELDS})
    if annotation is None:
        return None
    fields = FieldReader()
    fields.account(record, PLAIN_FIELDS)
    return Reading(
        annotation=annotation,
        places=CONVERSATIONS if "conversations" in record else MESSAGES,
        problems=fields.problems,
        unused=tuple(fields.unused),
        embedded=embedded,
        is_plain=True,
    )


def _unreadable(code: ReasonCode, message: str) -> Reading:
    problems = Problems()
    problems.add(code, message)
    return Reading(annotation=None, problems=problems)


def _read(record: _Record, embedded: Mapping[str, bytes]) -> Reading:
    """Read a decoded record field by field."""
    fields = FieldReader()
    media = MediaReader(record, embedded, fields)
    turns = TurnReader(fields, media)
    key = _recognized(record, turns)
    declared = _Dialect(lambda *_: None) if key is None else _DIALECTS[key]
    declared.read(record, turns)
    turns.add_system(record.get("system"), _tools(record, turns))
    media.finish(turns.turns, declared.inserts_tags)
    shapes, coordinates = place_objects(record.get("objects"), turns.turns, fields)
    used = {key or "", *declared.fields, *_SHARED_FIELDS, *media.used_fields}
    fields.account(record, used, refused=UNSUPPORTED_FIELDS)
    annotation = Annotation(
        turns=turns.turns,
        images=media.items["image"],
        videos=media.items["video"],
        id=_identity(record, fields),
        untrained=frozenset(turns.untrained),
        shapes=shapes,
        coordinates=coordinates,
    )
    return Reading(
        annotation=annotation if turns.is_readable else None,
        places=Places(roles=tuple(turns.role_paths), values=tuple(turns.text_paths)),
        problems=fields.problems,
        unreadable=frozenset(media.unreadable),
        unused=tuple(fields.unused),
        embedded=media.embedded,
    )


def _recognized(record: _Record, turns: TurnReader) -> str | None:
    """The field that tells the dialect of a record."""
    lists = [name for name in _TURN_LISTS if says_something(record.get(name))]
    if len(lists) > 1:
        turns.fail(f"{' and '.join(f'$.{name}' for name in lists)} are both given; give one list of turns")
    key = next((name for name in _DIALECTS if record.get(name) not in (None, [])), None)
    key = key or next((name for name in _DIALECTS if record.get(name) is not None), None)
    if key is None:
        turns.fail("$.conversations is missing; give a list of turns {from, value}", ReasonCode.MISSING_CONVERSATIONS)
    return key


def _tools(record: _Record, turns: TurnReader) -> object:
    """``tools``, or ``functions`` as OpenAI called them first."""
    names = [name for name in ("tools", "functions") if says_something(record.get(name))]
    if len(names) > 1:
        turns.fail("$.tools and $.functions are both given; give one of them")
    return record[names[0]] if names else None


def _identity(record: _Record, fields: FieldReader) -> str | int | None:
    value = record.get("id")
    if isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
        fields.fail(f"$.id is of type {type_name(value)}; expected a string or an integer")
        return None
    return value
