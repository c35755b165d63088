"""Filter expressions on the metadata of a database's rows.

    width >= 64 and url like "%cat%"
    not (height < 32 or key in ("000000001", "000000002"))

A filter is one SQL condition on the columns url, key, sha256 (text), width and height (px), and on the columns of the
URL list: as numbers if possible, otherwise as text. DuckDB parses and evaluates it. Single and double quotes both
delimit text. In ``like``, a backslash escapes ``%`` and ``_``. For a missing value, ``in`` is false. Any other
comparison with it is unknown, and a row whose condition is unknown does not match.

A filter may come from an untrusted source. Only the syntax listed below is accepted, so that a filter is deterministic
and cannot run queries or read files.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infra.errors import InputError

_SCHEMA = pa.schema({"url": "string", "key": "string", "sha256": "string", "width": "int64", "height": "int64"})
_LIKE = {"~~": "like_escape", "!~~": "not_like_escape", "~~*": "ilike_escape", "!~~*": "not_ilike_escape"}
_FUNCTIONS = frozenset({*_LIKE, *_LIKE.values(), "+", "-", "*", "/", "//", "%", "length", "lower", "upper"})
_OTHER_TYPES = frozenset({"COMPARE_IN", "OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL", "OPERATOR_NOT"})
_ALLOWED_CLASSES = frozenset({"BETWEEN", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "FUNCTION"})
_TOKEN = re.compile(r"""'(?:[^']|'')*'|"(?P<quoted>(?:[^"]|"")*)"|(?P<open>[(\[{])|(?P<close>[)\]}])""")
_QUERY = "SELECT 1 FROM rows WHERE "
_MAX_CHARACTERS = 10_000
_MAX_DEPTH = 50
_MAX_QUOTED = 200  # characters of a filter in a message
_TOO_DEEP = f"is nested too deeply; use at most {_MAX_DEPTH} nested brackets"
_ALLOWED = "use comparisons, like, in, between, is null, and, or, not"
_DATABASE: dict[str, Any] = {
    "enable_external_access": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "memory_limit": "256MB",
    "threads": 1,
}


def parse_where(text: str, user_columns: Mapping[str, pa.DataType] | None = None) -> "RowFilter":
    """Parse and check a filter. Raises ``InputError`` that names the problem and its position.

    ``user_columns`` are the further columns of the rows. Default: none.
    """
    return RowFilter(text, user_columns or {})


def referenced_columns(text: str) -> list[str]:
    """Return the user's columns that a filter refers to, in lower case, after checking it apart from their types.

    Raises:
        InputError: the filter is invalid for any columns.
    """
    return sorted(RowFilter(text, None).unknown)


