#!/usr/bin/env node
// Follows Portcullis over NATS: who is banned now, and what happened.
//
//   consumer.mjs bans   [--once]                 the ban set, then every change of it
//   consumer.mjs events [--once] [--state FILE]  every event kept, then every new one; goes on where FILE says it stopped
//
// One JSON object a line on stdout, everything else on stderr. The connection comes from the environment: see README.md.
// To do something of your own, change `onBanned`, `onLifted` and `onEvent` below; nothing else needs to change.
//
// How it misses nothing: a live message is at most once, so it only rings a bell. What happened is always read from the
// stream, in order, from the last position that was handled. A read goes by direct get, which needs no consumer and no
// right to create one. It is repeated when the bell rings, when the connection came back, and now and then in any case.

import { closeSync, fsyncSync, openSync, readFileSync, renameSync, writeSync } from "node:fs";
import { isDeepStrictEqual, parseArgs } from "node:util";
import { connect, createInbox, credsAuthenticator, nkeyAuthenticator, usernamePasswordAuthenticator } from "@nats-io/transport-node";

const BATCH_MAX = 1_000;
// A batch whose next message takes longer is asked for again.
const READ_TIMEOUT_MS = 5_000;
const RETRY_MS = 1_000;
// With --once; a follower waits for its server as long as it takes.
const CONNECT_TIMEOUT_MS = 10_000;
// Reads without being rung for: what a lost live message can delay a change at most.
const POLL_MS = 10_000;
// The whole ban set is compared anew, for whatever nobody thought of.
const RESYNC_MS = 600_000;
// How long a live message may be ahead of the stream, which stores it on several servers first.
const ANNOUNCED_MS = 5_000;
// An event may be stored twice when a detector takes over from another; both have the same id.
const RECENT_IDS_MAX = 1_000;
// A replica may lag behind what was read from another one; after that many attempts its answer counts.
const STALE_READS_MAX = 5;

/** `target` is banned until `expiresAt` (null = for good); takes the place of what was said of it before. */
function onBanned(target, expiresAt, record) {
  emit({ change: "banned", target, expires_at: expiresAt, record });
}

/** `target` is not banned any more. */
function onLifted(target) {
  emit({ change: "lifted", target });
}

/** Something happened. Called again for the same event only when the process died before its position was saved. */
function onEvent(event) {
  emit(event);
}

function emit(value) {
  // ASCII only: paths and user agents come from strangers.
  const escape = (unit) => "\\u" + unit.charCodeAt(0).toString(16).padStart(4, "0");
  process.stdout.write(JSON.stringify(value).replace(/[\u007f-\uffff]/g, escape) + "\n");
}

function log(level, text) {
  process.stderr.write(`${new Date().toISOString()} ${level} ${text}\n`);
}

/** A read that is worth repeating. */
class ReadFailed extends Error {}

/** Reads of one stream, limited to some of its subjects. */
class Stream {
  constructor(nc, name, subjects) {
    Object.assign(this, { nc, name, subjects });
  }

  /** All messages after `sequence`, in order, in batches. */
  async *after(sequence) {
    for (let pending = 1; pending > 0; ) {
      const answer = await this.#get({ seq: sequence + 1, batch: BATCH_MAX, next_by_subj: this.subjects });
      pending = answer.pending;
      if (answer.batch.length > 0) {
        yield answer.batch;
        sequence = answer.batch.at(-1).sequence;
      }
    }
  }

  /** The first message at `sequence` or later. */
  async firstFrom(sequence) {
    const { batch } = await this.#get({ seq: Math.max(sequence, 1), batch: 1, next_by_subj: this.subjects });
    return batch[0];
  }

  /** The newest message. */
  async last() {
    const { batch } = await this.#get({ last_by_subj: this.subjects });
    return batch[0];
  }

  #get(request) {
    const batched = "batch" in request;
    const batch = [];
    return new Promise((resolve, reject) => {
      let answers, timer;
      const settle = (how, value) => {
        clearTimeout(timer);
        answers?.unsubscribe();
        how(value);
      };
      const fail = (text) => settle(reject, new ReadFailed(`${this.name} ${text}`));
      timer = setTimeout(() => fail("does not answer"), READ_TIMEOUT_MS);
      const take = (msg) => {
        timer.refresh();
        const status = msg.headers?.code ?? 0;
        if (status === 404) return settle(resolve, { batch: [], pending: 0 });
        if (status !== 0 && status !== 204) return fail(`answers with status ${status}`);
        // Each message names the one before it, so that none is lost on the way unseen.
        const previous = batch.at(-1)?.sequence;
        if (batched && previous !== undefined && msg.headers.get("Nats-Last-Sequence") !== String(previous)) {
          return fail("answered, and a part of it is missing");
        }
        if (status === 204) return settle(resolve, { batch, pending: Number(msg.headers.get("Nats-Num-Pending")) });
        const message = stored(msg);
        if (message === undefined) return fail("answers without sequence, time or subject");
        batch.push(message);
        if (!batched) settle(resolve, { batch, pending: 0 });
      };
      try {
        const inbox = createInbox();
        answers = this.nc.subscribe(inbox, { callback: (error, msg) => (error ? fail("cannot be read") : take(msg)) });
        this.nc.publish(`$JS.API.DIRECT.GET.${this.name}`, JSON.stringify(request), { reply: inbox });
      } catch (error) {
        fail(`cannot be read: ${error.name}`);
      }
    });
  }
}

