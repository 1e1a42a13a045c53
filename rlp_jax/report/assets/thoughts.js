// The thoughts at one token: a column a recording, best reward first, their tokens tinted by a log-ratio.

const RATIOS = {
  ratio_ema: "policy against its moving average",
  ratio_sampler: "trainer against sampler",
  logprob: "log-probability by the policy",
};
const FIRST_CHARACTERS = 4000; // of a thought, until more are asked for

class ThoughtPanel {
  // scale: nats at full tint, by name. close: called when the panel is left.
  constructor(scale, close) {
    this.scale = scale;
    this.by = "ratio_ema";
    this.node = element("section", { class: "panel", tabindex: "-1", "aria-label": "thoughts", hidden: true });
    this.leave = close;
    this.node.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
    });
  }

  hide() {
    this.node.hidden = true;
    this.node.replaceChildren();
  }

  // at: place of the token. columns: [recording's label, what was recorded] of those shown.
  show(tokens, at, columns) {
    this.args = [tokens, at, columns];
    const horizon = Math.max(...columns.map(([, shown]) => shown.horizon));
    const before = tokens.slice(Math.max(0, at - 40), at).join("");
    const mark = element("mark", null, tokens.slice(at, at + horizon).join(""));
    const text = element("div", { class: "text", dir: "auto" }, at > 40 ? "… " : "", before, mark);
    const select = choose("tint thoughts by", Object.entries(RATIOS), (value) => {
      this.by = value;
      this.show(...this.args);
      this.node.querySelector("select").focus();
    });
    select.value = this.by;
    const close = element("button", { type: "button", class: "close", on: { click: () => this.leave() } }, "Close");
    this.reading = element("p", { class: "status", role: "status" });
    const about = element("div", { class: "choices" },
      element("label", { class: "group" }, "Tokens of thoughts: ", select), scaleBar(this.scale[this.by], "nats"));
    this.node.replaceChildren(
      element("div", { class: "top" }, text, close), about,
      element("div", { class: "columns" }, ...columns.map(([label, shown]) => this.column(label, shown, at))),
      this.reading);
    this.node.hidden = false;
  }

  column(label, shown, at) {
    const place = shown.position.indexOf(at);
    if (place < 0) return element("div", { class: "column" }, element("h3", null, label), element("p", { class: "soft" }, "Not recorded here."));
    const head = element("h3", null, label, element("span", { class: "soft" }, ` · without a thought log p = ${figure(shown.s_ema[place])}, an empty one gains ${figure(shown.gain_empty[place])}`));
    const thoughts = [...shown.thoughts[place]].sort((a, b) => b.reward - a.reward);
    return element("div", { class: "column" }, head, ...thoughts.map((thought, rank) => this.thought(thought, rank, thoughts.length)));
  }

  thought(thought, rank, count) {
    const name = count < 2 ? "" : rank === 0 ? "best" : rank === count - 1 ? "worst" : `${rank + 1}.`;
    const tags = element("div", { class: "tags" }, element("b", null, name),
      element("span", null, "gain ", chip(thought.reward, this.scale.gain, 3)),
      element("span", null, `advantage ${figure(thought.advantage)}`),
      element("span", null, `${thought.length} tokens${thought.stopped ? "" : ", cut at the cap"}`));
    const text = element("div", { class: "text", dir: "auto" });
    this.fill(text, thought, FIRST_CHARACTERS);
    return element("div", { class: `thought ${thought.reward > 0 ? "up" : "down"}` }, tags, text);
  }

  fill(text, thought, limit) {
    const nodes = [], firstOfTag = thought.length - thought.close;
    let left = limit, cut = false;
    thought.tokens.forEach((token, i) => {
      if (left <= 0) { cut = true; return; }
      const short = token.slice(0, left);
      cut ||= short.length < token.length;
      left -= short.length;
      const node = tokenNode(short, { class: i >= firstOfTag ? "tag" : null });
      tint(node, thought[this.by][i], this.scale[this.by]);
      node.addEventListener("pointerenter", () => this.read(thought, i));
      nodes.push(node);
    });
    const rest = thought.rest.slice(0, Math.max(left, 0));
    cut ||= rest.length < thought.rest.length;
    if (rest) nodes.push(element("span", { class: "unscored" }, rest));
    if (!thought.tokens.some((token, i) => i < firstOfTag && token.trim())) nodes.unshift(element("span", { class: "soft" }, "(empty) "));
    text.replaceChildren(...nodes);
    if (cut) {
      const more = element("button", { type: "button", class: "more" }, "… show all of it");
      more.addEventListener("click", () => { this.fill(text, thought, Infinity); text.focus(); });
      text.append(more);
    }
  }

  read(thought, i) {
    const numbers = Object.entries(RATIOS).map(([name, label]) => `${label} ${thought[name][i] === null ? "none" : figure(thought[name][i], 4)}`);
    this.reading.replaceChildren(`“${thought.tokens[i].slice(0, 40)}”: ${numbers.join(" · ")}`);
  }
}
