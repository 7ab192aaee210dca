/**
 * The browser client of realtime_bridge: live copies of tables, over WebSocket, Server-Sent Events or long poll.
 *
 *     const bridge = connect({ url: "/", token: async () => freshToken });
 *     const posts = bridge.live("public.posts", { load: async () => rows });
 *     posts.on("change", ({ rows }) => draw(rows.values()));
 *
 * Who does what: a `Live` is one folded copy. A `Feed` is what several copies of the same table and filter share: the
 * place in the history up to which everything was taken in. A `Link` carries feeds over one transport and knows nothing
 * of what they bring. The `Bridge` has one link at a time, makes the next when that is lost, and lets each feed go on
 * from its own position. docs/protocol.md is what is spoken; client.d.ts describes what is exported.
 *
 * @module
 */

const BACKOFF_MS = 500; // the first wait is random below this, the next below twice as much, …
const MOST_BACKOFF_MS = 30_000;
const STABLE_MS = 10_000; // a link that lived so long makes the next wait start small again
const ANSWER_MS = 5_000; // for a sign of life that was asked for
const OPEN_MS = 10_000; // from asking for a token to the first message
const TICK_MS = 5_000;
const STANDSTILL_MS = 30_000; // `completeUntil` may stand still so long, or a ping's time and ten seconds if that is more
const UPGRADE_MS = 60_000; // on a fallback: until the better transports are tried again, doubled with every failure
const MOST_UPGRADE_MS = 600_000;
const LOAD_MS = 60_000;
const RENEW_MS = 5_000; // between two calls of `token` for one connection
const OWN_CONNECTIONS = 4; // of the six that HTTP/1.1 browsers open to a host; one more is shared, one left for the page
const POLL_SECONDS = 25;

