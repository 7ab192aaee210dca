/** The browser client of realtime_bridge. See client.js for how it works, docs/protocol.md for what it speaks. */

export type TransportName = "websocket" | "sse" | "longpoll";

/**
 * - `connecting`: on the way, and nothing has failed since the last connection
 * - `live`: connected, everything there was has been read, every copy is loaded, and the bridge proves that it misses
 *   nothing
 * - `behind`: connected, but still reading or loading, or `completeUntil` has stood still for more than 30 s (or for a
 *   ping's time and ten seconds, if that is more)
 * - `offline`: an attempt has failed and the next will be made by itself; or closed; or it gave up (see `error`)
 * - `unauthorized`: two tokens in a row were refused, there is none, or the bridge refused role or origin. Nothing is
 *   tried any more until `reconnect()`
 */
export type Status = "connecting" | "live" | "behind" | "offline" | "unauthorized";

export interface Options {
  /** Where the bridge is: absolute, or relative to the page. "/" if left out. */
  url?: string | URL;
  /**
   * A token that is good now. Asked for before every connection, and a minute before the token in use ends, so it should
   * answer from a cache where it can. Nothing (`null`, "") means that nobody is signed in: `unauthorized`. An error means
   * that it could not be found out: tried again later. The user must stay the same: make a new bridge for another.
   */
  token: () => string | null | undefined | Promise<string | null | undefined>;
  /** The best first. All three if left out; "websocket" is passed over where there is none. */
  transports?: readonly TransportName[];
  /** A WebSocket where the platform has none of its own (Node.js before 22). */
  WebSocket?: { new (url: string): WebSocket };
}

export interface BridgeError {
  /** A close code: 4000 and the HTTP status that says the same. */
  code: number;
  detail: string;
}

export interface Bridge {
  readonly status: Status;
  /** What carries the messages now; null while nothing does. */
  readonly transport: TransportName | null;
  /** The time (ISO 8601) up to which the bridge has proven that it missed nothing. */
  readonly completeUntil: string | null;
  /** Why the last connection, or attempt at one, came to nothing; null while there is one. */
  readonly error: BridgeError | null;

  /** Both return a function that ends the listening. `error`: it gave up, or something that was said was refused. */
  on(name: "status", listener: (status: Status) => void): () => void;
  on(name: "error", listener: (error: BridgeError) => void): () => void;

  /** A copy of what the user sees of a table (`schema.table`, or `table` for one in `public`), kept up to date. */
  live<Row extends object, Key = RowKey>(table: string, options: LiveOptions<Row>): Live<Row, Key>;

  /** Give the connection up, if there is one, and make another now: when somebody has signed in again, or any time. */
  reconnect(): void;

  /** End everything, copies included. No timer and no connection is left. */
  close(): void;
}

/** The value of the key column; for a key of several columns `JSON.stringify([a, b])`. */
export type RowKey = string | number;

export interface LiveOptions<Row extends object> {
  /** As `column=op.value`: see docs/protocol.md. */
  filter?: string | null;
  /** The primary key: one column or several. "id" if left out. */
  key?: (keyof Row & string) | readonly (keyof Row & string)[];
  /**
   * Read the rows, from the primary database, as the user (and with the filter). Called when following has begun, after
   * every `resync`, and again (with backoff) if it fails or takes more than a minute. What it answers must not be older
   * than the call: no cache, no replica. The signal tells that the answer is not wanted any more.
   */
  load: (context: { signal: AbortSignal }) => Promise<Iterable<Row>> | Iterable<Row>;
}

export interface Live<Row extends object, Key = RowKey> {
  readonly table: string;
  readonly filter: string | null;
  /** Always the same map: by key, in the order of loading and then of appearing. */
  readonly rows: Map<Key, Row>;
  /** Whether the rows were loaded yet. */
  readonly loaded: boolean;
  /** Whether they are about to be loaded (again). */
  readonly stale: boolean;
  /** What following goes on from. */
  readonly position: string | null;

  /** After each change, and with `change: null` after each load. Returns a function that ends the listening. */
  on(name: "change", listener: (event: { rows: Map<Key, Row>; change: Change<Row> | null }) => void): () => void;
  /** `load` has failed (`error`), or the bridge refuses this table or filter (`code`). */
  on(name: "error", listener: (event: { detail: string; code?: number; error?: unknown }) => void): () => void;

  close(): void;
}

interface ChangeBase {
  schema: string;
  table: string;
  /** ISO 8601, UTC. */
  commit_timestamp: string;
  position: string;
  /** It was read back from the table after a gap. */
  repaired?: true;
  subscriptions?: string[];
}

/** A change as the bridge sends it. */
export type Change<Row> =
  | (ChangeBase & { type: "INSERT"; record: Row; old_record?: undefined; left?: undefined })
  /** Large values that did not change may be missing. `old_record` has at least the key. */
  | (ChangeBase & { type: "UPDATE"; record: Partial<Row>; old_record: Partial<Row>; left?: undefined })
  /** `left`: the row is still there, but this user, or this filter, does not see it any more. */
  | (ChangeBase & { type: "DELETE"; record?: undefined; old_record: Partial<Row>; left?: true });

export function connect(options: Options): Bridge;

/** Apply one change to a copy of a table. Repeating changes from any point on leads to the same copy. */
export function fold<Row extends object, Key>(
  rows: Map<Key, Row>,
  change: Change<Row>,
  keyOf: (row: Partial<Row>) => Key,
): void;

export {}; // what is not said to be exported is not
