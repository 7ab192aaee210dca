/**
 * The live page: people side by side, each with a connection and a copy of `public.posts` of their own.
 *
 * It is an example of how to use client.js, too: see `load` and `Panel.#follow`. Whatever came from somewhere is put in
 * as text, never as HTML.
 *
 * @module
 */

import { connect } from "./client.js";

const ROWS_OF_A_PAGE = 500;
const MOST_CARDS = 50; // the newest; the copy holds all
const CUT_MS = 5_000;
const REASON_MS = 900; // for which a card that leaves says why
const HUES = ["#4f46e5", "#0d9488", "#c2410c", "#a21caf", "#2563a8", "#5b7a0a"];
const NOBODYS_HUE = "#71757f";
const TRANSPORTS = { websocket: "WebSocket", sse: "SSE", longpoll: "long poll" };
const PREFERS_STILLNESS = matchMedia("(prefers-reduced-motion: reduce)");

// -- what is asked of the bridge ------------------------------------------------------------------------------------

/** A request as a user; row-level security decides what comes of it. */
async function ask(user, method, path, { body, signal } = {}) {
  const headers = { Authorization: `Bearer ${user.token}`, "Content-Type": "application/json" };
  const answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (answer.ok) return answer;
  throw new Error(await answer.json().then(({ detail }) => detail, () => `HTTP ${answer.status}`));
}

/** Everything that a user sees. */
async function load(user, signal) {
  const rows = [];
  for (let after = ""; ;) {
    const page = await (await ask(user, "GET", `posts?limit=${ROWS_OF_A_PAGE}${after}`, { signal })).json();
    rows.push(...page);
    if (page.length < ROWS_OF_A_PAGE) return rows;
    after = `&after=${page.at(-1).id}`;
  }
}

// -- the page's elements --------------------------------------------------------------------------------------------

const copyOf = (template) => document.getElementById(template).content.firstElementChild.cloneNode(true);

function onSubmit(form, act) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const fields = [...form.elements].filter(({ name }) => name);
    act(Object.fromEntries(fields.map((it) => [it.name, it.type === "checkbox" ? it.checked : it.value])));
  });
}

function fill({ elements }, { title, body }) {
  elements.title.value = title;
  elements.body.value = body;
}

function say(place, text) {
  place.textContent = text;
  place.hidden = !text;
}

/** Animate; in no time for those who prefer that nothing moves. */
function move(element, keyframes, duration, delay = 0) {
  return element.animate(keyframes, { duration: PREFERS_STILLNESS.matches ? 0 : duration, delay, easing: "ease" });
}

// -- one person's side ----------------------------------------------------------------------------------------------

class Panel {
  #element = copyOf("panel"); #users; #renew; #user; #bridge; #posts;
  #cards = new Map(); #edited; #frame = 0; #ticker; #cutUntil = 0; #isCut = false; #missed = 0;

