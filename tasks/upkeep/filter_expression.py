"""Where: a filter on the metadata of a database's rows, from text.

    width >= 64 and url like "%cat%"
    not (height < 32 or key in ("000000001", "000000002"))

Columns are url, key, sha256 (text) and width, height (px). There are = == != <> < <= > >=, [not] like (% any text,
_ one character), [not] in (…), and, or, not and brackets; nothing is evaluated but this.
"""

import operator
import re
from typing import Any

import pyarrow.compute as pc

from infra.errors import InputError

_KIND: dict[str, type] = {"url": str, "key": str, "sha256": str, "width": int, "height": int}
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>-?\d+)|(?P<text>"[^"]*"|'[^']*')|(?P<word>[A-Za-z_]\w*)|(?P<sign>==|!=|<>|<=|>=|[=<>(),]))"""
)
_COMPARE = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne, "<>": operator.ne,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_DEEPEST = 50  # brackets and nots within each other
_MOST_DIGITS = 18  # that fit into 64 bits, whichever they are


def parse_where(text: str) -> Any:
    """The ``pyarrow.compute.Expression`` that ``text`` says. Raises ``InputError`` naming what cannot be read."""
    parser = _Parser(text)
    expression = parser.either(0)
    parser.end()
    return expression


class _Parser:
    """Recursive descent over the tokens, weakest binding first: or, and, not, comparison."""

    def __init__(self, text: str) -> None:
        self._text, self._tokens, self._at = text, [], 0  # type: tuple[str, list[tuple[str, Any]], int]
        place = 0
        while place < len(text.rstrip()):
            match = _TOKEN.match(text, place)
            if match is None:
                raise InputError(f"the filter {text!r} cannot be read from {text[place:].strip()[:20]!r} on")
            self._tokens.append((str(match.lastgroup), match[str(match.lastgroup)]))
            place = match.end()

    def either(self, depth: int) -> Any:
        """Read A or B or …, down to comparisons."""
        expression = self._both(depth)
        while self._took("or"):
            expression = expression | self._both(depth)
        return expression

    def end(self) -> None:
        """Nothing may follow."""
        if self._at < len(self._tokens):
            raise self._wrong("the end, 'and' or 'or'")

    def _both(self, depth: int) -> Any:
        expression = self._single(depth)
        while self._took("and"):
            expression = expression & self._single(depth)
        return expression

    def _single(self, depth: int) -> Any:
        if depth > _DEEPEST:
            raise InputError(f"the filter {self._text[:40]!r}… has more than {_DEEPEST} brackets within each other")
        if self._took("not"):
            return ~self._single(depth + 1)
        if self._took("("):
            expression = self.either(depth + 1)
            self._need(")")
            return expression
        return self._comparison()

    def _comparison(self) -> Any:
        kind, column = self._next()
        if kind != "word" or column not in _KIND:
            self._at -= 1
            raise self._wrong(f"one of the columns {', '.join(_KIND)}")
        field = pc.field(column)
        denied = self._took("not")
        if self._took("like"):
            if _KIND[column] is not str:
                raise InputError(f"the filter {self._text!r}: {column} is a number; 'like' compares text")
            expression = pc.match_like(field, self._literal(column))
        elif self._took("in"):
            self._need("(")
            values = [self._literal(column)]
            while self._took(","):
                values.append(self._literal(column))
            self._need(")")
            expression = field.isin(values)
        else:
            sign = self._next()[1]
            if denied or sign not in _COMPARE:
                self._at -= 1
                raise self._wrong("like or in" if denied else "like, in, not or one of " + " ".join(_COMPARE))
            expression = _COMPARE[sign](field, self._literal(column))
        return ~expression if denied else expression

    def _literal(self, column: str) -> str | int:
        kind, value = self._next()
        wanted = _KIND[column]
        if kind != ("text" if wanted is str else "number"):
            self._at -= 1
            raise self._wrong(
                f'text in quotes for {column}, such as "…"' if wanted is str else f"a number for {column}"
            )
        if kind == "number" and len(value.lstrip("-0")) > _MOST_DIGITS:
            raise InputError(
                f"the filter {self._text[:40]!r}… has a number of more than {_MOST_DIGITS} digits; give {column} in px"
            )
        return value[1:-1] if kind == "text" else int(value)

    def _next(self) -> tuple[str, Any]:
        self._at += 1
        return self._tokens[self._at - 1] if self._at <= len(self._tokens) else ("end", "")

    def _took(self, what: str) -> bool:
        if self._at < len(self._tokens):
            kind, value = self._tokens[self._at]
            if kind != "text" and value.lower() == what:
                self._at += 1
                return True
        return False

    def _need(self, what: str) -> None:
        if not self._took(what):
            raise self._wrong(repr(what))

    def _wrong(self, wanted: str) -> InputError:
        there = self._tokens[self._at][1] if self._at < len(self._tokens) else "its end"
        return InputError(f"the filter {self._text!r} has {there} where {wanted} is wanted")
