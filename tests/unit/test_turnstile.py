"""How new clients are let in where many come at once."""

import asyncio
from functools import partial

from realtime_bridge.transports.uvicorn_protocol import A_TURN, Turnstile


async def test_who_comes_alone_is_in_at_once_and_many_are_let_in_in_order_a_few_in_each_turn_of_the_loop() -> None:
    turnstile = Turnstile(asyncio.get_running_loop())
    let_in: list[int] = []
    counts = []
    for number in range(4 * A_TURN):
        assert turnstile.enter(partial(let_in.append, number)) == (number < A_TURN)
    while len(let_in) < 4 * A_TURN:
        counts.append(len(let_in))
        await asyncio.sleep(0)
    assert counts == [A_TURN, 2 * A_TURN, 3 * A_TURN]
    assert let_in == list(range(4 * A_TURN))


async def test_a_client_that_cannot_be_let_in_keeps_nobody_else_out() -> None:
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)
    turnstile = Turnstile(loop)
    is_in = asyncio.Event()

    def fail() -> None:
        raise ValueError

    for _ in range(A_TURN):
        turnstile.enter(lambda: None)
    turnstile.enter(fail)
    turnstile.enter(is_in.set)
    async with asyncio.timeout(5):
        await is_in.wait()
