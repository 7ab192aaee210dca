/**
 * The browser client of realtime_bridge: live copies of tables, over WebSocket, Server-Sent Events or long poll.
 *
 *     const bridge = connect({ url: "/", token: async () => freshToken });
 *     const posts = bridge.live("public.posts", { load: async () => rows });
 *     posts.on("change", ({ rows }) => draw(rows.values()));
 *
 * Who does what: a `Live` is one folded copy, and the place in the history up to which it has taken everything in. A
 * `Link` carries copies over one transport and knows nothing of what they are brought. The `Bridge` has one link at a
 * time, makes the next when that is lost, and lets each copy go on from its own position. docs/protocol.md is what is
 * spoken; client.d.ts describes what is exported.
 *
 * No token is ever part of an address: it is a WebSocket's first message, and a header of every request. Streams are
 * read with `fetch` and not with `EventSource`, which can send no header, hides why it was refused, and comes back
 * with what it was made with, while here every connection begins with a fresh token and a copy's own position.
 *
 * @module
 */

const BACKOFF_MS = 500; // the first wait is random below this, the next below twice as much, …
const MOST_BACKOFF_MS = 30_000;
const STABLE_MS = 10_000; // a link that lived so long makes the next wait start small again
const ANSWER_MS = 5_000; // for a sign of life that was asked for
const OPEN_MS = 10_000; // from asking for a token to the first message
const TICK_MS = 5_000;
const LATE_MS = 10_000; // a ping may be
const STANDSTILL_MS = 30_000; // `completeUntil` may be, or until a ping is late
const UPGRADE_MS = 60_000; // on a fallback: until the better transports are tried again, doubled with every failure
const MOST_UPGRADE_MS = 600_000;
const LOAD_MS = 60_000;
const RENEW_MS = 5_000; // between two calls of `token` for one connection
const OWN_CONNECTIONS = 4; // of the six that browsers open to a host; one more is shared, and one left for the page
const POLL_SECONDS = 25;

const NEVER_AGAIN = new Set([1007, 1009, 4400, 4413]); // besides 4403
const ANSWERED = new Set([1001, 1011, 1012, 1013]); // and all above 4000: the transport works, the bridge says no
const OF_LINK = new Set([4401, 4408, 4429]); // what else an HTTP request is refused for has to do with one copy

/**
 * Connect to a bridge. Returns at once; `bridge.status` and `bridge.on("status", f)` tell how it goes.
 * @type {typeof import("./client.js").connect}
 */
export function connect(options) {
  return new Bridge(options);
}

/**
 * Apply one change to a copy of a table. Repeating changes from any point on leads to the same copy.
 * @type {typeof import("./client.js").fold}
 */
export function fold(rows, change, keyOf) {
  const { type, record, old_record: before } = change;
  if (type === "DELETE") return void rows.delete(keyOf(before));
  const key = keyOf(record);
  if (type === "INSERT") return void rows.set(key, record);
  const oldKey = before ? keyOf(before) : key;
  // A repeated change of key meets the row where it has long been; `before` may know large values that did not change.
  rows.set(key, { ...(rows.get(key) ?? rows.get(oldKey)), ...before, ...record });
  if (oldKey !== key) rows.delete(oldKey);
}

class Emitter {
  #listeners = new Map();

  on(name, listener) {
    const listeners = this.#listeners.get(name) ?? new Set();
    this.#listeners.set(name, listeners.add(listener));
    return () => void listeners.delete(listener);
  }

