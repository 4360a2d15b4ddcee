"""The checks of shapes that run in all tests (`helpers/shapes.py`): what was found right hides nothing that is wrong later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import beartype
import jaxtyping
import numpy as np
import torch
from jaxtyping import Float, Int, TypeCheckError
from torch import Tensor

import mechkit as mk
from helpers import shapes
from helpers.shapes import jaxtyped_once, unchecked
from mechkit.hooks.loading.heads import record_heads

checker = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, is_color=False))
once = jaxtyped_once(typechecker=checker)


def refused(call: Callable[[], object]) -> bool:
    """Not by `pytest.raises`, in which shapes are not checked."""
    try:
        call()
    except TypeCheckError:
        return True
    return False


@once
def product(a: Float[Tensor, "row inner"], b: Float[Tensor, "inner column"]) -> Float[Tensor, "row column"]:
    return a @ b


@once
def given(x: Float[Tensor, "n"], returned: object) -> Float[Tensor, "n"]:
    return returned  # type: ignore[return-value]


@once
def several(
    xs: Sequence[Float[Tensor, "n"]], how: Literal["up", "down"] = "up", sign: Literal[1, -1] = 1, size: float = 1.0
) -> int:
    return len(xs)


def test_the_packages_functions_are_checked_so():
    assert jaxtyping.jaxtyped is jaxtyped_once
    assert mk.hooks.FrozenNorm.linear.__code__.co_filename == shapes.__file__
    assert any(looked_at() for _ in range(20))  # one in ten, where other tests have called it often


def looked_at() -> bool:
    try:
        return refused(lambda: record_heads(object(), torch.zeros(3).long()))
    except AttributeError:  # of the function itself, which was called
        return False


def test_right_calls_do_not_hide_wrong_ones():
    for _ in range(2):
        assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
        assert refused(lambda: product(torch.ones(2, 3), torch.ones(4, 4)))
        assert refused(lambda: product(torch.ones(2, 3), torch.ones(3, 4).long()))
        assert refused(lambda: product(torch.ones(2, 3), b=torch.ones(3)))
        assert refused(lambda: product(torch.ones(2, 3), np.ones((3, 4))))
        assert product(torch.ones(2, 3), b=torch.ones(3, 4).to(torch.float32)).shape == (2, 4)
        assert product(torch.ones(5, 1), torch.ones(1, 1)).shape == (5, 1)


def test_wrong_values_are_found_after_right_ones():
    x, other = torch.ones(3), torch.ones(4)
    for _ in range(2):
        assert given(x, x) is x
        assert refused(lambda: given(x, other))
        assert refused(lambda: given(x, x.long()))
        assert refused(lambda: given(x, None))
        assert given(other, other) is other
    called = []

    @once
    def counted(x: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        called.append(x)
        return x if len(called) < 3 else other

    assert torch.equal(counted(x), x)
    assert torch.equal(counted(x), x)
    assert refused(lambda: counted(x))
    assert len(called) == 3  # what it returned is checked, without calling it again


def test_what_is_in_collections_counts():
    x = torch.ones(3)
    for _ in range(2):
        assert several([x, x]) == 2
        assert refused(lambda: several([x.long()]))
        assert refused(lambda: several([x[None]]))
        assert refused(lambda: several({0: x}))
        assert refused(lambda: several([x], "left"))
        assert several([x], "down") == 1
        assert several([x], "down", -1, 2) == 1
        assert refused(lambda: several([x], "down", 2))
        assert refused(lambda: several([x], size="1"))
        assert several(tuple([x] * 100)) == 100  # of so many not all are looked at, as without this
        assert refused(lambda: several([x.long()] * 100))
        assert refused(lambda: several([x], size=np.ones(1)))


def test_closures_share_their_checks_and_nothing_else():
    def make(value: Tensor) -> Callable[[Tensor], Tensor]:
        @once
        def add(x: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
            return x + value

        return add

    one, two, broken = make(torch.ones(1)), make(torch.full((1,), 2.0)), make(torch.ones(4, 1))
    assert float(one(torch.zeros(3))[0]) == 1
    assert float(two(torch.zeros(3))[0]) == 2
    assert refused(lambda: broken(torch.zeros(3)))
    assert refused(lambda: two(torch.zeros(3).long()))


def test_recursion_generators_and_threads():
    @once
    def countdown(x: Float[Tensor, "n"], then: object) -> Float[Tensor, "n"]:
        return x if len(x) == 1 else torch.cat([countdown(x[1:], then), x[:1]])

    assert countdown(torch.arange(4.0), None).tolist() == [3, 2, 1, 0]

    @contextmanager
    @once
    def within(x: Float[Tensor, "n"]) -> Iterator[Int[Tensor, "n"]]:
        yield x.long()

    with within(torch.ones(2)) as found:
        assert found.tolist() == [1, 1]
    results: list[bool] = []

    def work() -> None:
        for n in range(1, 30):
            results.append(bool(product(torch.ones(n, 2), torch.ones(2, n)).shape == (n, n)))
            results.append(refused(lambda n=n: product(torch.ones(n, 2), torch.ones(3, n))))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 * 58
    assert all(results)


def test_nothing_is_checked_where_checks_are_off():
    with unchecked():
        assert product(torch.ones(2, 3), torch.ones(3, 4).float()).shape == (2, 4)
        assert several([torch.ones(2).long()]) == 1
    assert refused(lambda: several([torch.ones(2).long()]))


def test_a_function_that_settled_is_still_looked_at():
    @once
    def twice(x: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
        return 2 * x

    for _ in range(shapes.SETTLED + 25):
        twice(torch.ones(3))
    assert any(refused(lambda: twice(torch.ones(3).long())) for _ in range(10))  # one in ten
    assert refused(lambda: twice(torch.ones(3).long()))  # and from then on each
