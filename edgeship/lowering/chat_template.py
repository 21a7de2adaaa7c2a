"""A model's chat template as an engine renders it: the same text as transformers', in what the engine's Jinja knows.

Chat templates are Jinja for Python. LiteRT-LM renders them with minijinja, and in a form of its own:

- a message's content is a list of parts, not a string, and a tool's answer is a part too;
- there are few methods of strings and none of dictionaries, ``none`` is no test of a null, there is no ``break``;
- of a turn after the first, it renders the conversation with and without the new message and takes what is behind. The
  token that ended the last answer is in its cache by then, and what a template writes behind that token is in neither.

onnxruntime-genai renders them with minja: blanks around tags stay, ``in`` finds nothing in a string, filters and tests
are missing.

So the template is read by Jinja and written again in what both know, one construct after another. What has no such form
is refused: a prompt that differs from training by a character is the kind of error that nobody sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from edgeship.errors import LoweringError

if TYPE_CHECKING:
    from jinja2 import nodes

    from edgeship.llm.chat import ChatTemplate

# Filters and tests that mean the same to both.
FILTERS = frozenset({
    "abs", "batch", "capitalize", "default", "dictsort", "first", "float", "indent", "int", "items", "join", "last",
    "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse", "round", "safe",
    "select", "selectattr", "slice", "sort", "sum", "title", "trim", "unique", "upper",
})  # fmt: skip
ALIASES = {"count": "length", "d": "default"}
TESTS = frozenset({
    "boolean", "defined", "divisibleby", "eq", "equalto", "even", "false", "float", "ge", "gt", "in", "integer",
    "iterable", "le", "lower", "lt", "mapping", "ne", "number", "odd", "string", "true", "undefined", "upper",
})  # fmt: skip
FUNCTIONS = frozenset({"dict", "namespace", "range", "raise_exception", "strftime_now"})
# Methods of strings and dictionaries that a filter stands for.
METHODS = {
    "strip": "trim", "lstrip": "lstrip", "rstrip": "rstrip", "upper": "upper", "lower": "lower", "title": "title",
    "capitalize": "capitalize", "replace": "replace", "items": "items", "keys": "list",
}  # fmt: skip
OPERATORS = {
    "eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in",
}  # fmt: skip
ARITHMETIC = {"Add": "+", "Sub": "-", "Mul": "*", "Div": "/", "FloorDiv": "//", "Pow": "**", "And": "and", "Or": "or"}

# What is written before every template. Names begin with what no template uses.
#
# es_text: what Python prints of a value. es_json: JSON with indents. The loop: a content of parts becomes the string
# that templates of texts add up, as `apply_chat_template` is given it.
PREFACE = r"""
{%- macro es_quoted(v) -%}
{%- set es_s = v|replace('\\', '\\\\')|replace('\n', '\\n')|replace('\t', '\\t')|replace('\r', '\\r') -%}
{%- if "'" in v and '"' not in v -%}{{- '"' ~ es_s ~ '"' -}}
{%- else -%}{{- "'" ~ es_s|replace("'", "\\'") ~ "'" -}}{%- endif -%}
{%- endmacro -%}
{%- macro es_shown(v) -%}
{%- if v is string -%}{{- es_quoted(v) -}}
{%- elif v is mapping -%}{{- '{' -}}
{%- for k, x in v|items -%}{{- es_shown(k) ~ ': ' ~ es_shown(x) -}}{{- '' if loop.last else ', ' -}}
{%- endfor -%}{{- '}' -}}
{%- elif v is iterable -%}{{- '[' -}}
{%- for x in v -%}{{- es_shown(x) -}}{{- '' if loop.last else ', ' -}}{%- endfor -%}{{- ']' -}}
{%- else -%}{{- es_text(v) -}}{%- endif -%}
{%- endmacro -%}
{%- macro es_text(v) -%}
{%- if v is string or v is undefined -%}{{- v -}}
{%- elif v == none -%}{{- 'None' -}}
{%- elif v is boolean -%}{{- 'True' if v else 'False' -}}
{%- elif v is iterable -%}{{- es_shown(v) -}}
{%- else -%}{{- v -}}{%- endif -%}
{%- endmacro -%}
{%- macro es_json(v, step, pad) -%}
{%- if v is mapping and v|length > 0 -%}{{- '{\n' -}}
{%- for k, x in v|items -%}
{{- pad ~ step ~ k|tojson ~ ': ' ~ es_json(x, step, pad ~ step) -}}{{- '\n' if loop.last else ',\n' -}}
{%- endfor -%}{{- pad ~ '}' -}}
{%- elif v is iterable and v is not string and v is not mapping and v|length > 0 -%}{{- '[\n' -}}
{%- for x in v -%}{{- pad ~ step ~ es_json(x, step, pad ~ step) -}}{{- '\n' if loop.last else ',\n' -}}{%- endfor -%}
{{- pad ~ ']' -}}
{%- else -%}{{- v|tojson -}}{%- endif -%}
{%- endmacro -%}
{%- set es_all = namespace(messages=[]) -%}
{%- for es_m in messages -%}
{%- set es_c = es_m.content -%}
{%- if es_c is defined and es_c is iterable and es_c is not string and es_c is not mapping -%}
{%- set es_one = namespace(text='', name=none, plain=true) -%}
{%- for es_p in es_m.content -%}
{%- if es_p is string -%}{%- set es_one.text = es_one.text ~ es_p -%}
{%- elif es_p.text is defined -%}{%- set es_one.text = es_one.text ~ es_p.text -%}
{%- elif es_p.response is defined -%}
{%- set es_one.text = es_one.text ~ (es_p.response if es_p.response is string else es_p.response|tojson) -%}
{%- set es_one.name = es_p.name -%}
{%- else -%}{%- set es_one.plain = false -%}{%- endif -%}
{%- endfor -%}
{%- if es_one.plain and es_one.name != none -%}
{%- set es_all.messages = es_all.messages + [dict(es_m, content=es_one.text, name=es_one.name)] -%}
{%- elif es_one.plain -%}{%- set es_all.messages = es_all.messages + [dict(es_m, content=es_one.text)] -%}
{%- else -%}{%- set es_all.messages = es_all.messages + [es_m] -%}{%- endif -%}
{%- else -%}{%- set es_all.messages = es_all.messages + [es_m] -%}{%- endif -%}
{%- endfor -%}
{%- set messages = es_all.messages -%}
{%- if tools is undefined or not tools -%}{%- set tools = none -%}{%- endif -%}
{%- if documents is undefined -%}{%- set documents = none -%}{%- endif -%}
"""
# The whole text, without the start that the engine writes itself; and where the conversation ends in an answer, without
# what is behind the token that ended it: the engine's cache ends with that token.
CLOSED = (
    "{{%- set es_out -%}}{body}{{%- endset -%}}"
    "{{%- set es_start = {start} -%}}"
    "{{%- if es_all.messages and es_all.messages[-1].role == 'assistant' and not add_generation_prompt -%}}"
    "{{{{- es_out[es_start:es_out|length - {behind}] -}}}}{{%- else -%}}{{{{- es_out[es_start:] -}}}}{{%- endif -%}}"
)


def genai_template(template: ChatTemplate) -> str:
    """The template that onnxruntime-genai is given; transformers renders it too.

    Raises `LoweringError` when it has a construct that the engine's templates cannot express, or is not a template.
    """
    tree = _parsed(template.source)
    return _named(template) + _MinjaWriter(tree, "onnxruntime-genai").body(tree.body)


def litert_template(template: ChatTemplate, bos: str = "") -> str:
    """The template that LiteRT-LM is given.

    Args:
        template: the model's own. bos: text of the token that the engine puts before every conversation, if it does.

    Raises:
        LoweringError: it has a construct that LiteRT-LM's templates cannot express, or is not a template.
    """
    tree = _parsed(template.source)
    body = _Writer(tree, "LiteRT-LM").body(tree.body)
    stop = template.turn_end()
    behind = len(template.behind_answer().lstrip(" ").removeprefix(stop)) if stop else 0
    start = f"({len(bos)} if es_out is startingwith({_quoted(bos)}) else 0)" if bos else "0"
    closed = CLOSED.format(body=body, start=start, behind=behind)
    return PREFACE.replace("\n", "") + _named(template) + closed


def _parsed(source: str) -> nodes.Template:
    import jinja2

    try:
        found: nodes.Template = _environment().parse(source)
    except jinja2.TemplateSyntaxError as error:
        raise LoweringError(
            f"the chat template is not valid Jinja: {error.message}, line {error.lineno}", fix="correct chat_template"
        ) from None
    return found


def _named(template: ChatTemplate) -> str:
    """The texts that a template may name."""
    return "".join(f"{{%- set {name} = {_quoted(text)} -%}}" for name, text in template.variables.items())


def _environment() -> Any:
    """As transformers reads templates."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Marks what an assistant wrote; it prints the same."""

        tags = {"generation"}  # noqa: RUF012  as Jinja declares it

        def parse(self, parser: Any) -> list[nodes.Node]:
            """The marked part."""
            next(parser.stream)
            found: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return found

    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])


