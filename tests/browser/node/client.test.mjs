// What the client does with what it is told, against a WebSocket and a fetch that the test itself plays, in faked time.
// Real sockets, a real bridge and a real browser: tests/browser/test_client.py.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { afterEach, beforeEach, mock, test } from "node:test";

import * as client from "../../../realtime_bridge/static/client.js";

const { connect, fold } = client;

class FakeSocket {
  static all = [];
  static get last() { return FakeSocket.all.at(-1); }
  readyState = 0;
  sent = [];

  constructor(url) {
    this.url = url;
    FakeSocket.all.push(this);
  }

  send(text) { this.sent.push(JSON.parse(text)); }
  said(type) { return this.sent.filter((message) => message.type === type); }
  close() { this.readyState = 3; }
  get closed() { return this.readyState === 3; }

  open() {
    this.readyState = 1;
    this.onopen();
  }

  say(message) { this.onmessage({ data: JSON.stringify(message) }); }

  end(code, reason = "") {
    this.readyState = 3;
    this.onclose({ code, reason });
  }
}

const T0 = Date.parse("2026-01-01T00:00:00Z");
const time = () => new Date(Date.now()).toISOString();
const posts = { schema: "public", table: "posts", commit_timestamp: "2026-01-01T00:00:00.000Z" };
let bridge, tokens, statuses, random;

/** Let everything happen that is due, then `ms` of time pass, then let that happen. */
async function pass(ms = 0) {
  const settle = async () => { for (let i = 0; i < 5; i++) await new Promise((done) => setImmediate(done)); };
  await settle();
  for (let left = ms; ; left -= 1000) {
    mock.timers.tick(Math.min(left, 1000));
    await settle();
    if (left <= 1000) break;
  }
}

function start(options = {}) {
  tokens = 0;
  bridge = connect({
    url: "http://bridge.test/",
    token: async () => `token-${++tokens}`,
    transports: ["websocket"],
    WebSocket: FakeSocket,
    ...options,
  });
  statuses = [];
  bridge.on("status", (status) => statuses.push(status));
  return bridge;
}

/** Open the newest socket as a bridge would, and answer all that it subscribes to. */
async function accept({ position = "e-1", current = true } = {}) {
  await pass();
  const socket = FakeSocket.last;
  socket.open();
  socket.say({ type: "ready", connection_id: "c", position, complete_until: time(), tables: [], ping_seconds: 25 });
  await answer(socket, { position, current });
  return socket;
}

async function answer(socket, { position = "e-1", current = true } = {}) {
  for (const { id, table, position: asked } of socket.said("subscribe")) {
    if (!socket.answered?.has(id)) socket.say({ type: "subscribed", id, table, position: asked ?? position });
    (socket.answered ??= new Set()).add(id);
  }
  await pass();
  if (current) socket.say({ type: "pong", position, complete_until: time() });
  await pass();
}

const insert = (record, position, id = "1") => ({ type: "INSERT", ...posts, record, position, subscriptions: [id] });
const update = (record, old_record, position) => ({ ...insert(record, position), type: "UPDATE", old_record });
const titles = (live) => [...live.rows.values()].map(({ title }) => title);

/** A `load` whose answers the test gives when it likes. */
function loads() {
  const calls = [];
  const load = ({ signal }) => new Promise((resolve, reject) => calls.push({ resolve, reject, signal }));
  return [load, calls];
}

beforeEach(() => {
  FakeSocket.all = [];
  mock.timers.enable({ apis: ["setTimeout", "setInterval", "Date"], now: T0 });
  random = mock.method(Math, "random", () => 0.5);
  mock.method(globalThis, "fetch", async () => { throw new TypeError("no network"); });
});

afterEach(async () => {
  bridge?.close();
  await pass();
  const sockets = FakeSocket.all.length;
  await pass(700_000);
  assert.equal(FakeSocket.all.length, sockets, "nothing happens after close()");
  mock.timers.reset();
  mock.restoreAll();
});

