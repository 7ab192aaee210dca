"""The oracle: random transactions, clients that fold what they are told, and a judge who knows what may be told.

    world    the tables, the users, and who may see what: the policies once more, in Python
    truth    every commit with what it changed, and the facts after it, compared with `SELECT` as each user
    writer   random transactions, one after the other
    copies   clients on every transport, which go away and come back to any bridge
    judge    what was told to whom: nothing unseen, nothing missing, no resync without a reason
    stage    engines, bridges, proxies, writer and copies, put together; and the quiet moments when all is compared
    faults   what can be done to them, and what each of that excuses
    planted  faults of the bridge itself, which the judge must find

`make chaos` plays all of it for ten minutes (`__main__`).
"""