class _Writer:
    """Writes a tree again. Every tag takes the blanks around it, so nothing depends on how an engine trims them.

    Args:
        tree: the whole template, for the names of its macros. engine: for messages.
    """

    def __init__(self, tree: nodes.Template, engine: str) -> None:
        from jinja2 import nodes

        self.engine = engine
        self._functions = FUNCTIONS | {macro.name for macro in tree.find_all(nodes.Macro)}
        # Of the loops that are being written: the flags that `break` and `continue` take down.
        self._loops: list[tuple[str, str]] = []
        self._count = 0

    def body(self, items: Sequence[nodes.Node]) -> str:
        """Statements, one after another; those behind one that may leave the loop only while it has not been left."""
        written = ""
        for number, item in enumerate(items):
            written += self._statement(item)
            rest = items[number + 1 :]
            if rest and self._leaves(item):
                flags = " and ".join(f"{name}.on" for name in self._loops[-1])
                return f"{written}{{%- if {flags} -%}}{self.body(rest)}{{%- endif -%}}"
        return written

    def _leaves(self, node: nodes.Node) -> bool:
        """Whether a statement may end the loop that it is in, or this round of it."""
        from jinja2 import nodes

        if isinstance(node, (nodes.Break, nodes.Continue)):
            return True
        inner = () if isinstance(node, (nodes.For, nodes.Macro)) else node.iter_child_nodes()
        return any(self._leaves(child) for child in inner)

    def _write_break(self, node: nodes.Break) -> str:
        return f"{{%- set {self._loops[-1][0]}.on = false -%}}"

    def _write_continue(self, node: nodes.Continue) -> str:
        return f"{{%- set {self._loops[-1][1]}.on = false -%}}"

    def _statement(self, node: nodes.Node) -> str:
        name = type(node).__name__
        write: Callable[[Any], str] | None = getattr(self, f"_write_{name.lower()}", None)
        if write is None:
            raise self._unknown(f"the statement {name}", node)
        return write(node)

    def _write_output(self, node: nodes.Output) -> str:
        return "".join(self._printed(item) for item in node.nodes)

    def _printed(self, node: nodes.Expr) -> str:
        from jinja2 import nodes

        if isinstance(node, nodes.TemplateData):
            return f"{{{{- {_quoted(node.data)} -}}}}" if node.data else ""
        return f"{{{{- {self._as_text(node)} -}}}}"

    def _as_text(self, node: nodes.Expr) -> str:
        """What Python prints of an expression."""
        from jinja2 import nodes

        if isinstance(node, nodes.Const) and isinstance(node.value, str):
            return _quoted(node.value)
        if isinstance(node, nodes.Concat):
            return self.expression(node)
        return f"es_text({self.expression(node)})"

    def _write_if(self, node: nodes.If) -> str:
        parts = [f"{{%- if {self.expression(node.test)} -%}}", self.body(node.body)]
        for other in node.elif_:
            parts += [f"{{%- elif {self.expression(other.test)} -%}}", self.body(other.body)]
        if node.else_:
            parts += ["{%- else -%}", self.body(node.else_)]
        return "".join([*parts, "{%- endif -%}"])

    def _write_for(self, node: nodes.For) -> str:
        if node.recursive:
            raise self._unknown("a recursive loop", node)
        test = f" if {self.expression(node.test)}" if node.test else ""
        start = f"{{%- for {self._target(node.target)} in {self.expression(node.iter)}{test} -%}}"
        leaving = any(self._leaves(item) for item in node.body)
        self._count += 1
        self._loops.append((f"es_loop{self._count}", f"es_round{self._count}"))
        inner = self.body(node.body)
        loop, turn = self._loops.pop()
        other = "{%- else -%}" + self.body(node.else_) if node.else_ else ""
        if leaving:
            inner = f"{{%- if {loop}.on -%}}{{%- set {turn} = namespace(on=true) -%}}{inner}{{%- endif -%}}"
            start = f"{{%- set {loop} = namespace(on=true) -%}}{start}"
        return f"{start}{inner}{other}{{%- endfor -%}}"

    def _write_assign(self, node: nodes.Assign) -> str:
        return f"{{%- set {self._target(node.target)} = {self.expression(node.node)} -%}}"

    def _write_assignblock(self, node: nodes.AssignBlock) -> str:
        if node.filter is not None:
            raise self._unknown("a filtered block", node)
        return f"{{%- set {self._target(node.target)} -%}}{self.body(node.body)}{{%- endset -%}}"

    def _write_macro(self, node: nodes.Macro) -> str:
        names = [item.name for item in node.args]
        plain = len(names) - len(node.defaults)
        taken = names[:plain] + [
            f"{name}={self.expression(value)}" for name, value in zip(names[plain:], node.defaults, strict=True)
        ]
        return f"{{%- macro {node.name}({', '.join(taken)}) -%}}{self.body(node.body)}{{%- endmacro -%}}"

    def _write_scope(self, node: nodes.Scope) -> str:
        return self.body(node.body)

    def _target(self, node: nodes.Node) -> str:
        from jinja2 import nodes

        if isinstance(node, nodes.Name):
            return node.name
        if isinstance(node, nodes.NSRef):
            return f"{node.name}.{node.attr}"
        if isinstance(node, nodes.Tuple):
            return ", ".join(self._target(item) for item in node.items)
        raise self._unknown("what is assigned to", node)

    def expression(self, node: nodes.Node) -> str:
        """An expression, in brackets where another could be meant."""
        name = type(node).__name__
        if name in ARITHMETIC:
            return f"({self.expression(node.left)} {ARITHMETIC[name]} {self.expression(node.right)})"  # type: ignore[attr-defined]
        write: Callable[[Any], str] | None = getattr(self, f"_express_{name.lower()}", None)
        if write is None:
            raise self._unknown(f"the expression {name}", node)
        return write(node)

    def _express_const(self, node: nodes.Const) -> str:
        value = node.value
        if isinstance(value, str):
            return _quoted(value)
        if value is None or isinstance(value, bool):
            return {None: "none", True: "true", False: "false"}[value]
        return repr(value)

    def _express_templatedata(self, node: nodes.TemplateData) -> str:
        return _quoted(node.data)

    def _express_name(self, node: nodes.Name) -> str:
        return node.name

    def _express_nsref(self, node: nodes.NSRef) -> str:
        return f"{node.name}.{node.attr}"

    def _express_getattr(self, node: nodes.Getattr) -> str:
        return f"{self.expression(node.node)}.{node.attr}"

    def _express_getitem(self, node: nodes.Getitem) -> str:
        from jinja2 import nodes

        taken = node.arg
        if isinstance(taken, nodes.Slice):
            ends = [self.expression(item) if item else "" for item in (taken.start, taken.stop)]
            step = f":{self.expression(taken.step)}" if taken.step else ""
            return f"{self.expression(node.node)}[{':'.join(ends)}{step}]"
        return f"{self.expression(node.node)}[{self.expression(taken)}]"

    def _express_list(self, node: nodes.List) -> str:
        return f"[{', '.join(self.expression(item) for item in node.items)}]"

    def _express_tuple(self, node: nodes.Tuple) -> str:
        return f"[{', '.join(self.expression(item) for item in node.items)}]"

    def _express_dict(self, node: nodes.Dict) -> str:
        return f"{{{', '.join(f'{self.expression(p.key)}: {self.expression(p.value)}' for p in node.items)}}}"

    def _express_condexpr(self, node: nodes.CondExpr) -> str:
        other = f" else {self.expression(node.expr2)}" if node.expr2 else ""
        return f"({self.expression(node.expr1)} if {self.expression(node.test)}{other})"

    def _express_not(self, node: nodes.Not) -> str:
        return f"(not {self.expression(node.node)})"

    def _express_neg(self, node: nodes.Neg) -> str:
        return f"(-{self.expression(node.node)})"

    def _express_pos(self, node: nodes.Pos) -> str:
        return self.expression(node.node)

    def _express_mod(self, node: nodes.Mod) -> str:
        from jinja2 import nodes

        if isinstance(node.left, (nodes.Const, nodes.TemplateData)) and isinstance(node.left.as_const(), str):
            raise self._unknown("a text filled in by %", node)
        return f"({self.expression(node.left)} % {self.expression(node.right)})"

    def _express_concat(self, node: nodes.Concat) -> str:
        return f"({' ~ '.join(self._as_text(item) for item in node.nodes)})"

    def _express_compare(self, node: nodes.Compare) -> str:
        found, left = [], self.expression(node.expr)
        for operand in node.ops:
            right = self.expression(operand.expr)
            found.append(f"({left} {OPERATORS[operand.op]} {right})")
            left = right
        return found[0] if len(found) == 1 else f"({' and '.join(found)})"

    def _express_test(self, node: nodes.Test) -> str:
        subject = self.expression(node.node)
        if node.name == "none":
            # An undefined value is none to minijinja's test, and null is not.
            return f"({subject} == none)"
        if node.name == "sequence":
            # What Jinja counts and looks up by place: texts and dictionaries too.
            return f"({subject} is iterable)"
        if node.name not in TESTS or node.kwargs:
            raise self._unknown(f"the test {node.name}", node)
        taken = f"({self._arguments(node)})" if node.args else ""
        return f"({subject} is {node.name}{taken})"

    def _express_filter(self, node: nodes.Filter) -> str:
        if node.node is None:
            raise self._unknown("a filtered block", node)
        name = ALIASES.get(node.name, node.name)
        if name == "tojson":
            return self._json(node)
        if name == "string":
            return self._as_text(node.node)
        if name not in FILTERS:
            raise self._unknown(f"the filter {node.name}", node)
        taken = self._arguments(node)
        return f"({self.expression(node.node)}|{name}{f'({taken})' if taken else ''})"

    def _json(self, node: nodes.Filter) -> str:
        from jinja2 import nodes

        options: dict[str, Any] = {str(item.key): item.value for item in node.kwargs}
        indent = options.pop("indent", None)
        known = options.pop("ensure_ascii", nodes.Const(False))
        if node.args or options or not isinstance(known, nodes.Const) or known.value:
            raise self._unknown("these options of tojson", node)
        value = self.expression(node.node) if node.node else ""
        if indent is None or (isinstance(indent, nodes.Const) and indent.value is None):
            return f"({value}|tojson)"
        if not isinstance(indent, nodes.Const) or not isinstance(indent.value, int):
            raise self._unknown("this indent of tojson", node)
        return self._indented(value, indent.value)

    def _indented(self, value: str, indent: int) -> str:
        return f"es_json({value}, {_quoted(' ' * indent)}, '')"

    def _express_call(self, node: nodes.Call) -> str:
        from jinja2 import nodes

        if node.dyn_args or node.dyn_kwargs:
            raise self._unknown("a call with a list of arguments", node)
        called = node.node
        if isinstance(called, nodes.Getattr):
            return self._method(node, called)
        if not isinstance(called, nodes.Name) or called.name not in self._functions:
            raise self._unknown("this call", node)
        return f"{called.name}({self._arguments(node)})"

    def _method(self, node: nodes.Call, called: nodes.Getattr) -> str:
        subject, name, taken = self.expression(called.node), called.attr, self._arguments(node)
        if name in METHODS:
            return f"({subject}|{METHODS[name]}{f'({taken})' if taken else ''})"
        if name == "split":
            return f"({subject}|split{f'({taken})' if taken else ''}|list)"
        if name in ("startswith", "endswith"):
            return f"({subject} is {name.removesuffix('swith')}ingwith({taken}))"
        if name == "join" and len(node.args) == 1:
            return f"({taken}|join({subject}))"
        if name == "values" and not taken:
            return f"({subject}|items|map(attribute=1)|list)"
        if name == "get" and 1 <= len(node.args) <= 2 and not node.kwargs:
            key = self.expression(node.args[0])
            other = self.expression(node.args[1]) if len(node.args) == 2 else "none"
            return f"({subject}[{key}] if {key} in {subject} else {other})"
        raise self._unknown(f"the method {name}", node)

    def _unknown(self, what: str, node: nodes.Node) -> LoweringError:
        return LoweringError(
            f"the chat template has {what}, line {node.lineno}, which {self.engine}'s templates cannot express",
            fix="write chat_template without it, or leave this engine out with --runtime",
        )

    def _arguments(self, node: nodes.Call | nodes.Filter | nodes.Test) -> str:
        named = [f"{item.key}={self.expression(item.value)}" for item in node.kwargs]
        return ", ".join([self.expression(item) for item in node.args] + named)


