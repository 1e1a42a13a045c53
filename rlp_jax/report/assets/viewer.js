// Documents with the gain of thinking at every token: a list to find them, the text in one or more recordings side by
// side (before and after training, or several runs), and the thoughts at the token that is chosen.

const GAINS = { gain: "gain", content: "gain over an empty thought" };
const SHOWN_AT_FIRST = 4; // recordings

class Viewer {
  constructor(index, lines, root) {
    Object.assign(this, index); // recordings, documents, scale
    this.lines = lines;
    this.by = "gain";
    this.everywhere = true;
    this.at = null;
    this.shown = new Set(this.firstShown());
    this.panel = new ThoughtPanel(this.scale, () => this.leave());
    this.status = element("p", { class: "status", role: "status" });
    this.panes = element("div", { class: "panes" });
    this.list = new LongList("documents", (row, entry) => this.row(row, entry), (entry) => this.open(entry));
    this.count = element("p", { class: "count", role: "status" });
    this.panes.addEventListener("keydown", (event) => this.key(event));
    this.panes.addEventListener("click", (event) => { const token = event.target.closest("[data-t]"); if (token) this.choose(token); });
    for (const name of ["pointerover", "focusin"]) this.panes.addEventListener(name, (event) => this.hover(event.target.closest("[data-t]")));
    const hint = element("p", { class: "hint" }, element("kbd", null, "←"), " ", element("kbd", null, "→"), " ", element("kbd", null, "↑"), " ", element("kbd", null, "↓"), " move between tokens, ", element("kbd", null, "Enter"), " shows thoughts, ", element("kbd", null, "Esc"), " closes them.");
    root.append(this.finder(), element("div", { class: "reader" }, this.choices(), this.legend(), this.panes, this.status, this.panel.node, hint));
    this.find();
    this.list.select(0);
  }

  // Before and after of one run; of several, the latest of each.
  firstShown() {
    const latest = new Map(this.recordings.map((recording, i) => [recording.run, i]));
    if (latest.size > 1) return [...latest.values()].slice(0, SHOWN_AT_FIRST);
    const last = this.recordings.length - 1;
    return matchMedia("(max-width: 40rem)").matches ? [last] : [...new Set([0, last])];
  }

  finder() {
    this.order = "recorded";
    this.words = "";
    const search = element("input", { type: "search", placeholder: "find text", "aria-label": "find text in documents" });
    search.addEventListener("input", () => { this.words = search.value.trim().toLowerCase(); this.find(); });
    const orders = [["recorded", "as recorded"], ["gain", "most gain"], ["loss", "least gain"]];
    if (this.recordings.length > 1) orders.push(["change", "most change"]);
    const order = choose("order of documents", orders, (value) => { this.order = value; this.find(); });
    return element("div", { class: "finder" }, element("div", { class: "tools" }, search, order), this.list.node, this.count);
  }

  choices() {
    this.buttons = this.recordings.map((recording, i) => toggle(recording.label, this.shown.has(i), (on) => {
      if (!on && this.shown.size === 1) return; // something has to be shown
      this.shown[on ? "add" : "delete"](i);
      this.buttons[i].setAttribute("aria-pressed", String(on));
      this.draw();
    }));
    const by = choose("tint documents by", Object.entries(GAINS), (value) => { this.by = value; this.draw(); });
    return element("div", { class: "choices" },
      element("div", { class: "group", role: "group", "aria-label": "recordings shown" }, "Show: ", ...this.buttons),
      element("label", { class: "group" }, "Tint: ", by), this.some ? this.where() : null);
  }

  // Of runs that think at some tokens only: the others show what it is like where thinking was not trained.
  where() {
    const button = toggle("only tokens where the run thinks", false, (on) => {
      this.everywhere = !on;
      button.setAttribute("aria-pressed", String(on));
      this.at = null;
      this.panel.hide();
      this.draw();
    });
    return button;
  }