/** A message as a stream keeps it. */
function stored(msg) {
  const { headers } = msg;
  if (!headers?.has("Nats-Sequence") || !headers.has("Nats-Time-Stamp") || !headers.has("Nats-Subject")) return undefined;
  return {
    sequence: Number(headers.get("Nats-Sequence")),
    time: headers.get("Nats-Time-Stamp"),
    subject: headers.get("Nats-Subject"),
    isRemoval: headers.has("KV-Operation") || headers.has("Nats-Marker-Reason") || msg.data.length === 0,
    data: new TextDecoder().decode(msg.data),
  };
}

/** Tells the loop that there is something to read. */
class Bell {
  stopping = false;
  resync = true;
  #wake = () => {};

  ring() {
    this.#wake();
  }

  stop() {
    this.stopping = true;
    this.ring();
  }

  askResync() {
    this.resync = true;
    this.ring();
  }

  /** Until it rings, at most `ms`. What rang before is seen in the state that it changed. */
  wait(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

/** The ban set, kept equal to the bucket. */
class Bans {
  // Target to { end: milliseconds since the epoch, record }.
  bans = new Map();
  position = 0;
  #announcedPosition = 0;
  #staleReads = 0;
  #syncedAt = 0;

  constructor(nc, prefix) {
    this.stream = new Stream(nc, `KV_${prefix}_bans`, `$KV.${prefix}_bans.ban.>`);
    this.live = `${prefix}.state.v1.ban.>`;
    this.keyPrefix = `$KV.${prefix}_bans.ban.`;
  }

  announce(msg) {
    this.#announcedPosition = Math.max(this.#announcedPosition, Number(msg.headers?.get("Nats-Sequence") ?? 0));
  }

  isBehind() {
    return this.position < this.#announcedPosition;
  }

  forgetAnnounced() {
    this.#announcedPosition = this.position;
  }

  /** Takes the whole set and tells what differs, so that a removal that was never seen is seen now. */
  async resync() {
    const found = new Map();
    let position = 0;
    for await (const batch of this.stream.after(0)) {
      for (const message of batch) {
        const { target, ban } = this.#decode(message);
        if (ban !== undefined) found.set(target, ban);
        else found.delete(target);
      }
      position = batch.at(-1).sequence;
    }
    if (position < this.position && this.#staleReads < STALE_READS_MAX) {
      this.#staleReads += 1;
      throw new ReadFailed("a server that lags behind has answered");
    }
    this.#staleReads = 0;
    for (const target of [...this.bans.keys()]) if (!found.has(target)) this.#lift(target);
    for (const [target, ban] of found) this.#ban(target, ban);
    this.position = position;
    this.#syncedAt = performance.now();
    emit({ change: "synced", banned: this.bans.size });
  }

  async read() {
    for await (const batch of this.stream.after(this.position)) {
      for (const message of batch) {
        const { target, ban } = this.#decode(message);
        if (ban !== undefined) this.#ban(target, ban);
        else this.#lift(target);
      }
      this.position = batch.at(-1).sequence;
    }
  }

  /** A ban ends by itself, also while nobody can tell us so. */
  tick(bell) {
    const now = Date.now();
    for (const [target, { end }] of [...this.bans]) if (end <= now) this.#lift(target);
    if (performance.now() - this.#syncedAt >= RESYNC_MS) bell.askResync();
  }

  #ban(target, ban) {
    if (isDeepStrictEqual(this.bans.get(target), ban)) return;
    this.bans.set(target, ban);
    onBanned(target, latestEnd(ban.record), ban.record);
  }

  #lift(target) {
    if (this.bans.delete(target)) onLifted(target);
  }

  /** The target, and its ban unless it was removed, is over or cannot be read. */
  #decode(message) {
    const target = message.subject.slice(this.keyPrefix.length).replaceAll("_", ":");
    if (message.isRemoval) return { target };
    try {
      const record = JSON.parse(message.data);
      const latest = latestEnd(record);
      const end = latest === null ? Infinity : Date.parse(latest);
      if (Number.isNaN(end)) throw new TypeError("no time");
      return end > Date.now() ? { target, ban: { end, record } } : { target };
    } catch {
      log("WARNING", `record of ${JSON.stringify(target)} at ${message.sequence} cannot be read`);
      return { target };
    }
  }
}