class _MinjaWriter(_Writer):
    """As onnxruntime-genai's templates want it: methods of strings stay, and values print as in Python."""

    filters: ClassVar[frozenset[str]] = frozenset({
        "default", "dictsort", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "reject",
        "rejectattr", "safe", "select", "selectattr", "sort", "string", "trim", "unique",
    })  # fmt: skip
    tests: ClassVar[frozenset[str]] = frozenset({
        "boolean", "defined", "float", "integer", "iterable", "mapping", "none", "number", "string",
    })  # fmt: skip
    methods: ClassVar[frozenset[str]] = frozenset({
        "capitalize", "endswith", "get", "items", "lstrip", "rstrip", "startswith", "strip", "title",
    })  # fmt: skip

    def _as_text(self, node: nodes.Expr) -> str:
        return self.expression(node)

    def _leaves(self, node: nodes.Node) -> bool:
        return False

    def _write_break(self, node: nodes.Break) -> str:
        return "{%- break -%}"

    def _write_continue(self, node: nodes.Continue) -> str:
        return "{%- continue -%}"

    def _express_getitem(self, node: nodes.Getitem) -> str:
        from jinja2 import nodes

        plain = super()._express_getitem(node)
        negative = isinstance(node.arg, nodes.Neg)
        number = node.arg.node if isinstance(node.arg, nodes.Neg) else node.arg
        place = number.value if isinstance(number, nodes.Const) else None
        place = -place if negative and isinstance(place, int) else place
        if not isinstance(place, int) or (isinstance(node.node, nodes.Name) and node.node.name == "messages"):
            return plain
        # A letter of a text is none there, a part of a text is a text.
        subject, end = self.expression(node.node), place + 1 or ""
        return f"({subject}[{place}:{end}] if ({subject} is string) else {plain})"

    def _express_compare(self, node: nodes.Compare) -> str:
        if len(node.ops) == 1 and node.ops[0].op in ("in", "notin"):
            part, whole = self.expression(node.expr), self.expression(node.ops[0].expr)
            found = f"((({whole}).split({part})|length > 1) if ({whole} is string) else ({part} in {whole}))"
            return found if node.ops[0].op == "in" else f"(not {found})"
        return super()._express_compare(node)

    def _express_test(self, node: nodes.Test) -> str:
        subject = self.expression(node.node)
        if node.name in ("eq", "equalto") and len(node.args) == 1:
            return f"({subject} == {self.expression(node.args[0])})"
        if node.name in ("true", "false"):
            return f"({subject} == {node.name})"
        if node.name == "undefined":
            return f"(not ({subject} is defined))"
        if node.name == "sequence":
            return f"({subject} is string or {subject} is iterable)"
        if node.name not in self.tests or node.args or node.kwargs:
            raise self._unknown(f"the test {node.name}", node)
        return f"({subject} is {node.name})"

    def _express_filter(self, node: nodes.Filter) -> str:
        if node.node is None:
            raise self._unknown("a filtered block", node)
        name, subject = ALIASES.get(node.name, node.name), self.expression(node.node)
        if name == "first" and not node.args:
            return f"{subject}[0]"
        if name in ("capitalize", "title") and not node.args:
            return f"({subject}).{name}()"
        if name == "replace" and len(node.args) == 2:
            return self._replaced(subject, node)
        if name == "tojson":
            return self._json(node)
        if name not in self.filters or (name == "trim" and node.args):
            raise self._unknown(f"the filter {node.name}", node)
        taken = self._arguments(node)
        if name in ("select", "reject", "selectattr", "rejectattr"):
            taken = taken.replace("'eq'", "'equalto'").replace("'=='", "'equalto'")
            if taken.endswith("'undefined'"):
                name = name.replace("reject", "select") if "reject" in name else name.replace("select", "reject")
                taken = taken.replace("'undefined'", "'defined'")
        return f"({subject}|{name}{f'({taken})' if taken else ''})"

    def _method(self, node: nodes.Call, called: nodes.Getattr) -> str:
        subject, name, taken = self.expression(called.node), called.attr, self._arguments(node)
        if name == "replace" and len(node.args) == 2:
            return self._replaced(subject, node)
        if name == "lower" and not taken:
            return f"({subject}|lower)"
        if name == "join" and len(node.args) == 1:
            return f"({taken}|join({subject}))"
        if name in self.methods or (name == "split" and len(node.args) == 1 and not node.kwargs):
            return f"({subject}).{name}({taken})"
        raise self._unknown(f"the method {name}", node)

    def _indented(self, value: str, indent: int) -> str:
        return f"({value}|tojson(indent={indent}))"

    def _replaced(self, subject: str, node: nodes.Call | nodes.Filter) -> str:
        old, new = (self.expression(item) for item in node.args)
        return f"(({subject}).split({old})|join({new}))"


def _quoted(text: str) -> str:
    """A string as both write it."""
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "'" + "".join(escapes.get(letter, letter) for letter in text) + "'"