test("the token is the first message and never in the address", async () => {
  start();
  const socket = await accept();
  assert.equal(socket.url, "ws://bridge.test/ws?table=");
  assert.deepEqual(socket.sent[0], { type: "auth", token: "token-1" });
});

test("load is called after following has begun, and what comes meanwhile is applied on top", async () => {
  const [load, calls] = loads();
  const live = start().live("posts", { load });
  await pass();
  assert.equal(calls.length, 0);
  const socket = await accept();
  assert.equal(calls.length, 1);
  assert.equal(bridge.status, "behind");
  socket.say(update({ id: 1, title: "new" }, { id: 1 }, "e-2"));
  socket.say({ type: "DELETE", ...posts, old_record: { id: 2 }, position: "e-3", subscriptions: ["1"] });
  assert.equal(live.rows.size, 0);
  calls[0].resolve([{ id: 1, title: "old", body: "large" }, { id: 2, title: "gone" }]);
  await pass();
  assert.deepEqual([...live.rows], [[1, { id: 1, title: "new", body: "large" }]]);
  assert.equal(bridge.status, "live");
  assert.equal(live.position, "e-3");
});

test("a resync waits as long as told, and one during a load makes that load void", async () => {
  const [load, calls] = loads();
  const live = start().live("public.posts", { load });
  const socket = await accept();
  calls[0].resolve([{ id: 1, title: "first" }]);
  await pass();
  const resync = { type: "resync", table: "*", reason: "bulk", subscriptions: ["1"] };
  socket.say({ ...resync, position: "e-5", after_ms: 3000 });
  assert.equal(bridge.status, "behind");
  await pass(2900);
  assert.equal(calls.length, 1);
  socket.say(insert({ id: 2, title: "meanwhile" }, "e-6"));
  assert.deepEqual(titles(live), ["first", "meanwhile"], "the old copy stays live");
  await pass(200);
  assert.equal(calls.length, 2);
  socket.say({ ...resync, position: "e-7", after_ms: 0 });
  assert.ok(calls[1].signal.aborted);
  await pass();
  calls[1].resolve([{ id: 1, title: "void" }]);
  await pass();
  assert.deepEqual(titles(live), ["first", "meanwhile"]);
  calls[2].resolve([{ id: 3, title: "third" }]);
  await pass();
  assert.deepEqual(titles(live), ["third"]);
  assert.equal(bridge.status, "live");
});

test("a load that fails or never answers is tried again with backoff", async () => {
  const [load, calls] = loads();
  const live = start().live("posts", { load });
  const errors = [];
  live.on("error", ({ detail }) => errors.push(detail));
  await accept();
  calls[0].reject(new Error("no"));
  await pass(300);
  assert.equal(calls.length, 2);
  await pass(61_000);
  assert.equal(calls.length, 3);
  assert.ok(calls[1].signal.aborted);
  assert.deepEqual(errors, ["load: no", "load: no answer in 60000 ms"]);
  calls[2].resolve(new Map([[1, { id: 1, title: "x" }]]).values());
  await pass();
  assert.deepEqual(titles(live), ["x"]);
});

test("after a loss every copy goes on from its own position, without loading again", async () => {
  const [load, calls] = loads();
  start().live("posts", { load });
  bridge.live("posts", { load, filter: "title=eq.a" });
  let socket = await accept();
  for (const call of calls) call.resolve([]);
  socket.say(insert({ id: 1 }, "e-2", "1"));
  socket.say(insert({ id: 1, title: "a" }, "e-3", "2"));
  socket.end(1006);
  assert.equal(bridge.status, "connecting");
  await pass(300);
  socket = await accept({ position: "e-9", current: false });
  const subscribed = socket.said("subscribe").map(({ position, filter }) => [position, filter]);
  assert.deepEqual(subscribed, [["e-2", undefined], ["e-3", "title=eq.a"]]);
  assert.equal(bridge.status, "behind");
  socket.say({ type: "pong", position: "e-2" }); // not at the end: no time
  assert.equal(bridge.status, "behind");
  socket.say({ type: "pong", position: "e-9", complete_until: time() });
  assert.equal(bridge.status, "live");
  assert.equal(calls.length, 2);
  assert.equal(tokens, 2);
});