  legend() {
    return element("div", { class: "legend-of-gain" }, scaleBar(this.scale.gain, "nats a token"));
  }

  find() {
    const value = (entry) => this.recordings.map((_, i) => entry.gain[i]).filter((gain) => gain !== undefined);
    const last = (entry) => value(entry).at(-1), change = (entry) => last(entry) - value(entry)[0];
    const orders = { gain: (a, b) => last(b) - last(a), loss: (a, b) => last(a) - last(b), change: (a, b) => Math.abs(change(b)) - Math.abs(change(a)) };
    let found = this.documents;
    if (this.words) found = found.filter((_, i) => this.text(i).includes(this.words));
    if (orders[this.order]) found = [...found].sort(orders[this.order]);
    this.count.replaceChildren(`${found.length} of ${this.documents.length} documents`);
    this.list.show(found);
  }

  read(i) {
    return JSON.parse(this.lines[i]);
  }

  // A document's whole text, for the search. Its tokens come first in its line; what is recorded of them is most of the
  // line and not read. In a string the quotes of `],"shown":` would be escaped.
  text(i) {
    this.texts ||= [];
    this.texts[i] ??= JSON.parse(`${this.lines[i].slice(0, this.lines[i].indexOf('],"shown":'))}]}`).tokens.join("").toLowerCase();
    return this.texts[i];
  }

  row(node, entry) {
    const gains = this.recordings.map((_, i) => entry.gain[i]).filter((gain) => gain !== undefined);
    node.append(
      element("span", { class: "preview" }, entry.text || "(no visible text)"),
      element("span", { class: "about" }, `${entry.tokens} tokens${gains.length > 1 ? `, at first ${figure(gains[0], 2)}` : ""}`),
      chip(gains.at(-1), this.scale.gain));
  }

  open(entry) {
    const i = this.documents.indexOf(entry);
    this.document = this.read(i);
    this.at = null;
    this.panel.hide();
    this.draw();
  }

  // The recordings to show of this document, all there are where none of them is chosen: [label, what was recorded].
  columns() {
    const there = Object.keys(this.document.shown).map(Number), chosen = there.filter((i) => this.shown.has(i));
    return (chosen.length ? chosen : there).map((i) => [this.recordings[i].label, this.document.shown[i]]);
  }

  draw() {
    if (!this.document) return;
    const focused = this.panes.contains(document.activeElement) ? document.activeElement.dataset.t : null;
    const columns = this.columns();
    this.panes.replaceChildren(...columns.map(([label, shown], i) => this.pane(label, shown, i)));
    if (this.at !== null) this.panel.show(this.document.tokens, this.at, columns);
    if (focused !== null) this.panes.querySelector(`[data-t="${focused}"]`)?.focus();
    this.status.replaceChildren("");
  }

  value(shown, place) {
    return this.by === "gain" ? shown.gain[place] : shown.gain[place] - shown.gain_empty[place];
  }

  pane(label, shown, number) {
    const places = new Map(shown.position.map((t, place) => [t, place]).filter(([, place]) => this.everywhere || shown.trained[place]));
    const counted = shown.position.map((_, place) => place).filter((place) => shown.trained[place]);
    const mean = counted.reduce((sum, place) => sum + this.value(shown, place), 0) / counted.length;
    const entry = this.at !== null && places.has(this.at) ? this.at : [...places.keys()][0];
    const nodes = this.document.tokens.map((text, t) => {
      if (!places.has(t)) return tokenNode(text, { class: "unscored" });
      const value = this.value(shown, places.get(t));
      const name = text.trim() || (text.includes("\n") ? "new line" : text === "" ? "part of a character" : "space");
      const node = tokenNode(text, {
        role: "button", tabindex: t === entry ? "0" : "-1", "data-t": t, "data-pane": number, "aria-label": `${name}, ${GAINS[this.by]} ${figure(value)}`,
        class: t === this.at ? "chosen" : null, "aria-pressed": String(t === this.at),
      });
      return tint(node, value, this.scale.gain);
    });
    return element("section", { class: "pane", "aria-label": label },
      element("h3", null, label, element("span", { class: "soft" }, ` · mean ${figure(mean)}${this.some ? " where the run thinks" : ""}`)),
      element("div", { class: "text document", dir: "auto" }, ...nodes));
  }