const NEVER_AGAIN = new Set([1007, 1009, 4400, 4403, 4413]);
const ANSWERED = new Set([1001, 1011, 1012, 1013]); // with those above 4000: the transport works, it is the bridge that says no

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
  emit(name, value) {
    for (const listener of [...(this.#listeners.get(name) ?? [])]) {
      try {
        listener(value);
      } catch (error) {
        (globalThis.reportError ?? console.error)(error);
      }
    }
  }
}

/** A folded copy of what one user sees of a table. */
class Live extends Emitter {
  rows = new Map();
  loaded = false; // once
  stale = true; // until the next load is done
  #feed; #load; #keyOf; #timer; #loading; #buffer;

  constructor(feed, { key = "id", load }) {
    super();
    this.#feed = feed;
    this.#load = load;
    this.#keyOf = Array.isArray(key) ? (row) => JSON.stringify(key.map((column) => row[column])) : (row) => row[key];
  }

  get position() { return this.#feed.position; }

  close() {
    this.#stopLoading();
    this.#feed.leave(this);
  }

  /** Read the table (again). What was loaded before stays, and stays live, until then. */
  reload(afterMs, failures = 0) {
    this.#stopLoading();
    this.stale = true;
    this.#timer = setTimeout(() => this.#read(failures), afterMs);
  }

  take(change) {
    this.#buffer?.push(change);
    if (!this.loaded) return;
    fold(this.rows, change, this.#keyOf);
    this.emit("change", { rows: this.rows, change });
  }

  #stopLoading() {
    clearTimeout(this.#timer);
    this.#loading?.abort();
    this.#loading = this.#buffer = undefined;
  }

  /** What the feed has brought before this moment is in the answer; what it brings from now on is applied on top. */
  async #read(failures) {
    const loading = (this.#loading = new AbortController());
    const buffer = (this.#buffer = []);
    const since = this.#feed.position;
    const failed = (error) => {
      if (this.#loading !== loading) return;
      this.reload(backoff(failures), failures + 1);
      this.emit("error", { error, detail: `load: ${error?.message ?? error}` });
    };
    this.#timer = setTimeout(() => failed(new Error(`no answer in ${LOAD_MS} ms`)), LOAD_MS);
    try {
      const answer = await this.#load({ signal: loading.signal });
      if (this.#loading === loading) this.#replace(answer, buffer, since);
    } catch (error) {
      failed(error);
    }
  }

  #replace(answer, buffer, since) {
    const rows = Symbol.iterator in answer ? answer : answer.rows;
    const position = answer.position ?? since;
    const loaded = Array.from(rows, (row) => [this.#keyOf(row), row]);
    this.#stopLoading();
    this.rows.clear();
    for (const [key, row] of loaded) this.rows.set(key, row);
    const isFollowed = position === since || position === this.#feed.position;
    if (isFollowed) for (const change of buffer) fold(this.rows, change, this.#keyOf);
    this.loaded = true;
    this.stale = false;
    if (!isFollowed) this.#feed.followFrom(position);
    this.emit("change", { rows: this.rows, change: null });
    this.#feed.changed();
  }
}

/**
 * A table and a filter, and the position up to which every copy has taken everything in.
 * @property settled whether the link of now has brought everything there was; set back with every new link
 * @property refused why the bridge will not send it, or null
 */
class Feed {
  position = null;
  settled = false;
  refused = null;
  #lives = new Set(); #owner;

  /** The owner has `changed()`, `refollow(feed)`, `forget(feed)`. */
  constructor(table, filter, owner) {
    this.table = table;
    this.filter = filter;
    this.#owner = owner;
  }

  get current() { return this.refused !== null || (this.settled && [...this.#lives].every((live) => !live.stale)); }

  join(live) {
    this.#lives.add(live);
    if (this.position !== null) live.reload(0);
  }

  close() {
    for (const live of this.#lives) live.close();
  }

  leave(live) {
    if (this.#lives.delete(live) && this.#lives.size === 0) this.#owner.forget(this);
  }

  changed() { this.#owner.changed(); }

  /** Read on from another place: one that rows came with. */
  followFrom(position) {
    this.position = position;
    this.#owner.refollow(this);
  }

  // What links tell.

  /** It is being sent. One that resumes keeps its own position: a `resync` may be on its way. */
  started(position) {
    this.refused = null;
    if (this.position !== null) return;
    this.position = position;
    for (const live of this.#lives) live.reload(0);
  }

  take(message) {
    this.position = message.position;
    for (const live of this.#lives) {
      if (message.type === "resync") live.reload(message.after_ms ?? 0);
      else live.take(message);
    }
    if (message.type === "resync") this.changed();
  }

  /** Everything up to a position was brought. */
  reached(position) {
    this.position = position;
    this.settled = true;
    this.changed();
  }

  /** Returns whether asking once more makes sense: without the position, if that was what the bridge did not understand. */
  refuse(code, detail) {
    if (code === 4400 && this.position !== null) {
      this.position = null;
      return true;
    }
    this.refused = detail;
    for (const live of this.#lives) live.emit("error", { code, detail });
    this.changed();
    return false;
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
 * One way to the bridge, from `open` to `close` or to the one `host.lost`. After `host.ready` it carries feeds.
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

/** One WebSocket that subscribes to nothing by its address; every feed is a subscription by message. */
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

  follow(feed) {
    const id = String(++this.#number);
    this.#subscriptions.set(id, { feed, stands: false });
    this.#send({
      type: "subscribe", id, table: feed.table, filter: feed.filter ?? undefined, position: feed.position ?? undefined,
    });
    this.#againMs = 50;
    this.#askIn(0); // its pong tells whether everything was sent
  }

  drop(feed) {
    for (const [id, subscription] of this.#subscriptions) {
      if (subscription.feed !== feed) continue;
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
        return named.feed.started(message.position);
    }
    for (const id of message.subscriptions ?? []) this.#subscriptions.get(id)?.feed.take(message);
  }

  /** A ping comes, and a pong tells a time, only when every subscription was sent everything up to the position. */
  #proven({ type, position, complete_until: completeUntil }) {
    const subscriptions = [...this.#subscriptions.values()];
    if (type === "ping" || completeUntil) {
      for (const { feed, stands } of subscriptions) if (stands) feed.reached(position);
    }
    this.host.proven(completeUntil, position);
    if (type === "pong" && subscriptions.some(({ feed }) => !feed.settled)) {
      this.#askIn(this.#againMs);
      this.#againMs = Math.min(2 * this.#againMs, 2_000);
    }
  }

  #refused(subscription, { id, code, detail }) {
    if (!subscription) return this.host.error({ code, detail });
    this.#subscriptions.delete(id);
    if (code < 4000) this.lost(new Loss(code, detail)); // 1013: the bridge cannot just now
    else if (subscription.feed.refuse(code, detail)) this.follow(subscription.feed);
  }
}

/**
 * Requests to `/events`, one per feed, and one without a table that stands for the link itself (the feed `null`).
 * Feeds beyond `OWN_CONNECTIONS` take turns on one connection, as short polls.
 */
class HttpLink extends Link {
  #requests = new Map(); #turn = Promise.resolve();

  _open() { this.follow(null); }

  /** There is nothing to say on a stream, so a new one is begun, from where the old one was. */
  _ask() { for (const feed of [...this.#requests.keys()]) this.follow(feed); }

  _end() { for (const { abort } of this.#requests.values()) abort.abort(); }

  authenticate(token) {
    this.token = token;
    this._ask();
  }

  /** (Again) read a feed from its position until it is dropped. */
  follow(feed) {
    this.#requests.get(feed)?.abort.abort();
    const request = { abort: new AbortController(), heardAt: Date.now() };
    this.#requests.set(feed, request); // one that was there keeps its place in the order
    this.#read(feed, request).catch((error) => {
      if (!request.abort.signal.aborted) this.#failed(feed, error);
    });
  }

  drop(feed) {
    this.#requests.get(feed)?.abort.abort();
    this.#requests.delete(feed);
  }

  #failed(feed, error) {
    const loss = Loss.of(error);
    const isFeeds = feed !== null && loss.code >= 4400 && loss.code < 4500 && ![4401, 4408, 4429].includes(loss.code);
    if (!isFeeds) this.lost(loss);
    else if (feed.refuse(loss.code, loss.message)) this.follow(feed);
    else this.drop(feed);
  }

  async #read(feed, request) {
    const hasOwn = [...this.#requests.keys()].indexOf(feed) < OWN_CONNECTIONS;
    const poll = hasOwn
      ? (seconds) => this.#poll(feed, request, seconds)
      : (seconds) => this.#inTurn(() => this.#poll(feed, request, Math.min(seconds, 1)));
    const streams = hasOwn && this._streams;
    if (feed !== null || !streams) while (await poll(0)); // up to the end of the history
    if (streams) return this.#stream(feed, request);
    for (;;) await poll(POLL_SECONDS);
  }

  async #inTurn(work) {
    const turn = this.#turn.then(work);
    this.#turn = turn.catch(() => {});
    return turn;
  }

  /** One long poll; whether there is more to read at once. */
  async #poll(feed, request, wait) {
    const response = await this.#request(feed, request, "application/json", { wait });
    const { messages, position, more, complete_until: completeUntil } = await response.json();
    const { signal } = request.abort;
    if (signal.aborted) return false;
    this.#heard(request);
    if (feed === null) this.#isReady({ position, complete_until: completeUntil });
    else {
      feed.started(position);
      for (const message of messages) {
        feed.take(message);
        if (signal.aborted) return false; // a listener closed what this is for
      }
      if (more) feed.position = position;
      else feed.reached(position);
    }
    this.host.proven(completeUntil, position);
    return more;
  }

  /** One stream, until it ends, which is a `Loss`. */
  async #stream(feed, request) {
    const response = await this.#request(feed, request, "text/event-stream", {});
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const events = new EventParser();
    let refusal = null;
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw refusal ?? new Loss(1012, "the stream has ended", events.retryMs);
      this.#heard(request);
      for (const data of events.push(value)) {
        if (request.abort.signal.aborted) return;
        const message = JSON.parse(data);
        if (message.type === "error") refusal = new Loss(message.code, message.detail);
        else this.#take(feed, message);
      }
    }
  }

  #take(feed, message) {
    if (message.type === "ready") feed === null ? this.#isReady(message) : feed.started(message.position);
    else if (message.type === "auth_expiring") feed === null && this.host.expiring(this);
    else if (message.type === "ping") {
      feed?.reached(message.position);
      this.host.proven(message.complete_until, message.position);
    } else feed?.take(message);
  }

  #isReady(message) {
    if (this.readyAt === null) this.host.ready(this, message);
  }

  #heard(request) {
    this.heard();
    request.heardAt = Date.now();
    this.heardAt = Math.min(...[...this.#requests.values()].map(({ heardAt }) => heardAt));
  }

  async #request(feed, { abort: { signal } }, accept, query) {
    const url = new URL("events", this.host.url);
    const given = { table: feed?.table ?? "", filter: feed?.filter, position: feed?.position, ...query };
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

class SseLink extends HttpLink {
  static transport = "sse";
  _streams = true;
}

class LongPollLink extends HttpLink {
  static transport = "longpoll";
  _streams = false;
}

/**
 * Server-Sent Events out of text in pieces of any size. `event:` and `id:` are not looked at: the JSON has both.
 * @type {typeof import("./client.js").EventParser}
 */
export class EventParser {
  /** What `retry:` said, if no event came after it: such a one is meant for now. */
  retryMs = undefined;
  #rest = ""; #data = [];

  /** The `data` of every event that is complete now. */
  push(text) {
    const events = [];
    // A carriage return at the very end may be half of a line's end.
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    for (const line of lines) {
      const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
      if (field === "data") this.#data.push(value);
      else if (field === "retry" && /^\d+$/.test(value)) this.retryMs = Number(value);
      else if (line === "" && this.#data.length > 0) {
        events.push(this.#data.join("\n"));
        this.#data = [];
        this.retryMs = undefined;
      }
    }
    return events;
  }
}

const LINKS = Object.fromEntries([WebSocketLink, SseLink, LongPollLink].map((link) => [link.transport, link]));

/** Random below a limit that doubles with every failure ("full jitter"). */
function backoff(failures) {
  return Math.random() * Math.min(MOST_BACKOFF_MS, BACKOFF_MS * 2 ** failures);
}

class Bridge extends Emitter {
  status = "connecting";
  position = null; // the newest that was heard: to show, not to resume from
  completeUntil = null;
  error = null; // why it gave up
  #url; #token; #WebSocket; #links; #feeds = new Map();
  #link = null; #candidate = null; #index = 0; #bestIndex = Infinity; #upgrades = 0;
  #failures = 0; // of this transport, in a row
  #attempts = 0; // since a link was stable
  #refusals = 0; // of a token, in a row
  #isDown = false; // an attempt has failed since the last link
  #gaveUp = null; // the status that says so
  #pingMs = 1000 * POLL_SECONDS; #provenAt = Date.now(); #upgradeAt = 0; #upgradeMs = UPGRADE_MS; #renewedAt = 0;
  #retry; #renewal; #ticker; #tickedAt = Date.now(); #unlisten = new AbortController();

  constructor({ url = "/", token, transports = ["websocket", "sse", "longpoll"], WebSocket = globalThis.WebSocket }) {
    super();
    this.#url = new URL(url, globalThis.location?.href);
    this.#url.protocol = this.#url.protocol.replace("ws", "http");
    if (!this.#url.pathname.endsWith("/")) this.#url.pathname += "/";
    this.#token = token;
    this.#WebSocket = WebSocket;
    this.#links = transports.filter((name) => WebSocket || name !== "websocket").map((name) => LINKS[name]);
    if (this.#links.length === 0 || this.#links.includes(undefined)) throw new TypeError("transports: websocket, sse, longpoll");
    this.#listen();
    this.#ticker = setInterval(() => this.#tick(), TICK_MS);
    this.#connect();
  }

  /** "websocket", "sse", "longpoll", or null while there is none. */
  get transport() { return this.#link?.readyAt ? this.#link.constructor.transport : null; }

  live(table, options) {
    if (this.#unlisten.signal.aborted) throw new Error("this bridge was closed");
    if (typeof options?.load !== "function") throw new TypeError("load: a function that reads the rows");
    const name = table.includes(".") ? table : `public.${table}`;
    const filter = options.filter || null;
    const feedKey = `${name} ${filter ?? ""}`;
    let feed = this.#feeds.get(feedKey);
    if (!feed) {
      feed = new Feed(name, filter, {
        changed: () => this.#refresh(),
        refollow: (it) => this.#refollow(it),
        forget: (it) => this.#forget(feedKey, it),
      });
      this.#feeds.set(feedKey, feed);
      if (this.transport) this.#link.follow(feed);
    }
    const live = new Live(feed, options);
    feed.join(live);
    this.#refresh();
    return live;
  }

  /** Try again now: after `unauthorized`, when somebody signed in again; or any time. */
  reconnect() {
    if (this.#unlisten.signal.aborted) return;
    this.#gaveUp = this.error = null;
    this.#isDown = false;
    this.#attempts = this.#failures = this.#refusals = this.#index = 0;
    this.#connect();
    this.#refresh();
  }

  close() {
    this.#unlisten.abort();
    clearInterval(this.#ticker);
    this.#giveUp("offline");
    for (const feed of [...this.#feeds.values()]) feed.close();
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
      proven: (completeUntil, position) => this.#proven(completeUntil, position),
      expiring: (it) => this.#renew(it),
      error: (error) => this.emit("error", error),
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
    this.#bestIndex = Math.min(this.#bestIndex, this.#index);
    this.#upgradeMs = UPGRADE_MS;
    // A better transport that has worked here before was only out of reach for a moment.
    this.#upgradeAt = link.readyAt + (this.#bestIndex < this.#index ? TICK_MS : UPGRADE_MS);
    this.#pingMs = 1000 * (message.ping_seconds ?? POLL_SECONDS);
    this.#proven(message.complete_until, message.position);
    for (const feed of this.#feeds.values()) link.follow(feed);
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
    if (NEVER_AGAIN.has(loss.code)) return this.#giveUp(loss.code === 4403 ? "unauthorized" : "offline", loss);
    if (loss.code === 4401 && ++this.#refusals === 2) return this.#giveUp("unauthorized", loss);
    if (link.readyAt === null) {
      this.#isDown = true;
      if (loss.code < 4000 && !ANSWERED.has(loss.code) && ++this.#failures === 2) this.#fallBack();
    } else if (Date.now() - link.readyAt > STABLE_MS) this.#attempts = 0;
    this.#retry = setTimeout(() => this.#connect(), loss.retryMs ?? backoff(this.#attempts++));
    this.#refresh();
  }

  #fallBack() {
    this.#failures = 0;
    this.#index = (this.#index + 1) % this.#links.length;
  }

  #giveUp(status, loss = null) {
    for (const timer of [this.#retry, this.#renewal]) clearTimeout(timer);
    for (const link of [this.#link, this.#candidate]) link?.close();
    this.#link = this.#candidate = null;
    this.#gaveUp = status;
    this.#unsettle();
    this.#refresh();
    if (loss === null) return;
    this.error = { code: loss.code, detail: loss.message };
    this.emit("error", this.error);
  }

  // -- feeds ---------------------------------------------------------------------------------------------------------

  #unsettle() {
    for (const feed of this.#feeds.values()) feed.settled = false;
  }

  #refollow(feed) {
    feed.settled = false;
    if (!this.transport) return;
    this.#link.drop(feed);
    this.#link.follow(feed);
  }

  #forget(feedKey, feed) {
    this.#feeds.delete(feedKey);
    if (this.transport) this.#link.drop(feed);
    this.#refresh();
  }

  // -- tokens --------------------------------------------------------------------------------------------------------

  /** Nobody signed in counts as a refusal that nothing but `reconnect` mends; an error may pass. */
  async #freshToken() {
    const token = await this.#token();
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

  #proven(completeUntil, position) {
    this.position = position;
    if (!completeUntil || Date.parse(completeUntil) <= Date.parse(this.completeUntil ?? 0)) return;
    this.completeUntil = completeUntil;
    this.#provenAt = Date.now();
    this.#refresh();
  }

  #tick() {
    const now = Date.now();
    const slept = now - this.#tickedAt > 3 * TICK_MS; // or the browser saves on the timers of a hidden page
    this.#tickedAt = now;
    if (!this.transport) slept && this.#wake();
    else if (now - this.#link.heardAt > this.#pingMs + (slept ? 0 : 10_000)) this.#link.probe();
    else if (now - this.#provenAt > this.#pingMs) this.#link.enquire();
    if (this.transport && this.#index > 0 && !this.#candidate && now >= this.#upgradeAt) {
      this.#candidate = this.#open(this.#upgrades++ % this.#index);
    }
    this.#refresh();
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
    this.emit("status", status);
  }

  #reading() {
    const standsStill = Date.now() - this.#provenAt > Math.max(STANDSTILL_MS, this.#pingMs + 10_000);
    const isCurrent = this.completeUntil && !standsStill && [...this.#feeds.values()].every((feed) => feed.current);
    return isCurrent ? "live" : "behind";
  }
}