/** When the last of a record's bans ends; null = never. Times sort as text: all are UTC with milliseconds. */
function latestEnd(record) {
  const ends = record.bans.map((ban) => ban.expires_at);
  return ends.includes(null) ? null : ends.reduce((a, b) => (a > b ? a : b));
}

/** Every event once, in the order of the stream. */
class Events {
  // Position and time of the last message that was handled, and ids of the newest, oldest first.
  position = 0;
  time = "";
  recent = new Set();
  #announced = new Set();

  constructor(nc, prefix, stateFile) {
    this.stream = new Stream(nc, `${prefix}_events`.toUpperCase(), `${prefix}.events.v1.>`);
    this.live = this.stream.subjects;
    this.stateFile = stateFile;
    if (stateFile !== undefined) this.#load();
  }

  announce(msg) {
    const id = idOf(parse(msg.string()));
    if (id !== undefined && !this.recent.has(id) && this.#announced.size < RECENT_IDS_MAX) this.#announced.add(id);
  }

  isBehind() {
    return this.#announced.size > 0;
  }

  forgetAnnounced() {
    this.#announced.clear();
  }

  /** Looks whether the stream is still the one that was read, and whether it still has what comes next. */
  async resync() {
    if (this.position === 0) return;
    const last = await this.stream.last();
    const first = await this.stream.firstFrom(this.position);
    if (last === undefined) return;
    const isShorter = last.sequence < this.position && sortable(last.time) > sortable(this.time);
    const isOther = first?.sequence === this.position && first.time !== this.time;
    if (isShorter || isOther) {
      log("WARNING", "the stream was made anew, reading it from its beginning");
      this.position = 0;
    } else if (first !== undefined && first.sequence > this.position + 1) {
      log("WARNING", `${first.sequence - this.position - 1} events were removed before they were read`);
    }
  }

  async read() {
    for await (const batch of this.stream.after(this.position)) {
      for (const message of batch) this.#take(message);
      this.position = batch.at(-1).sequence;
      this.time = batch.at(-1).time;
      // What was handed over is out before it is called handled.
      await new Promise((resolve) => process.stdout.write("", resolve));
      this.#save();
    }
  }

  tick() {}

  #take(message) {
    const event = parse(message.data);
    const id = idOf(event);
    if (id === undefined) return log("WARNING", `event at ${message.sequence} cannot be read`);
    this.#announced.delete(id);
    if (this.recent.has(id)) return;
    this.recent.add(id);
    if (this.recent.size > RECENT_IDS_MAX) this.recent.delete(this.recent.values().next().value);
    onEvent(event);
  }

  #load() {
    let text;
    try {
      text = readFileSync(this.stateFile, "utf8");
    } catch (error) {
      if (error.code === "ENOENT") return;
      throw error;
    }
    const state = parse(text);
    if (!Number.isSafeInteger(state?.sequence) || typeof state.time !== "string" || !Array.isArray(state.recent)) {
      throw new Error(`${this.stateFile} is no state of this program; remove it to read everything again`);
    }
    if (state.stream !== this.stream.name) throw new Error(`${this.stateFile} belongs to the stream ${state.stream}`);
    this.position = state.sequence;
    this.time = state.time;
    this.recent = new Set(state.recent);
  }

  /** Replaces the file as a whole, so that a crash leaves the old or the new one. */
  #save() {
    if (this.stateFile === undefined) return;
    const state = { stream: this.stream.name, sequence: this.position, time: this.time, recent: [...this.recent] };
    const draft = `${this.stateFile}.${process.pid}`;
    const file = openSync(draft, "w", 0o600);
    writeSync(file, JSON.stringify(state));
    fsyncSync(file);
    closeSync(file);
    renameSync(draft, this.stateFile);
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

function idOf(event) {
  return typeof event?.id === "string" ? event.id : undefined;
}