test("a resync that was not met for want of a connection is met after the next", async () => {
  const [load, calls] = loads();
  const live = start().live("posts", { load });
  (await accept()).end(1006);
  calls[0].resolve([]);
  await pass(300);
  const socket = FakeSocket.last;
  socket.open();
  socket.say({ type: "ready", position: "x-7", ping_seconds: 25 });
  socket.say({ type: "subscribed", id: "1", table: "public.posts", position: "x-7" }); // and the resync would follow
  assert.equal(live.position, "e-1");
});

test("a subscription that does not stand yet is not moved by a pong that was asked for before", async () => {
  const [load] = loads();
  const live = start().live("posts", { load });
  await pass();
  const socket = FakeSocket.last;
  socket.open();
  socket.say({ type: "ready", position: "e-1", complete_until: time(), ping_seconds: 25 });
  socket.say({ type: "pong", position: "e-2", complete_until: time() });
  assert.equal(live.position, null);
});

test("a subscription ends with its copy", async () => {
  const [load] = loads();
  const live = start().live("posts", { load });
  const socket = await accept();
  live.close();
  assert.deepEqual(socket.said("unsubscribe"), [{ type: "unsubscribe", id: "1" }]);
  assert.deepEqual([...new Set(statuses)], ["behind", "live"]);
});

test("keys of several columns, and a listener that throws", async () => {
  const reported = mock.method(console, "error", () => {});
  const live = start().live("notes", { key: ["id", "part"], load: async () => [{ id: 1, part: "a", mood: "sad" }] });
  live.on("change", () => { throw new Error("mine"); });
  const socket = await accept();
  socket.say({ ...update({ id: 1, part: "b", mood: "glad" }, { id: 1, part: "a" }, "e-2"), table: "notes" });
  assert.deepEqual([...live.rows], [['[1,"b"]', { id: 1, part: "b", mood: "glad" }]]);
  assert.equal(reported.mock.callCount(), 2);
});

test("two refused tokens in a row end it until told to try again", async () => {
  start();
  await pass();
  FakeSocket.last.end(4401, "token refused: expired");
  await pass(300);
  assert.equal(FakeSocket.all.length, 2);
  FakeSocket.last.end(4401, "token refused: expired");
  assert.equal(bridge.status, "unauthorized");
  assert.deepEqual(bridge.error, { code: 4401, detail: "token refused: expired" });
  await pass(120_000);
  assert.equal(FakeSocket.all.length, 2);
  assert.equal(tokens, 2);
  bridge.reconnect();
  assert.equal(bridge.status, "connecting");
  await accept();
  assert.equal(bridge.status, "live");
  assert.equal(bridge.error, null);
});

test("without a token nothing is tried; a token that cannot be had now is asked for again", async () => {
  let answer = async () => { throw new Error("no network"); };
  start({ token: () => answer() });
  await pass(2000);
  assert.equal(bridge.status, "offline");
  assert.deepEqual(bridge.error, { code: 1013, detail: "token: no network" });
  answer = async () => null;
  await pass(30_000);
  assert.equal(bridge.status, "unauthorized");
  assert.equal(FakeSocket.all.length, 0);
});

for (const [code, status] of [[4400, "offline"], [4403, "unauthorized"], [4413, "offline"], [1009, "offline"]]) {
  test(`close code ${code} is not met with another connection`, async () => {
    start();
    (await accept()).end(code, "because");
    await pass(120_000);
    assert.equal(FakeSocket.all.length, 1);
    assert.equal(bridge.status, status);
    assert.deepEqual(bridge.error, { code, detail: "because" });
  });
}