  /** A listener that throws is reported like any uncaught error of a page, and disturbs nobody else. */
  _emit(name, value) {
    for (const listener of [...(this.#listeners.get(name) ?? [])]) {
      try {
        listener(value);
      } catch (error) {
        (globalThis.reportError ?? console.error)(error);
      }
    }
  }
}

/**
 * A folded copy of what one user sees of a table, or of the part of it that a filter selects.
 *
 * Links call the methods that begin with `_`; the owner has `changed()` and `closed(live)`.
 */
class Live extends Emitter {
  rows = new Map();
  loaded = false; // once
  stale = true; // until the next load is done
  position = null; // everything up to it was taken in
  _settled = false; // whether the link of now has brought everything there was; set back with every new link
  #refused = false;
  #owner; #load; #keyOf; #timer; #loading; #buffer;

  constructor(table, { filter, key = "id", load }, owner) {
    super();
    this.table = table;
    this.filter = filter || null;
    this.#owner = owner;
    this.#load = load;
    this.#keyOf = Array.isArray(key) ? (row) => JSON.stringify(key.map((column) => row[column])) : (row) => row[key];
  }

  close() {
    this.#stopLoading();
    this.#owner.closed(this);
  }

  get _isCurrent() { return this.#refused || (this._settled && !this.stale); }

  /** It is being sent. One that resumes keeps its own position: a `resync` may be on its way. */
  _started(position) {
    this.#refused = false;
    if (this.position !== null) return;
    this.position = position;
    this.#reload(0);
  }

  _take(message) {
    this.position = message.position;
    if (message.type === "resync") {
      this.#reload(message.after_ms ?? 0);
      return this.#owner.changed();
    }
    this.#buffer?.push(message);
    if (!this.loaded) return;
    fold(this.rows, message, this.#keyOf);
    this._emit("change", { rows: this.rows, change: message });
  }

  /** Everything up to a position was brought. */
  _reached(position) {
    this.position = position;
    this._settled = true;
    this.#owner.changed();
  }

  /** Returns whether to ask once more: without the position, if that may be what the bridge did not understand. */
  _refuse(code, detail) {
    if (code === 4400 && this.position !== null) {
      this.position = null;
      return true;
    }
    this.#refused = true;
    this._emit("error", { code, detail });
    this.#owner.changed();
    return false;
  }

  /** Read the table (again). What was loaded before stays, and stays live, until then. */
  #reload(afterMs, failures = 0) {
    this.#stopLoading();
    this.stale = true;
    this.#timer = setTimeout(() => this.#read(failures), afterMs);
  }

  #stopLoading() {
    clearTimeout(this.#timer);
    this.#loading?.abort();
    this.#loading = this.#buffer = undefined;
  }

  /** Everything up to the position of this moment is in the answer; what comes from now on is applied on top. */
  async #read(failures) {
    const loading = (this.#loading = new AbortController());
    const buffer = (this.#buffer = []);
    const failed = (error) => {
      if (this.#loading !== loading) return;
      this.#reload(backoff(failures), failures + 1);
      this._emit("error", { error, detail: `load: ${error?.message ?? error}` });
    };
    this.#timer = setTimeout(() => failed(new Error(`no answer in ${LOAD_MS} ms`)), LOAD_MS);
    try {
      const rows = await this.#load({ signal: loading.signal });
      if (this.#loading === loading) this.#replace(rows, buffer);
    } catch (error) {
      failed(error);
    }
  }

  #replace(rows, changes) {
    const loaded = new Map(Array.from(rows, (row) => [this.#keyOf(row), row]));
    for (const change of changes) fold(loaded, change, this.#keyOf);
    this.#stopLoading();
    this.rows.clear();
    for (const [key, row] of loaded) this.rows.set(key, row);
    this.loaded = true;
    this.stale = false;
    this._emit("change", { rows: this.rows, change: null });
    this.#owner.changed();
  }
}

/** Why a link ended, or a request was refused. `code` is a close code: 4000 and the HTTP status that says the same. */
class Loss extends Error {
  static of(error) {
    return error instanceof Loss ? error : new Loss(1006, String(error?.message ?? error));
  }

  constructor(code, reason = "", retryMs = undefined) {
    super(reason);
    this.code = code;
    const told = /retry in (\d+) ms/.exec(reason);
    this.retryMs = told ? Number(told[1]) : retryMs;
  }
}

/**
 * One way to the bridge, from `open` to `close` or to the one `host.lost`. After `host.ready` it carries copies.
 * Links implement `_open`, `_ask`, `_end`, `follow`, `drop`, `authenticate`.
 */
class Link {
  heardAt = Date.now();
  readyAt = null; // set by the host
  closed = false;
  token = null;
  #deadline;

  /** The host is made in `Bridge.#open`. */
  constructor(host) {
    this.host = host;
  }

  async open() {
    this.#expect(OPEN_MS);
    try {
      this.token = await this.host.token();
      if (!this.closed) this._open();
    } catch (error) {
      this.lost(Loss.of(error));
    }
  }

  heard() {
    this.heardAt = Date.now();
    clearTimeout(this.#deadline);
    this.#deadline = undefined;
  }

  /** Make sure that the other side is still there. */
  probe() {
    this.#expect(ANSWER_MS);
    this._ask();
  }

  /** Ask for a newer `completeUntil`, where that is possible without breaking anything off. */
  enquire() {}

  lost(loss) {
    if (this.closed) return;
    this.close();
    this.host.lost(this, loss);
  }

  close() {
    if (this.closed) return;
    this.closed = true;
    clearTimeout(this.#deadline);
    this._end();
  }

  #expect(ms) {
    this.#deadline ??= setTimeout(() => this.lost(new Loss(1006, `nothing heard in ${ms} ms`)), ms);
  }
}

/** One WebSocket that subscribes to nothing by its address; every copy is a subscription by message. */
class WebSocketLink extends Link {
  static transport = "websocket";
  #socket; #subscriptions = new Map(); #number = 0; #again; #againMs;

  _open() {
    const url = new URL("ws?table=", this.host.url);
    url.protocol = url.protocol.replace("http", "ws");
    const socket = (this.#socket = new this.host.WebSocket(url.href));
    socket.onopen = () => this.#send({ type: "auth", token: this.token });
    socket.onmessage = ({ data }) => {
      if (this.closed) return;
      this.heard();
      this.#take(JSON.parse(data));
    };
    socket.onclose = ({ code, reason }) => this.lost(new Loss(code, reason));
  }

  _ask() { this.#send({ type: "ping" }); }

  _end() {
    clearTimeout(this.#again);
    this.#socket?.close();
  }

  enquire() { this._ask(); }

  authenticate(token) {
    this.token = token;
    this.#send({ type: "auth", token });
  }

  follow(live) {
    const id = String(++this.#number);
    this.#subscriptions.set(id, { live, stands: false });
    const { table, filter, position } = live;
    this.#send({ type: "subscribe", id, table, filter: filter ?? undefined, position: position ?? undefined });
    this.#againMs = 50;
    this.#askIn(0); // its pong tells whether everything was sent
  }

  drop(live) {
    for (const [id, subscription] of this.#subscriptions) {
      if (subscription.live !== live) continue;
      this.#subscriptions.delete(id);
      this.#send({ type: "unsubscribe", id });
    }
  }

  #send(message) {
    if (this.#socket?.readyState === 1) this.#socket.send(JSON.stringify(message));
  }

  #askIn(ms) {
    clearTimeout(this.#again);
    this.#again = setTimeout(() => this._ask(), ms);
  }

  #take(message) {
    const named = this.#subscriptions.get(message.id);
    switch (message.type) {
      case "ready": return this.host.ready(this, message);
      case "auth_expiring": return this.host.expiring(this);
      case "ping": case "pong": return this.#proven(message);
      case "error": return this.#refused(named, message);
      case "subscribed":
        if (!named) return;
        named.stands = true;
        return named.live._started(message.position);
    }
    for (const id of message.subscriptions ?? []) this.#subscriptions.get(id)?.live._take(message);
  }

  /** A ping comes, and a pong tells a time, only when every subscription was sent everything up to the position. */
  #proven({ type, position, complete_until: completeUntil }) {
    const subscriptions = [...this.#subscriptions.values()];
    if (type === "ping" || completeUntil) {
      for (const { live, stands } of subscriptions) if (stands) live._reached(position);
    }
    this.host.proven(completeUntil);
    if (type === "pong" && subscriptions.some(({ live }) => !live._settled)) {
      this.#askIn(this.#againMs);
      this.#againMs = Math.min(2 * this.#againMs, 2_000);
    }
  }

  #refused(subscription, { id, code, detail }) {
    if (!subscription) return this.host.error({ code, detail });
    this.#subscriptions.delete(id);
    if (code < 4000) this.lost(new Loss(code, detail)); // 1013: the bridge cannot just now
    else if (subscription.live._refuse(code, detail)) this.follow(subscription.live);
  }
}

/**
 * Requests to `/events`, one per copy, and one without a table that stands for the link itself (the copy `null`).
 * Copies beyond `OWN_CONNECTIONS` take turns on one connection, as short polls.
 */
class HttpLink extends Link {
  #requests = new Map(); #turn = Promise.resolve();

  _open() { this.follow(null); }

  /** There is nothing to say on a stream, so a new one is begun, from where the old one was. */
  _ask() { for (const live of [...this.#requests.keys()]) this.follow(live); }

  _end() { for (const { abort } of this.#requests.values()) abort.abort(); }

  authenticate(token) {
    this.token = token;
    this._ask();
  }

  /** (Again) read for a copy from its position until it is dropped. */
  follow(live) {
    this.#requests.get(live)?.abort.abort();
    const request = { abort: new AbortController(), heardAt: Date.now() };
    this.#requests.set(live, request); // one that was there keeps its place in the order
    this.#read(live, request).catch((error) => {
      if (!request.abort.signal.aborted) this.#failed(live, error);
    });
  }

  drop(live) {
    this.#requests.get(live)?.abort.abort();
    this.#requests.delete(live);
  }

  #failed(live, error) {
    const loss = Loss.of(error);
    const isOfCopy = live !== null && loss.code >= 4400 && loss.code < 4500 && !OF_LINK.has(loss.code);
    if (!isOfCopy) this.lost(loss);
    else if (live._refuse(loss.code, loss.message)) this.follow(live);
    else this.drop(live);
  }

  async #read(live, request) {
    const hasOwn = [...this.#requests.keys()].indexOf(live) < OWN_CONNECTIONS;
    const poll = hasOwn
      ? (seconds) => this.#poll(live, request, seconds)
      : (seconds) => this.#inTurn(() => this.#poll(live, request, Math.min(seconds, 1)));
    const streams = hasOwn && this._streams;
    if (live !== null || !streams) while (await poll(0)); // up to the end of the history
    if (streams) return this.#stream(live, request);
    for (;;) await poll(POLL_SECONDS);
  }

  async #inTurn(work) {
    const turn = this.#turn.then(work);
    this.#turn = turn.catch(() => {});
    return turn;
  }

  /** One long poll; whether there is more to read at once. */
  async #poll(live, request, wait) {
    const response = await this.#request(live, request, "application/json", { wait });
    const { messages, position, more, complete_until: completeUntil } = await response.json();
    const { signal } = request.abort;
    if (signal.aborted) return false;
    this.#heard(request);
    if (live === null) this.#isReady({ complete_until: completeUntil });
    else {
      live._started(position);
      for (const message of messages) {
        live._take(message);
        if (signal.aborted) return false; // a listener closed what this is for
      }
      if (more) live.position = position;
      else live._reached(position);
    }
    this.host.proven(completeUntil);
    return more;
  }

  /** One stream, until it ends, which is a `Loss`. */
  async #stream(live, request) {
    const response = await this.#request(live, request, "text/event-stream", {});
    let refusal, retry;
    for await (const event of eventsOf(response.body)) {
      if (request.abort.signal.aborted) return;
      this.#heard(request);
      retry = /^retry: (\d+)/.exec(event)?.[1]; // counts if the stream ends with it
      const data = /^data: (.*)/ms.exec(event)?.[1];
      if (!data) continue;
      const message = JSON.parse(data);
      if (message.type === "error") refusal = new Loss(message.code, message.detail);
      else this.#take(live, message);
    }
    throw refusal ?? new Loss(1012, "the stream has ended", retry && Number(retry));
  }

  #take(live, message) {
    switch (message.type) {
      case "ready": return live === null ? this.#isReady(message) : live._started(message.position);
      case "auth_expiring": return live === null && this.host.expiring(this);
      case "ping":
        live?._reached(message.position);
        return this.host.proven(message.complete_until);
      default: live?._take(message);
    }
  }

  #isReady(message) {
    if (this.readyAt === null) this.host.ready(this, message);
  }

  /** The link has been heard when the one of its requests was that has been silent for longest. */
  #heard(request) {
    this.heard();
    request.heardAt = Date.now();
    this.heardAt = Math.min(...[...this.#requests.values()].map(({ heardAt }) => heardAt));
  }

  async #request(live, { abort: { signal } }, accept, query) {
    const url = new URL("events", this.host.url);
    const given = { table: live?.table ?? "", filter: live?.filter, position: live?.position, ...query };
    for (const [name, value] of Object.entries(given)) if (value != null) url.searchParams.set(name, value);
    const headers = { Accept: accept, Authorization: `Bearer ${this.token}` };
    const response = await fetch(url, { headers, signal, cache: "no-store" });
    const type = response.headers.get("Content-Type") ?? "";
    if (response.ok && type.startsWith(accept)) return response;
    if (!type.startsWith("application/problem+json")) {
      await response.body?.cancel();
      throw new Loss(1006, `HTTP ${response.status} ${type}, which no bridge says`);
    }
    const { status, detail } = await response.json();
    const seconds = Number(response.headers.get("Retry-After"));
    throw new Loss(status === 503 ? 1013 : 4000 + status, detail, seconds > 0 ? seconds * 1000 : undefined);
  }
}

/** Server-Sent Events as the bridge writes them: an empty line ends each, and its data is the last line, of JSON. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    yield* events;
  }
}

class SseLink extends HttpLink {
  static transport = "sse";
  _streams = true;
}

class LongPollLink extends HttpLink {
  static transport = "longpoll";
  _streams = false;
}

const LINKS = Object.fromEntries([WebSocketLink, SseLink, LongPollLink].map((link) => [link.transport, link]));

/** Random below a limit that doubles with every failure ("full jitter"). */
function backoff(failures) {
  return Math.random() * Math.min(MOST_BACKOFF_MS, BACKOFF_MS * 2 ** failures);
}

class Bridge extends Emitter {
  status = "connecting";
  completeUntil = null;
  error = null; // why there is no link
  #url; #token; #WebSocket; #links; #lives = new Set();
  #link = null; #candidate = null; #index = 0; #bestIndex = Infinity; #upgrades = 0;
  #failures = 0; // of this transport, in a row
  #attempts = 0; // since a link was stable
  #refusals = 0; // of a token, in a row
  #isDown = false; // an attempt has failed since the last link
  #gaveUp = null; // the status that says so
  #pingMs = 1000 * POLL_SECONDS; #provenAt = Date.now(); #upgradeAt = 0; #upgradeMs = UPGRADE_MS; #renewedAt = 0;
  #retry; #renewal; #ticker; #unlisten = new AbortController();

  constructor({ url = "/", token, transports = ["websocket", "sse", "longpoll"], WebSocket = globalThis.WebSocket }) {
    super();
    this.#url = new URL(url, globalThis.location?.href);
    this.#url.protocol = this.#url.protocol.replace("ws", "http");
    if (!this.#url.pathname.endsWith("/")) this.#url.pathname += "/";
    this.#token = token;
    this.#WebSocket = WebSocket;
    this.#links = transports.filter((name) => WebSocket || name !== "websocket").map((name) => LINKS[name]);
    if (this.#links.length === 0 || this.#links.includes(undefined)) {
      throw new TypeError("transports: websocket, sse, longpoll");
    }
    this.#listen();
    this.#ticker = setInterval(() => this.#tick(), TICK_MS);
    this.#connect();
  }

  get transport() { return this.#link?.readyAt ? this.#link.constructor.transport : null; }

  live(table, options) {
    if (this.#unlisten.signal.aborted) throw new Error("this bridge was closed");
    if (typeof options?.load !== "function") throw new TypeError("load: a function that reads the rows");
    const live = new Live(table.includes(".") ? table : `public.${table}`, options, {
      changed: () => this.#refresh(),
      closed: (it) => this.#forget(it),
    });
    this.#lives.add(live);
    if (this.transport) this.#link.follow(live);
    this.#refresh();
    return live;
  }

  reconnect() {
    if (this.#unlisten.signal.aborted) return;
    this.#gaveUp = null;
    this.#isDown = false;
    this.#attempts = this.#failures = this.#refusals = this.#index = 0;
    this.#connect();
    this.#refresh();
  }

  close() {
    this.#unlisten.abort();
    clearInterval(this.#ticker);
    this.#giveUp("offline");
    for (const live of [...this.#lives]) live.close();
  }

  // -- links ---------------------------------------------------------------------------------------------------------

  #connect() {
    clearTimeout(this.#retry);
    this.#link?.close();
    this.#unsettle();
    this.#link = this.#open(this.#index);
  }

  #open(index) {
    const link = new this.#links[index]({
      url: this.#url,
      WebSocket: this.#WebSocket,
      token: () => this.#freshToken(),
      ready: (it, message) => this.#ready(it, message),
      proven: (completeUntil) => this.#proven(completeUntil),
      expiring: (it) => this.#renew(it),
      error: (error) => this._emit("error", error),
      lost: (it, loss) => this.#lost(it, loss),
    });
    link.open();
    return link;
  }

  #ready(link, message) {
    if (link === this.#candidate) {
      this.#link?.close();
      this.#unsettle();
      this.#link = link;
      this.#index = this.#links.indexOf(link.constructor);
      this.#candidate = null;
      clearTimeout(this.#retry);
    }
    link.readyAt = Date.now();
    this.#failures = this.#refusals = 0;
    this.#isDown = false;
    this.error = null;
    this.#bestIndex = Math.min(this.#bestIndex, this.#index);
    this.#upgradeMs = UPGRADE_MS;
    // A better transport that has worked here before was only out of reach for a moment.
    this.#upgradeAt = link.readyAt + (this.#bestIndex < this.#index ? TICK_MS : UPGRADE_MS);
    this.#pingMs = 1000 * (message.ping_seconds ?? POLL_SECONDS);
    this.#proven(message.complete_until);
    for (const live of this.#lives) link.follow(live);
    this.#refresh();
  }

  #lost(link, loss) {
    if (link === this.#candidate) {
      this.#candidate = null;
      this.#upgradeMs = Math.min(2 * this.#upgradeMs, MOST_UPGRADE_MS);
      this.#upgradeAt = Date.now() + this.#upgradeMs;
      return;
    }
    this.#link = null;
    this.#unsettle();
    this.error = { code: loss.code, detail: loss.message };
    const isRefused = loss.code === 4403 || (loss.code === 4401 && ++this.#refusals === 2);
    if (isRefused || NEVER_AGAIN.has(loss.code)) {
      this.#giveUp(isRefused ? "unauthorized" : "offline");
      return this._emit("error", this.error);
    }
    if (link.readyAt === null) this.#countFailure(loss);
    else if (Date.now() - link.readyAt > STABLE_MS) this.#attempts = 0;
    this.#retry = setTimeout(() => this.#connect(), loss.retryMs ?? backoff(this.#attempts++));
    this.#refresh();
  }

  #countFailure({ code }) {
    this.#isDown = true;
    if (code >= 4000 || ANSWERED.has(code) || ++this.#failures < 2) return;
    this.#failures = 0;
    this.#index = (this.#index + 1) % this.#links.length;
  }

  #giveUp(status) {
    for (const timer of [this.#retry, this.#renewal]) clearTimeout(timer);
    for (const link of [this.#link, this.#candidate]) link?.close();
    this.#link = this.#candidate = null;
    this.#gaveUp = status;
    this.#unsettle();
    this.#refresh();
  }

  // -- copies --------------------------------------------------------------------------------------------------------

  #unsettle() {
    for (const live of this.#lives) live._settled = false;
  }

  #forget(live) {
    this.#lives.delete(live);
    if (this.transport) this.#link.drop(live);
    this.#refresh();
  }

  // -- tokens --------------------------------------------------------------------------------------------------------

  /** Nobody signed in counts as a refusal that nothing but `reconnect` mends; an error may pass. */
  async #freshToken() {
    let token;
    try {
      token = await this.#token();
    } catch (error) {
      throw new Loss(1013, `token: ${error?.message ?? error}`);
    }
    if (token) return token;
    this.#refusals = 1;
    throw new Loss(4401, "there is no token");
  }

  /** A token ends soon. An app that hands out the old one is asked again, until the bridge closes. */
  #renew(link) {
    clearTimeout(this.#renewal);
    this.#renewal = setTimeout(async () => {
      this.#renewedAt = Date.now();
      const token = await Promise.resolve().then(this.#token).catch(() => null);
      if (link.closed) return;
      if (token && token !== link.token) link.authenticate(token);
      else this.#renew(link);
    }, Math.max(0, this.#renewedAt + RENEW_MS - Date.now()));
  }

  // -- time ----------------------------------------------------------------------------------------------------------

  #proven(completeUntil) {
    if (!completeUntil || Date.parse(completeUntil) <= Date.parse(this.completeUntil ?? 0)) return;
    this.completeUntil = completeUntil;
    this.#provenAt = Date.now();
    this.#refresh();
  }

  #tick() {
    if (this.transport) this.#lookAfter(this.#link, Date.now());
    this.#refresh();
  }

  #lookAfter(link, now) {
    if (now - link.heardAt > this.#pingMs + LATE_MS) link.probe();
    else if (now - this.#provenAt > this.#pingMs) link.enquire();
    if (this.#index > 0 && !this.#candidate && now >= this.#upgradeAt) {
      this.#candidate = this.#open(this.#upgrades++ % this.#index);
    }
  }

  /** The page or the network is back: go on at once. */
  #wake() {
    if (this.#gaveUp) return;
    if (this.transport) this.#link.probe();
    else if (!this.#link) {
      this.#attempts = 0;
      this.#connect();
    }
  }

  #listen() {
    const listen = (target, names, act) => {
      for (const name of names) target?.addEventListener?.(name, act, { signal: this.#unlisten.signal });
    };
    listen(globalThis, ["online", "pageshow"], () => this.#wake());
    listen(globalThis, ["offline"], () => this.transport && this.#link.probe());
    listen(globalThis.document, ["visibilitychange"], () => document.visibilityState === "visible" && this.#wake());
  }

  #refresh() {
    const status = this.#gaveUp ?? (this.transport ? this.#reading() : this.#isDown ? "offline" : "connecting");
    if (status === this.status) return;
    this.status = status;
    this._emit("status", status);
  }

  #reading() {
    const standsStill = Date.now() - this.#provenAt > Math.max(STANDSTILL_MS, this.#pingMs + LATE_MS);
    const isCurrent = this.completeUntil && !standsStill && [...this.#lives].every((live) => live._isCurrent);
    return isCurrent ? "live" : "behind";
  }
}