class RowFilter:
    """A checked filter. It is thread-safe."""

    def __init__(self, text: str, user_columns: Mapping[str, pa.DataType] | None) -> None:
        """Parse and check ``text``; with None for ``user_columns``, any column may exist. Raises ``InputError``."""
        self._text = text
        self._any_column = user_columns is None
        self.unknown: set[str] = set()  # columns that are not in the schema
        own = {name.lower(): (name, kind) for name, kind in (user_columns or {}).items()}
        own = {name: given for name, given in own.items() if name not in _SCHEMA.names}
        self._schema = pa.schema([*_SCHEMA, *((name, kind) for name, (_, kind) in own.items())])
        self._names = [*_SCHEMA.names, *(name for name, _ in own.values())]
        self._database = duckdb.connect(config=_DATABASE)
        self._database.execute(f"SET max_expression_depth = {2 * _MAX_DEPTH}; SET lock_configuration = true")
        self._condition = self._checked(self._translated())
        probe = pa.schema([*self._schema, *(pa.field(name, pa.null()) for name in sorted(self.unknown))])
        kinds = self._select(f"typeof({self._condition})", pa.Table.from_pylist([{}], probe))
        if kinds != ["BOOLEAN"]:
            raise self._error("is not a condition; compare a column, as in width >= 64")

    def mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """Return a mask (n,) of the matching rows. Raises ``InputError`` if the condition cannot be computed."""
        rows = table.select(self._names).rename_columns(self._schema.names).cast(self._schema)
        matches = self._select(f"coalesce({self._condition}, false)", rows)
        return np.array(matches, dtype=np.bool_)

    def _select(self, expression: str, rows: pa.Table) -> list[Any]:
        with self._database.cursor() as cursor:
            cursor.register("rows", rows)
            try:
                return [value for (value,) in cursor.table("rows").project(expression).fetchall()]
            except duckdb.Error as error:
                raise self._error(f"cannot be computed ({str(error).splitlines()[0]}); correct it") from error

    def _translated(self) -> str:
        """Return the text with double quotes, which delimit names in SQL, replaced by single quotes.

        Brackets are counted here because the parser needs minutes for thousands of them.
        """
        if not self._text.strip() or len(self._text) > _MAX_CHARACTERS:
            raise self._error(f"has {len(self._text):,} characters; use 1 to {_MAX_CHARACTERS:,}")
        depth = 0

        def translate(token: re.Match[str]) -> str:
            nonlocal depth
            depth += (token["open"] is not None) - (token["close"] is not None)
            if depth > _MAX_DEPTH:
                raise self._error(_TOO_DEEP)
            quoted = token["quoted"]
            return token[0] if quoted is None else "'{}'".format(quoted.replace('""', '"').replace("'", "''"))

        return _TOKEN.sub(translate, self._text)

    def _checked(self, sql: str) -> str:
        """Return the condition as DuckDB formats it, built only from nodes that were checked."""
        tree, template = self._parsed(sql), self._parsed("true")
        condition = tree["statements"][0]["node"].pop("where_clause", None)
        constant = template["statements"][0]["node"].pop("where_clause")
        if tree != template:
            raise self._error("is not one condition; join conditions with and, or")
        for node in list(_nodes(condition)):
            self._check(node)
            _keep_meaning(node, {**constant, "literal": {"kind": "BOOLEAN", "text": "false"}})
        tree["statements"][0]["node"]["where_clause"] = condition
        query = self._database.execute("SELECT json_deserialize_sql(?::JSON)", [json.dumps(tree)]).fetchall()[0][0]
        return str(query).partition(" WHERE ")[2]

    def _parsed(self, sql: str) -> Any:
        ((text,),) = self._database.execute("SELECT json_serialize_sql(?)", [_QUERY + sql]).fetchall()
        tree = json.loads(text)
        if not tree["error"]:
            return tree
        if "position" not in tree:
            raise self._error(_TOO_DEEP if "depth" in tree["error_message"] else f"has a {tree['error_message']}")
        rest = sql[max(int(tree["position"]) - len(_QUERY), 0) :][:20]
        raise self._error(f"has a syntax error at {rest!r}; correct it" if rest else "ends too early; complete it")

    def _check(self, node: dict[str, Any]) -> None:
        """Raise ``InputError`` unless a filter may use ``node``."""
        kind, name = node["class"], node.get("function_name", node["type"])
        if kind == "COLUMN_REF":
            column = ".".join(node["column_names"])
            if column.lower() not in self._schema.names:
                if not self._any_column:
                    names = ", ".join(self._schema.names)
                    raise self._error(f"uses an unknown column: {column}; the columns are {names}")
                self.unknown.add(column.lower())
        elif kind == "FUNCTION":
            if name not in _FUNCTIONS or node["schema"] or node["catalog"] or node["filter"] or node["distinct"]:
                raise self._error(f"uses {name}, which is not allowed; use the functions length, lower and upper")
        elif kind not in _ALLOWED_CLASSES and name not in _OTHER_TYPES:
            raise self._error(f"uses {name.lower()}, which is not allowed; {_ALLOWED}")
        if {self._is_number(operand) for operand in _operands(node)} >= {True, False}:
            raise self._error("compares text with a number; write text in quotes and numbers without")

    def _is_number(self, node: dict[str, Any]) -> bool | None:
        """Return True for a numeric column or constant, False for text, None for anything else."""
        if node["class"] == "COLUMN_REF":
            index = self._schema.get_field_index(node["column_names"][-1].lower())
            return None if index < 0 else not pa.types.is_string(self._schema.field(index).type)
        if node["class"] == "CONSTANT":
            return {"INTEGER": True, "NUMERIC": True, "STRING": False}.get(node["literal"]["kind"])
        return None

    def _error(self, problem: str) -> InputError:
        shown = self._text if len(self._text) <= _MAX_QUOTED else self._text[:_MAX_QUOTED] + "…"
        return InputError(f"the filter {shown!r} {problem}")


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every expression of a parsed condition."""
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if "class" in node:
                yield node
            pending += node.values()
        elif isinstance(node, list):
            pending += node


def _operands(node: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the operands that ``node`` compares; empty if it compares nothing."""
    if node["class"] in {"COMPARISON", "BETWEEN"}:
        return [node[side] for side in ("left", "right", "input", "lower", "upper") if side in node]
    if node["class"] == "FUNCTION":
        return [argument["expression"] for argument in node["arguments"]]
    return list(node["children"]) if node["type"] == "COMPARE_IN" else []


def _keep_meaning(node: dict[str, Any], false: dict[str, Any]) -> None:
    """Change ``in`` and ``like`` from SQL semantics to those of the module's docstring.

    Databases are identified by the text of their filter, so the meaning of a text must not change.
    """
    if node["type"] == "COMPARE_IN":
        children = [dict(node), false]
        node.clear()
        node.update({"class": "OPERATOR", "type": "OPERATOR_COALESCE", "alias": "", "children": children})
    elif name := _LIKE.get(node.get("function_name", "")):
        escape = {**false, "literal": {"kind": "STRING", "text": "\\"}}
        node["arguments"].append({"name": "", "expression": escape})
        node.update(function_name=name, qualified_name={"path": [name]}, is_operator=False)