test("waits are random below a limit that doubles up to 30 s, and start small after a stable connection", async () => {
  random.mock.mockImplementation(() => 0.999);
  start();
  const waits = [];
  for (let i = 0; i < 9; i++) {
    await pass();
    FakeSocket.last.end(1013, "overloaded");
    const before = Date.now(), sockets = FakeSocket.all.length;
    while (FakeSocket.all.length === sockets) await pass(100);
    waits.push((Date.now() - before) / 1000);
  }
  waits.forEach((wait, i) => assert.ok(Math.abs(wait - Math.min(30, 0.5 * 2 ** i)) < 0.2, `${i}: ${wait}`));
  assert.equal(bridge.status, "offline");
  const socket = await accept();
  await pass(11_000);
  socket.end(1006);
  const sockets = FakeSocket.all.length;
  await pass(501);
  assert.equal(FakeSocket.all.length, sockets + 1);
});

test("a server that says when to come back is taken at its word", async () => {
  start();
  (await accept()).end(1012, "retry in 2500 ms");
  await pass(2400);
  assert.equal(FakeSocket.all.length, 1);
  await pass(200);
  assert.equal(FakeSocket.all.length, 2);
});

test("a token that ends soon is replaced, but never by itself", async () => {
  let token = "same";
  start({ token: async () => token });
  const socket = await accept();
  socket.say({ type: "auth_expiring", expires_at: time() });
  await pass(6000);
  assert.equal(socket.said("auth").length, 1);
  token = "newer";
  await pass(6000);
  assert.deepEqual(socket.said("auth").map((message) => message.token), ["same", "newer"]);
});

test("silence is answered with a ping, and no pong with a new connection", async () => {
  start().live("posts", { load: async () => [] });
  const socket = await accept();
  for (let i = 0; i < 4; i++) {
    await pass(25_000);
    socket.say({ type: "ping", position: `e-${i}`, complete_until: time() });
  }
  assert.equal(FakeSocket.all.length, 1);
  await pass(46_000);
  assert.ok(socket.closed);
  assert.equal(FakeSocket.all.length, 2);
});

test("a minute asleep is followed by a ping, and silence by a new connection with a fresh token", async () => {
  const [load, calls] = loads();
  const live = start().live("posts", { load });
  const socket = await accept();
  calls[0].resolve([]);
  socket.say(insert({ id: 1, title: "before" }, "e-2"));
  const pings = socket.said("ping").length;
  const awake = Date.now;
  mock.method(Date, "now", () => awake() + 60_000); // as a clock goes on while no timer runs
  await pass(5000);
  assert.equal(socket.said("ping").length, pings + 1);
  assert.equal(FakeSocket.all.length, 1);
  await pass(5500);
  assert.ok(socket.closed);
  const next = await accept({ position: "e-3" });
  assert.deepEqual(next.sent[0], { type: "auth", token: "token-2" });
  assert.equal(next.said("subscribe")[0].position, "e-2");
  next.say(insert({ id: 2, title: "meanwhile" }, "e-3"));
  assert.deepEqual(titles(live), ["before", "meanwhile"]);
  assert.equal(bridge.status, "live");
  assert.equal(calls.length, 1);
});

test("the status is behind while completeUntil stands still", async () => {
  start();
  const socket = await accept();
  const until = time();
  for (let i = 0; i < 9; i++) {
    await pass(5_000);
    socket.say({ type: "pong", position: "e-1", complete_until: until });
  }
  assert.equal(bridge.status, "behind");
  socket.say({ type: "pong", position: "e-1", complete_until: time() });
  assert.equal(bridge.status, "live");
});

test("a refused subscription is told to its copies and does not hold up the rest", async () => {
  const live = start().live("secrets", { load: async () => [] });
  const errors = [];
  live.on("error", (error) => errors.push(error));
  const socket = await accept({ current: false });
  socket.say({ type: "error", id: "1", code: 4403, detail: "not served here" });
  assert.deepEqual(errors, [{ code: 4403, detail: "not served here" }]);
  assert.equal(bridge.status, "live");
});

