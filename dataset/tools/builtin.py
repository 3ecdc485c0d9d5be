"""The tools of the demo, which a model can call: safe, local, the same in data, training and
evaluation.

A tool is a name, a JSON schema of its arguments, and a function of them. A model trained on the
demo's tools.jsonl knows all of these. call.py executes calls, of them and of those in mock.py.
"""

import ast
import math
import operator
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

WEEKDAYS = {
    "zh": ("星期一", "星期二", "星期三", "星期四", "星期五", "星期六", "星期日"),
    "en": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
}


class BuiltinTool(NamedTuple):
    """The schema that the model sees, and the function that is executed."""

    schema: dict[str, Any]  # in the form of OpenAI's API
    run: Callable[..., dict[str, Any]]  # keyword arguments → a result that JSON can hold


class ToolError(Exception):
    """The error message that the model gets instead of a result."""

    kind = "failed"


def plain(value: float) -> float | int:
    """12.0 as 12, and without the digits of rounding errors. ToolError if it is infinite."""
    if not math.isfinite(value):
        raise ToolError("that number is too large")
    value = float(f"{value:.10g}")
    return int(value) if value.is_integer() and abs(value) < 1e15 else value


# -- calculator ------------------------------------------------------------------------------------

MAX_EXPRESSION_LENGTH = 200
MAX_BITS = 1000  # of an integer: 9 ** 9 ** 9 would take all memory
BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
UNARY: dict[type, Callable] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
MAX_DIGITS = 400  # of round's second argument: Python would work out 10 ** 1000000000


def bounded_round(value: float, digits: int = 0) -> int | float:
    if abs(digits) > MAX_DIGITS:
        raise ToolError("that is too many digits to round to")
    return round(value, digits) if digits else round(value)


FUNCTIONS: dict[str, Callable] = {"sqrt": math.sqrt, "abs": abs, "round": bounded_round}
FUNCTIONS |= {"sin": math.sin, "cos": math.cos}
FUNCTIONS |= {"tan": math.tan, "log": math.log, "exp": math.exp}
CONSTANTS = {"pi": math.pi, "e": math.e}
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "^": "**", "（": "(", "）": ")"})


