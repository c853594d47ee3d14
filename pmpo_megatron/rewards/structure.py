"""Whether an expression is a value, or leaves to the reader what the problem asks for: ``17+25`` is not the value 42.

The parser keeps expressions as they are written. A value may hold numbers, fractions of integers, roots, constants,
variables and functions of variables; it may not hold two numbers that have only to be added, multiplied or divided.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sympy import Basic

# Commands that a value may contain; any other (sum, int, lim, binom, bmod, to, lor, not ...) only where the answer has it.
ORDINARY = set(
    "frac dfrac tfrac sqrt pi infty cdot times div pm mp cup cap in left right le ge leq geq leqslant geqslant lt gt text mbox"
    " mathrm textbf mathbf begin end circ degree prime ldots dots cdots lfloor rfloor lceil rceil emptyset varnothing mathbb"
    " quad qquad displaystyle sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp alpha beta gamma delta"
    " epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda"
    " Sigma Phi Psi Omega hbar ell imath overline bar hat vec dot ddot sim langle rangle lbrace rbrace boxed approx".split()
)
COMMAND = re.compile(r"\\([a-zA-Z]+)")
FRACTION = re.compile(
    r"(?:\\frac\s*\{?\s*(\d+)\s*\}?\s*\{\s*(\d+)\s*\}|\\frac\s*(\d)\s*(\d)|(?<![\d.])(\d+)\s*/\s*(\d+)(?![\d.]))"
)
DERIVATIVE = re.compile(r"\\frac\{(?:d|\\mathrm\{d\})(?:\^\{?\d\}?)?[^{}]*\}\{(?:d|\\mathrm\{d\})[^{}]*\}")
ENVIRONMENT = re.compile(r"\\begin\{(\w+)\}")
SCIENTIFIC = re.compile(r"[-+]?[1-9](?:\.\d+)?(?:\\times|\\cdot|\*)10\^(?:\{[-+]?\d+\}|\d)")


def operators(text: str) -> set[str]:
    """What ``text`` contains beyond the ordinary commands of a value."""
    names = set(COMMAND.findall(text)) - ORDINARY
    names |= {name for name in ENVIRONMENT.findall(text) if name in ("vmatrix", "Vmatrix", "cases")}
    return names | ({"derivative"} if DERIVATIVE.search(text) else set()) | ({"!"} if "!" in text.replace(r"\!", "") else set())


def is_value(text: str, tree: Basic) -> bool:
    """Whether nothing in ``tree``, parsed from ``text`` without evaluation, is left to be evaluated."""
    if SCIENTIFIC.fullmatch(text.replace(" ", "")):
        return True
    for groups in FRACTION.findall(text):  # the parser divides integers at once, so that the text has to tell
        top, bottom = (int(part) for part in [group for group in groups if group])
        if bottom > 1 and top % bottom == 0 and top:
            return False
    return not any(_evaluable(node) for node in _nodes(tree))


def numeric_functions(tree: Basic) -> set[str]:
    """Names of functions of numbers in ``tree``: a logarithm or a sine that has only to be computed."""
    from sympy import Function

    return {type(node).__name__ for node in _nodes(tree) if isinstance(node, Function) and not node.free_symbols}


def _nodes(tree: Basic) -> Iterator[Basic]:
    from sympy import MatrixBase

    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.flat() if isinstance(node, MatrixBase) else getattr(node, "args", ()))


def _evaluable(node: Basic) -> bool:
    from sympy import Add, Expr, MatMul, MatrixBase, Mul, Pow

    if isinstance(node, MatrixBase) or not isinstance(node, Expr):
        return isinstance(node, MatMul)
    if isinstance(node, Add):
        kinds = [arg.doit().as_coeff_Mul()[1] for arg in node.args]
        return len(set(kinds)) < len(kinds)  # two numbers, or like terms: 2x+3x
    if isinstance(node, Mul):
        numbers = [abs(arg) for arg in _factors(node) if _is_rational(arg)]
        whole = [n for n in numbers if n != 1 and n.doit().is_integer]
        rest = [n for n in numbers if n != 1 and not n.doit().is_integer]
        one_over = all(isinstance(n, Pow) or n.is_Rational and n.p == 1 for n in rest)
        return len(whole) > 1 or len(rest) > 1 or bool(whole and rest and not one_over) or _integer_quotient(node, whole, rest)
    if isinstance(node, Pow) and node.exp == -1 and node.base.is_Integer:
        return False
    return bool(node.args) and _is_rational(node)


def _integer_quotient(node: Basic, whole: list[Basic], rest: list[Basic]) -> bool:
    return bool(whole and rest) and _is_rational(node) and bool(node.doit().is_integer)


def _factors(node: Basic) -> Iterator[Basic]:
    from sympy import Mul

    for arg in node.args:
        yield from _factors(arg) if isinstance(arg, Mul) else (arg,)


def _is_rational(node: Basic) -> bool:
    """Whether ``node`` is a number without roots and constants once it is evaluated."""
    if getattr(node, "free_symbols", True):
        return False
    value = node.doit()
    return bool(value.is_Rational or value.is_Float)