test("a position that is not understood is let go, and the rows are loaded again", async () => {
  const [load, calls] = loads();
  start().live("posts", { load });
  (await accept()).end(1006);
  calls[0].resolve([]);
  await pass(300);
  const socket = await accept({ current: false });
  socket.say({ type: "error", id: "1", code: 4400, detail: "position: not a position of this bridge" });
  assert.equal(socket.said("subscribe")[1].position, undefined);
  await answer(socket);
  assert.equal(calls.length, 2);
});

/** Plays `/events` as a long poll; `next`, if there is one, is what the next poll for a table says. */
function serveLongPoll(asked = [], next = []) {
  mock.method(globalThis, "fetch", (url, { headers, signal }) => {
    const query = Object.fromEntries(url.searchParams);
    asked.push({ ...query, authorization: headers.Authorization });
    if (headers.Accept !== "application/json") return Promise.reject(new TypeError("no streams here"));
    const said = query.table ? next.shift() : undefined;
    if (said instanceof Error) return Promise.reject(said);
    const body = said ?? { messages: [], position: "e-4", more: false, complete_until: time() };
    return new Promise((resolve, reject) => {
      const stop = () => { clearTimeout(timer); reject(signal.reason); };
      const timer = setTimeout(() => {
        signal.removeEventListener("abort", stop);
        resolve(Response.json(body));
      }, said ? 0 : 1000 * query.wait);
      signal.addEventListener("abort", stop);
    });
  });
  return asked;
}

test("a copy that has more to read is behind, goes on reading at once, and after a loss from there", async () => {
  const says = (n, more = true) => ({ messages: [insert({ id: n }, `e-${n}`)], position: `e-${n}0`, more });
  const lost = new TypeError("lost");
  const asked = serveLongPoll([], [{ ...says(1, false), complete_until: time() }, lost, says(2), lost, says(3)]);
  start({ transports: ["longpoll"] });
  const live = bridge.live("posts", { load: async () => [] });
  const told = [];
  bridge.on("status", (status) => told.push(`${status} ${live.position}`));
  for (let i = 0; i < 20; i++) await pass(100);
  assert.deepEqual(told, [
    "behind null", "connecting e-10", "behind e-10", "connecting e-20", "behind e-20", "live e-4",
  ]);
  const positions = asked.filter(({ table }) => table).map(({ position }) => position);
  assert.deepEqual(positions.slice(0, 7), [undefined, "e-10", "e-10", "e-20", "e-20", "e-30", "e-4"]);
});

test("a subscription that the bridge cannot begin just now is begun on another connection", async () => {
  start().live("posts", { load: async () => [] });
  const socket = await accept({ current: false });
  socket.say({ type: "error", id: "1", code: 1013, detail: "overloaded" });
  assert.ok(socket.closed);
  await pass(300);
  assert.equal((await accept()).said("subscribe")[0].position, "e-1");
  assert.equal(bridge.status, "live");
});

test("a network that comes back is met with a connection at once", async () => {
  const listeners = {};
  globalThis.addEventListener = (name, listener) => { listeners[name] = listener; };
  random.mock.mockImplementation(() => 0.999);
  start();
  for (let i = 0; i < 6; i++) {
    await pass();
    FakeSocket.last.end(1013);
    if (i < 5) await pass(500 * 2 ** i);
  }
  assert.equal(FakeSocket.all.length, 6);
  await pass(5000); // of 16 seconds
  assert.equal(FakeSocket.all.length, 6);
  listeners.online();
  await pass();
  assert.equal(FakeSocket.all.length, 7);
  delete globalThis.addEventListener;
});