def calculator(expression: str) -> dict[str, Any]:
    if len(expression) > MAX_EXPRESSION_LENGTH:
        raise ToolError(f"an expression has at most {MAX_EXPRESSION_LENGTH} characters")
    try:
        tree = ast.parse(expression.translate(SIGNS).strip(), mode="eval")
        value = evaluate(tree.body)
    except ToolError:
        raise
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except (SyntaxError, ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        raise ToolError(f"{expression!r} cannot be worked out") from None
    return {"result": plain(value) if isinstance(value, float) else value}


def evaluate(node: ast.expr) -> int | float:
    """The value of a parsed expression. Python's `eval` would run anything; here only the
    operators, functions and constants listed above are evaluated."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return bounded(value)
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in UNARY:
            return UNARY[type(op)](evaluate(operand))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            left, right = evaluate(left), evaluate(right)
            if isinstance(op, ast.Pow) and abs(right) * math.log2(abs(left) + 2) > MAX_BITS:
                raise ToolError("that number is too large")
            return bounded(BINARY[type(op)](left, right))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return bounded(FUNCTIONS[name](*map(evaluate, args)))
    raise ToolError("an expression has numbers, + - * / // % ** ( ), and " + ", ".join(FUNCTIONS))


def bounded(value: int | float) -> int | float:
    if isinstance(value, complex) or (isinstance(value, float) and not math.isfinite(value)):
        raise ToolError("the result is no real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ToolError("that number is too large")
    return value


# -- clock, units, dictionary ----------------------------------------------------------------------


def clock() -> dict[str, Any]:
    now = datetime.now()
    weekday = WEEKDAYS["en"][now.weekday()]
    return {"date": str(now.date()), "weekday": weekday, "time": f"{now:%H:%M}"}


LENGTH = dict(mm=0.001, cm=0.01, m=1.0, km=1000.0, inch=0.0254, foot=0.3048, mile=1609.344)
MASS = dict(mg=1e-6, g=0.001, kg=1.0, t=1000.0, ounce=0.028349523125, pound=0.45359237)
VOLUME = dict(ml=0.001, l=1.0, gallon=3.785411784)
TIME = dict(second=1.0, minute=60.0, hour=3600.0, day=86400.0, week=604800.0)
UNITS = (LENGTH, MASS, VOLUME, TIME)
# degrees Celsius = (degrees - zero) * size
TEMPERATURE = {"celsius": (0.0, 1.0), "fahrenheit": (32.0, 5 / 9), "kelvin": (273.15, 1.0)}


def convert_units(value: float, from_unit: str, to_unit: str) -> dict[str, Any]:
    source, target = from_unit.strip().lower(), to_unit.strip().lower()
    if source in TEMPERATURE and target in TEMPERATURE:
        (zero, size), (other_zero, other_size) = TEMPERATURE[source], TEMPERATURE[target]
        converted = (value - zero) * size / other_size + other_zero
        return {"result": plain(converted), "unit": target}
    for units in UNITS:
        if source in units and target in units:
            return {"result": plain(value * units[source] / units[target]), "unit": target}
    known = [unit for units in (*UNITS, TEMPERATURE) for unit in units]
    for unit in (source, target):
        if unit not in known:
            raise ToolError(f"the unit {unit!r} is unknown; known are {', '.join(known)}")
    raise ToolError(f"{source} and {target} measure different things")


MEANINGS = {
    "token": "a piece of text, often a part of a word, that a model reads and writes as one",
    "tokenizer": "what cuts a text into tokens and puts tokens together to a text",
    "vocabulary": "all tokens that a model knows",
    "corpus": "a large collection of texts to learn from",
    "embedding": "the vector that stands for a token inside a model",
    "vector": "a row of numbers",
    "matrix": "a table of numbers, by which vectors are multiplied",
    "tensor": "numbers in a block of any number of dimensions",
    "weight": "one of the numbers that a model learns",
    "bias": "a number that a layer adds, whatever its input is",
    "layer": "one of the equal steps in which a model works on its vectors",
    "neuron": "one output of a layer, with the weights that lead to it",
    "transformer": "a model that is built of attention and feed-forward layers in turn",
    "attention": "how a position of a text gathers what it needs from earlier ones",
    "query": "what a position asks of the others in attention",
    "key": "what a position shows to those that ask in attention",
    "value": "what a position hands over in attention",
    "head": "one of several attentions that run side by side in a layer",
    "mask": "what hides positions that must not be seen",
    "residual": "the path on which a layer's input is added to its output",
    "activation": "the function that bends a layer's output, so that layers can do more than one",
    "normalization": "bringing vectors to the same size before they are worked on",
    "expert": "one of several feed-forward layers, of which each token uses a few",
    "router": "what chooses the experts for a token",
    "context": "the text that a model sees when it predicts the next token",
    "cache": "keys and values of earlier tokens, kept so that nobody works them out again",
    "prompt": "the text that a model is given to go on from",
    "completion": "the text that a model writes after a prompt",
    "logit": "the score that a model gives a token before softmax makes it a probability",
    "softmax": "turns scores into probabilities that add up to 1",
    "temperature": "what logits are divided by: the higher, the freer the choice",
    "sampling": "drawing the next token at random from the probabilities",
    "entropy": "how uncertain a distribution is, in nats or bits",
    "perplexity": "e to the mean loss: how many equally likely tokens there seem to be",
    "loss": "how surprised a model is by the true next token; training makes it small",
    "gradient": "for each weight, how the loss changes if the weight is changed a little",
    "backpropagation": "working out all gradients from the last layer to the first",
    "optimizer": "the rule by which gradients change the weights",
    "momentum": "a running mean of gradients that an optimizer follows",
    "batch": "the examples from which one update is learnt",
    "epoch": "one pass through all the training data",
    "overfitting": "learning examples by heart instead of what they have in common",
    "dropout": "leaving out random activations in training, against learning by heart",
    "pretraining": "training on plain text, to predict the next token",
    "alignment": "making a model do what people want of it",
    "reward": "a number that says how good an answer was",
    "policy": "the model that acts, in learning from rewards",
    "distillation": "training a small model on what a large one says",
    "quantization": "storing weights in fewer bits",
    "benchmark": "fixed questions by which models are compared",
}


def dictionary(word: str) -> dict[str, Any]:
    meaning = MEANINGS.get(word.strip().lower())
    if meaning is None:
        raise ToolError(f"{word!r} is not in the dictionary")
    return {"word": word.strip().lower(), "meaning": meaning}


# -- all of them -----------------------------------------------------------------------------------


def tool(
    name: str,
    description: str,
    run: Callable[..., dict[str, Any]],
    **properties: tuple[str, str] | tuple[str, str, Any],
) -> BuiltinTool:
    """A tool; `properties`: type and description of each argument, and the default of one that is
    not required."""
    fields: dict[str, dict[str, Any]] = {}
    for key, (kind, told, *default) in properties.items():
        fields[key] = {"type": kind, "description": told}
        fields[key] |= {"default": default[0]} if default else {}
    required = [key for key, about in fields.items() if "default" not in about]
    parameters = {"type": "object", "properties": fields, "required": required}
    about = {"name": name, "description": description, "parameters": parameters}
    return BuiltinTool({"type": "function", "function": about}, run)


def by_name(*tools: BuiltinTool) -> dict[str, BuiltinTool]:
    return {each.schema["function"]["name"]: each for each in tools}


TOOLS = by_name(
    tool("calculator", "Work out a sum", calculator, expression=("string", "such as 348 * 27")),
    tool("clock", "Tell today's date and weekday, and the time of day", clock),
    tool(
        "convert_units",
        "Convert a length, mass, volume, time or temperature",
        convert_units,
        value=("number", "how many of from_unit"),
        from_unit=("string", "such as km or celsius"),
        to_unit=("string", "such as mile or fahrenheit"),
    ),
    tool(
        "dictionary",
        "Look up what a word of machine learning means",
        dictionary,
        word=("string", "such as token"),
    ),
)
