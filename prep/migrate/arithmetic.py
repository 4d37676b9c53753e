"""Integer arithmetic of a shell: ``4*(2+1)`` -> ``12``. Nothing is run."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable

_INTEGERS = re.compile(r"[\d\s()+*/%-]+")
_OCTAL = re.compile(r"\b0\d")
_LARGEST = (1 << 63) - 1


def _divide(dividend: int, divisor: int) -> int:
    """The quotient, rounded towards zero, as shells do it."""
    quotient = abs(dividend) // abs(divisor)
    return quotient if (dividend < 0) == (divisor < 0) else -quotient


def _remainder(dividend: int, divisor: int) -> int:
    return dividend - divisor * _divide(dividend, divisor)


_OPERATIONS: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.Mod: _remainder,
}


def evaluate(expression: str) -> str | None:
    """The value of an expression of integers with ``+ - * / %`` and parentheses; None if it is anything else."""
    if not _INTEGERS.fullmatch(expression) or _OCTAL.search(expression):
        return None
    try:
        return str(_value(ast.parse(expression.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> int:
    """The value of a part of an expression.

    Raises:
        ValueError: it has another operator, or a number that shells do not have.
    """
    match node:
        case ast.Constant(value=int(number)):
            value = number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            value = _OPERATIONS[type(op)](_value(left), _value(right))
        case _:
            raise ValueError(ast.dump(node))
    if abs(value) > _LARGEST:
        raise ValueError(f"{value} has more than 64 bits")
    return value