test("after two failures in a row the next transport has its turn, and later the best again", async () => {
  const asked = serveLongPoll();
  start({ transports: ["websocket", "sse", "longpoll"] });
  const live = bridge.live("posts", { load: async () => [], filter: "id=eq.1" });
  for (let i = 0; i < 20 && !bridge.transport; i++) {
    await pass(500);
    if (!FakeSocket.last.closed) FakeSocket.last.end(1006);
  }
  assert.equal(bridge.transport, "longpoll");
  assert.equal(FakeSocket.all.length, 2);
  await pass(1000);
  await pass(1000);
  assert.equal(bridge.status, "live");
  assert.equal(live.position, "e-4");
  assert.ok(asked.every(({ authorization }) => authorization.startsWith("Bearer token-")));
  await pass(56_000);
  assert.equal(FakeSocket.all.length, 2);
  await pass(8_000);
  assert.equal(FakeSocket.all.length, 3);
  FakeSocket.last.end(1006);
  assert.equal(bridge.status, "live", "it is kept while the better ones are tried");
  const before = Date.now();
  while (FakeSocket.all.length === 3) await pass(1000);
  const seconds = (Date.now() - before) / 1000; // in which it was the other one's turn, too
  assert.ok(seconds > 120 + 240 && seconds < 120 + 240 + 15, `${seconds} s`);
  const socket = await accept();
  assert.equal(bridge.transport, "websocket");
  const [{ filter, position }] = socket.said("subscribe");
  assert.deepEqual([filter, position], ["id=eq.1", "e-4"]);
  assert.equal(bridge.status, "live");
});

test("more copies than connections take turns", async () => {
  const asked = serveLongPoll();
  start({ transports: ["longpoll"] });
  const load = async () => [];
  const lives = Array.from({ length: 9 }, (_, i) => bridge.live("posts", { load, filter: `id=eq.${i}` }));
  await pass(20_000);
  assert.ok(lives.every(({ loaded }) => loaded));
  assert.equal(bridge.status, "live");
  assert.ok(asked.filter(({ filter, wait }) => filter === "id=eq.8" && wait === "1").length >= 2);
  const firsts = asked.filter(({ filter }) => filter === "id=eq.0").map(({ wait }) => wait);
  assert.deepEqual([...new Set(firsts)], ["0", "25"]);
});

test("what a proxy answers in the bridge's place is no refusal of the bridge", async () => {
  let type = "text/html";
  const body = JSON.stringify({ status: 403, detail: "origin not allowed" });
  mock.method(globalThis, "fetch", async () => new Response(body, { status: 403, headers: { "Content-Type": type } }));
  start({ transports: ["longpoll"] });
  await pass(2000);
  assert.equal(bridge.status, "offline");
  assert.deepEqual(bridge.error, { code: 1006, detail: "HTTP 403 text/html, which no bridge says" });
  type = "application/problem+json";
  await pass(30_000);
  assert.equal(bridge.status, "unauthorized");
  assert.deepEqual(bridge.error, { code: 4403, detail: "origin not allowed" });
});

/** Plays `/events` as streams, which the test writes: `told` is what each request asked for. */
function serveStreams() {
  const streams = [];
  mock.method(globalThis, "fetch", async (url, { headers, signal }) => {
    if (headers.Accept !== "text/event-stream") {
      const position = url.searchParams.get("position") ?? "e-1";
      return Response.json({ messages: [], position, more: false, complete_until: time() });
    }
    const stream = { told: Object.fromEntries(url.searchParams), aborted: signal };
    const body = new ReadableStream({ start: (controller) => void (stream.controller = controller) });
    stream.write = (text) => stream.controller.enqueue(new TextEncoder().encode(text));
    stream.say = (message) => stream.write(`id: ${message.position}\ndata: ${JSON.stringify(message)}\n\n`);
    signal.addEventListener("abort", () => stream.controller.error(signal.reason));
    streams.push(stream);
    return new Response(body, { headers: { "Content-Type": "text/event-stream; charset=utf-8" } });
  });
  return streams;
}

test("events are read out of pieces of any size, whatever characters their data has", async () => {
  const title = "é\u2028\u2029\\n\n\ndata: x";
  const event = (n) => `id: e-${n}\ndata: ${JSON.stringify(insert({ id: n, title }, `e-${n}`))}\n\n`;
  const bytes = new TextEncoder().encode([2, 3, 4].map(event).join(":\n\n"));
  for (const size of [1, 2, 3, 7, bytes.length]) {
    const streams = serveStreams();
    const live = start({ transports: ["sse"] }).live("posts", { load: async () => [] });
    await pass();
    streams[0].say({ type: "ready", position: "e-1", complete_until: time(), ping_seconds: 25 });
    await pass();
    for (let i = 0; i < bytes.length; i += size) streams[1].controller.enqueue(bytes.slice(i, i + size));
    await pass(1);
    assert.deepEqual(titles(live), [title, title, title], `pieces of ${size}`);
    assert.equal(live.position, "e-4");
    bridge.close();
  }
});