  hover(token) {
    if (!token) return;
    const t = Number(token.dataset.t);
    const values = this.columns().filter(([, shown]) => shown.position.includes(t)).map(([label, shown]) => {
      const place = shown.position.indexOf(t);
      return `${label}: gain ${figure(shown.gain[place])}, empty thought ${figure(shown.gain_empty[place])}`;
    });
    this.status.replaceChildren(`token ${t} “${token.textContent.slice(0, 40)}” · ${values.join(" · ")}`);
  }

  choose(token) {
    this.at = Number(token.dataset.t);
    this.pane_ = token.dataset.pane;
    for (const node of this.panes.querySelectorAll("[data-t]")) {
      const on = Number(node.dataset.t) === this.at;
      node.classList.toggle("chosen", on);
      node.setAttribute("aria-pressed", String(on));
    }
    this.move(token);
    this.panel.show(this.document.tokens, this.at, this.columns());
  }

  // Leaves the thoughts for the token they are at.
  leave() {
    const token = this.panes.querySelector(`[data-pane="${this.pane_}"][data-t="${this.at}"]`) || this.panes.querySelector("[data-t]");
    this.at = null;
    this.panel.hide();
    for (const node of this.panes.querySelectorAll(".chosen")) {
      node.classList.remove("chosen");
      node.setAttribute("aria-pressed", "false");
    }
    if (token) this.move(token);
  }

  // One token of a pane is in the order of Tab; the arrows move which.
  move(token) {
    for (const node of token.parentElement.querySelectorAll('[tabindex="0"]')) node.tabIndex = -1;
    token.tabIndex = 0;
    token.focus();
  }

  key(event) {
    const token = event.target.closest("[data-t]");
    if (!token) return;
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.choose(token);
      this.panel.node.focus();
    } else if (event.key === "Escape") {
      event.preventDefault();
      this.leave();
    } else {
      const next = this.neighbour(token, event.key);
      if (!next) return;
      event.preventDefault();
      this.move(next);
      if (this.at !== null) this.choose(next);
    }
  }

  neighbour(token, key) {
    const all = [...token.parentElement.querySelectorAll("[data-t]")], at = all.indexOf(token);
    const forward = getComputedStyle(token.parentElement).direction === "rtl" ? -1 : 1;
    if (key === "ArrowRight") return all[at + forward];
    if (key === "ArrowLeft") return all[at - forward];
    if (key === "Home") return all[0];
    if (key === "End") return all[all.length - 1];
    if (key !== "ArrowUp" && key !== "ArrowDown") return null;
    // The nearest token of the line above or below.
    const box = token.getBoundingClientRect(), middle = box.left + box.width / 2;
    const boxes = all.map((node) => [node, node.getBoundingClientRect()]);
    const lines = boxes.map(([, other]) => other.top).filter((top) => (key === "ArrowDown" ? top > box.top + 2 : top < box.top - 2));
    if (!lines.length) return null;
    const line = key === "ArrowDown" ? Math.min(...lines) : Math.max(...lines);
    const near = boxes.filter(([, other]) => Math.abs(other.top - line) <= 2);
    const far = ([, other]) => Math.abs(other.left + other.width / 2 - middle);
    return near.reduce((best, pair) => (far(pair) < far(best) ? pair : best))[0];
  }
}

if (data.viewer) new Viewer(data.viewer, document.getElementById("documents").textContent.split("\n"), document.getElementById("viewer"));