/** The server leaves out trailing zeros of a fraction. */
function sortable(stamp) {
  const [whole, fraction = ""] = stamp.replace(/Z$/, "").split(".");
  return `${whole}.${fraction.padEnd(9, "0")}`;
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Keeps `source` up to date until the bell stops it, or once. */
async function follow(source, nc, bell, once) {
  const announce = (error, msg) => {
    if (error) return log("WARNING", `live messages cannot be read: ${error.name}`);
    source.announce(msg);
    bell.ring();
  };
  nc.subscribe(source.live, { callback: announce });
  let failures = 0;
  let announcedAt = performance.now();
  while (!bell.stopping) {
    try {
      if (bell.resync) {
        await source.resync();
        bell.resync = false;
      }
      await source.read();
    } catch (error) {
      if (!(error instanceof ReadFailed)) throw error;
      failures += 1;
      if (once && failures > STALE_READS_MAX) throw error;
      log("WARNING", `${error.message}; trying again`);
      bell.resync = true;
      await sleep(RETRY_MS);
      continue;
    }
    failures = 0;
    if (once) return;
    const readAt = performance.now();
    // A live message was ahead of the stream: look again, soon and then less often.
    if (source.isBehind()) {
      if (readAt - announcedAt < ANNOUNCED_MS) {
        await sleep(Math.min(500, 5 + (readAt - announcedAt) / 4));
        continue;
      }
      log("WARNING", "something was announced that the stream does not show");
      source.forgetAnnounced();
      bell.askResync();
    }
    while (!bell.stopping && !bell.resync && !source.isBehind() && performance.now() - readAt < POLL_MS) {
      await bell.wait(1_000);
      source.tick(bell);
    }
    announcedAt = performance.now();
  }
}

/** Connects as the environment says and keeps at it, also before the first success. */
function open(once) {
  const env = process.env;
  const password = env.NATS_PASSWORD_FILE ? readFileSync(env.NATS_PASSWORD_FILE, "utf8").trim() : env.NATS_PASSWORD;
  let authenticator;
  if (env.NATS_CREDS) authenticator = credsAuthenticator(readFileSync(env.NATS_CREDS));
  else if (env.NATS_NKEY) authenticator = nkeyAuthenticator(new TextEncoder().encode(readFileSync(env.NATS_NKEY, "utf8").trim()));
  else if (env.NATS_USER) authenticator = usernamePasswordAuthenticator(env.NATS_USER, password);
  // TLS when the server asks for it or the URL says `tls://`; this adds a CA of your own and a client certificate.
  const tls = env.NATS_CA || env.NATS_CERT ? { caFile: env.NATS_CA, certFile: env.NATS_CERT, keyFile: env.NATS_KEY } : undefined;
  const connecting = connect({
    servers: (env.NATS_URL ?? "nats://127.0.0.1:4222").split(","),
    name: "portcullis-consumer",
    maxReconnectAttempts: -1,
    reconnectTimeWait: RETRY_MS,
    waitOnFirstConnect: true,
    ignoreAuthErrorAbort: true,
    pingInterval: 10_000,
    ...(authenticator && { authenticator }),
    ...(tls && { tls }),
  });
  if (!once) return connecting;
  const late = sleep(CONNECT_TIMEOUT_MS).then(() => Promise.reject(new ReadFailed("no connection")));
  return Promise.race([connecting, late]);
}

/** Says what becomes of the connection, each thing once for each outage, and asks for a resync when it is back. */
async function watch(nc, bell) {
  const said = new Set();
  for await (const status of nc.status()) {
    if (status.type === "reconnect") {
      said.clear();
      log("INFO", "connected again");
      bell.askResync();
    } else if (["disconnect", "error", "staleConnection"].includes(status.type) && !said.has(status.type)) {
      said.add(status.type);
      log("WARNING", `NATS: ${status.type}${status.error ? `: ${status.error.name}` : ""}`);
    }
  }
}

async function main() {
  const options = { once: { type: "boolean", default: false }, state: { type: "string" } };
  const { values, positionals } = parseArgs({ options, allowPositionals: true });
  if (positionals.length !== 1 || !["bans", "events"].includes(positionals[0])) {
    throw Object.assign(new Error("usage: consumer.mjs bans|events [--once] [--state FILE]"), { exitCode: 2 });
  }
  const bell = new Bell();
  let nc;
  for (const name of ["SIGINT", "SIGTERM"]) process.on(name, () => (nc === undefined ? process.exit(0) : bell.stop()));
  process.stdout.on("error", (error) => process.exit(error.code === "EPIPE" ? 0 : 1));
  nc = await open(values.once);
  const prefix = process.env.PORTCULLIS_PREFIX ?? "portcullis";
  const source = positionals[0] === "bans" ? new Bans(nc, prefix) : new Events(nc, prefix, values.state);
  log("INFO", `connected, following ${positionals[0]}`);
  watch(nc, bell);
  let closed = false;
  nc.closed().then(() => {
    closed = true;
    bell.stop();
  });
  await follow(source, nc, bell, values.once);
  if (closed) throw new Error("the connection was closed for good");
  await nc.close();
}

main().then(
  () => process.stdout.write("", () => process.exit(0)),
  (error) => {
    log("ERROR", error.message);
    process.exit(error.exitCode ?? (error.code?.startsWith?.("ERR_PARSE_ARGS") ? 2 : 1));
  },
);