test("a stream that ends is begun anew when its last words say so, from where it was", async () => {
  const streams = serveStreams();
  start({ transports: ["sse"] }).live("posts", { load: async () => [] });
  const ready = { type: "ready", position: "e-1", complete_until: time(), ping_seconds: 25 };
  await pass();
  streams[0].write("retry: 2000\n\n");
  streams[0].say(ready);
  await pass();
  streams[1].say(insert({ id: 1 }, "e-7"));
  await pass();
  streams[0].write("retry: 4000\n\n");
  streams[0].controller.close();
  await pass(3900);
  assert.equal(streams.length, 2);
  assert.ok(streams[1].aborted.aborted);
  await pass(200);
  assert.equal(streams.length, 3);
  streams[2].say(ready);
  await pass();
  assert.equal(streams[3].told.position, "e-7");
});

test("folding again from any point on leads to the same copy", () => {
  mock.restoreAll();
  const keyOf = ({ id }) => id;
  for (let round = 0; round < 300; round++) {
    const table = new Map(), history = [], images = [new Map()];
    for (let i = 0; i < 12; i++) {
      const id = 1 + Math.floor(Math.random() * 4), row = table.get(id);
      if (!row) table.set(id, { id, n: i, large: `L${i}` });
      else if (Math.random() < 0.3) table.delete(id);
      else {
        const to = table.has(id + 4) || Math.random() < 0.5 ? id : id + 4;
        table.delete(id);
        table.set(to, { ...row, id: to, n: i });
        history.push({ type: "UPDATE", record: { id: to, n: i }, old_record: { id } }); // the large value is absent
        images.push(new Map(table));
        continue;
      }
      history.push(row ? { type: "DELETE", old_record: { id } } : { type: "INSERT", record: table.get(id) });
      images.push(new Map(table));
    }
    for (let image = 0; image < images.length; image++) {
      for (let from = 0; from <= image; from++) {
        const rows = new Map(images[image]);
        for (const change of history.slice(from)) fold(rows, change, keyOf);
        const story = JSON.stringify({ history, image, from });
        assert.deepEqual(new Map([...rows].sort()), new Map([...table].sort()), story);
      }
    }
  }
});

/** The names that an interface of client.d.ts declares. */
function declared(types, name) {
  const [, body] = new RegExp(`^export interface ${name}\\b.*?\\{\\n(.*?)^\\}`, "ms").exec(types);
  const members = body.replace(/\/\*.*?\*\//gs, "").matchAll(/^  (?:readonly )?(\w+)[?(<:]/gm);
  return [...new Set([...members].map(([, member]) => member))].sort();
}

/** The names that an object offers, its classes' too: those without an underscore. */
function offered(object) {
  const names = new Set();
  for (let it = object; it !== Object.prototype; it = Object.getPrototypeOf(it)) {
    for (const name of Object.getOwnPropertyNames(it)) if (!name.startsWith("_")) names.add(name);
  }
  names.delete("constructor");
  return [...names].sort();
}

test("client.d.ts declares what there is and nothing else", async () => {
  const types = await readFile(new URL("../../../realtime_bridge/static/client.d.ts", import.meta.url), "utf8");
  const exported = [...types.matchAll(/^export (?:function|class|const) (\w+)/gm)].map(([, name]) => name);
  assert.deepEqual(exported.sort(), Object.keys(client).sort());
  assert.deepEqual(declared(types, "Bridge"), offered(start()));
  assert.deepEqual(declared(types, "Live"), offered(bridge.live("posts", { load: async () => [] })));
});