  /** `renew` answers with a token of a user that is good now. */
  constructor(users, user, renew) {
    this.#users = users;
    this.#renew = renew;
    const choice = this.#find("select"), write = this.#find(".write"), dialog = this.#find("dialog");
    choice.append(...users.map(({ email }, index) => new Option(email, index, false, users[index] === user)));
    choice.onchange = () => this.#follow(users[choice.value]);
    this.#find(".cut").onclick = () => this.#cut();
    this.#find(".cancel").onclick = () => dialog.close();
    onSubmit(write, (post) => {
      fill(write, { title: "", body: "" }); // at once: the next post may be begun before the answer comes
      this.#write("POST", "posts", post).then((isDone) => isDone || fill(write, post));
    });
    onSubmit(dialog.firstElementChild, (post) => {
      this.#write("PATCH", `posts/${this.#edited}`, post).then((isDone) => isDone && dialog.close());
    });
    document.querySelector("main").append(this.#element);
    this.#ticker = setInterval(() => this.#drawFacts(), 1_000);
    this.#follow(user);
  }

  close() {
    clearInterval(this.#ticker);
    this.#bridge.close();
    this.#element.remove();
  }

  #follow(user) {
    this.#bridge?.close();
    this.#user = user;
    this.#isCut = false;
    this.#cutUntil = 0;
    this.#cards.clear();
    this.#find(".posts").replaceChildren();
    this.#element.setAttribute("aria-label", user.email);
    this.#element.style.setProperty("--hue", this.#hueOf(user.id));
    this.#find(".avatar").textContent = user.email[0].toUpperCase();
    say(this.#find(".note"), "");
    this.#bridge = connect({ url: ".", token: () => this.#token(user) });
    this.#posts = this.#bridge.live("public.posts", { load: ({ signal }) => load(user, signal) });
    this.#bridge.on("status", () => this.#drawStatus());
    this.#posts.on("change", ({ change }) => this.#changed(change));
    for (const it of [this.#bridge, this.#posts]) it.on("error", ({ detail }) => this.#complain(detail));
    this.#drawStatus();
  }

  async #token(user) {
    if (Date.now() < this.#cutUntil) throw new Error("the connection is cut");
    return (user.token = await this.#renew(user));
  }

  /** Like a network that goes away: the connection is gone, and for a while there is none to be had. */
  #cut() {
    this.#isCut = true;
    this.#cutUntil = Date.now() + CUT_MS;
    this.#missed = 0;
    say(this.#find(".note"), "Cut. It comes back by itself.");
    this.#bridge.reconnect();
    this.#drawStatus();
  }

  #comeBack() {
    this.#isCut = false;
    const changes = this.#missed === 1 ? "1 change" : `${this.#missed} changes`;
    say(this.#find(".note"), `Back, and caught up on ${changes}.`);
  }

  async #write(method, path, body) {
    this.#complain("");
    try {
      return await ask(this.#user, method, path, { body });
    } catch (error) {
      this.#complain(error.message);
    }
  }

  #changed(change) {
    if (change && this.#bridge.status !== "live") this.#missed++;
    const card = change?.type === "DELETE" && this.#cards.get(change.old_record.id);
    if (card) card.dataset.reason = change.left ? "Not visible any more" : "Deleted";
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  // -- drawing ------------------------------------------------------------------------------------------------------

  #find(selector) { return this.#element.querySelector(selector); }

  #complain(detail) { say(this.#find(".problem"), detail); }

  #hueOf(id) {
    const index = this.#users.findIndex((user) => user.id === id);
    return index < 0 ? NOBODYS_HUE : HUES[index % HUES.length];
  }

  #drawStatus() {
    const { status, error } = this.#bridge, isAway = status === "offline" || status === "unauthorized";
    if (this.#isCut && status === "live") this.#comeBack();
    this.#element.classList.toggle("away", isAway);
    Object.assign(this.#find(".status"), { className: `status ${status}`, textContent: status });
    this.#find(".cut").disabled = this.#isCut;
    this.#complain((isAway && !this.#isCut && error?.detail) || "");
    this.#drawFacts();
  }

  #drawFacts() {
    const { transport, completeUntil } = this.#bridge;
    this.#find(".transport").textContent = TRANSPORTS[transport] ?? "–";
    this.#find(".position").textContent = this.#posts.position ?? "–";
    this.#find(".until").textContent = completeUntil ? new Date(completeUntil).toLocaleTimeString() : "–";
  }

  #draw() {
    this.#frame = 0;
    const rows = [...this.#posts.rows.values()].sort((a, b) => b.id - a.id).slice(0, MOST_CARDS);
    const ids = new Set(rows.map(({ id }) => id));
    for (const [id, card] of this.#cards) if (!ids.has(id)) this.#takeAway(id, card);
    for (const row of rows) this.#show(row);
    this.#drawFacts();
  }

  #show(row) {
    const known = this.#cards.get(row.id), card = known ?? this.#makeCard(row);
    if (card.row === row && known) return;
    card.row = row;
    delete card.dataset.reason;
    card.classList.toggle("private", !row.is_public);
    card.querySelector("h3").textContent = row.title;
    card.querySelector("p").textContent = row.body;
    card.querySelector(".badge").textContent = row.is_public ? "public" : "private";
    for (const button of card.querySelectorAll("button")) button.draw(row);
    if (known) move(card, [{ backgroundColor: `${this.#hueOf(row.user_id)}40` }, {}], 1_200);
    else move(card, [{ height: 0, opacity: 0 }, { height: `${card.offsetHeight}px`, opacity: 1 }], 260);
  }

  #makeCard(row) {
    const card = copyOf("post"), list = this.#find(".posts"), isMine = row.user_id === this.#user.id;
    const author = this.#users.find(({ id }) => id === row.user_id)?.email ?? row.user_id;
    card.row = row;
    card.style.setProperty("--author", this.#hueOf(row.user_id));
    card.classList.toggle("others", !isMine);
    card.querySelector(".author").textContent = isMine ? "yours" : `by ${author}`;
    if (isMine) card.querySelector("footer").append(...this.#actionsOf(card));
    list.insertBefore(card, [...list.children].find((other) => other.row.id < row.id) ?? null);
    this.#cards.set(row.id, card);
    return card;
  }

  #takeAway(id, card) {
    this.#cards.delete(id);
    card.inert = true;
    const gone = { height: 0, opacity: 0, marginBottom: 0, paddingBlock: 0 };
    const delay = card.dataset.reason ? REASON_MS : 0;
    move(card, [{ height: `${card.offsetHeight}px` }, gone], 260, delay).onfinish = () => card.remove();
  }

  #actionsOf(card) {
    const action = (labelOf, act) => {
      const button = document.createElement("button");
      button.type = "button";
      button.onclick = act;
      button.draw = (row) => {
        button.textContent = labelOf(row);
        button.setAttribute("aria-label", `${labelOf(row)}: ${row.title}`);
      };
      return button;
    };
    const write = (method, body) => this.#write(method, `posts/${card.row.id}`, body);
    return [
      action((row) => (row.is_public ? "Hide" : "Publish"), () => write("PATCH", { is_public: !card.row.is_public })),
      action(() => "Edit", () => this.#edit(card.row)),
      action(() => "Delete", () => write("DELETE")),
    ];
  }

  #edit(row) {
    const dialog = this.#find("dialog");
    this.#edited = row.id;
    fill(dialog.firstElementChild, row);
    dialog.showModal();
  }
}

// -- who ------------------------------------------------------------------------------------------------------------

/** The sample users of `realtime-bridge dev`, each with a token that was made just now. */
async function sampleUsers(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  return answer.json();
}

function userOf(token) {
  const payload = atob(token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/"));
  const { sub, email, role } = JSON.parse(new TextDecoder().decode(Uint8Array.from(payload, (it) => it.charCodeAt(0))));
  return { id: sub, email: email || sub || role, token };
}

function start(users, renew) {
  return users.slice(0, 2).map((user) => new Panel(users, user, renew));
}

function askForTokens() {
  const form = copyOf("tokens"), again = document.querySelector(".again");
  again.hidden = true;
  document.querySelector("main").append(form);
  onSubmit(form, (tokens) => {
    try {
      const users = Object.values(tokens).map((it) => it.trim()).filter(Boolean).map(userOf);
      form.remove();
      const panels = start(users, ({ token }) => token);
      again.onclick = () => {
        for (const panel of panels) panel.close();
        askForTokens();
      };
      again.hidden = false;
    } catch {
      say(form.querySelector(".problem"), "That is not an access token: it has three parts with dots between them.");
    }
  });
}

const { users: address } = document.body.dataset;
if (address) {
  start(await sampleUsers(address), async ({ id }) => {
    return (await sampleUsers(address)).find((user) => user.id === id).token;
  });
} else askForTokens();
